"""The attack test: some cases of every class, and that it notices what it is meant to notice."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import call, run_python

from tests.attack import case, valid
from tests.attack.__main__ import main

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc and pidfd")


def counts(output):
    """``{class: (tried, survived)}`` of a table."""
    rows = [line.strip("| ").split(" | ") for line in output.splitlines() if line[:1] == "|"]
    return {name: (int(tried), int(survived)) for name, tried, survived, _ in rows[2:]}


def test_a_part_of_every_class_is_survived():
    flags = ["--each", 8, "--seed", 1, "--mutations", 200]
    done = run_python("-m", "tests.attack", *flags)
    assert done.returncode == 0, done.stdout + done.stderr
    found = counts(done.stdout)
    assert found.pop("mutations") == (200, 200)
    assert len(found) == 9 and set(found.values()) == {(8, 8)}


def harm(name):
    """A program of one of the faults that the test is to notice."""

    def run(words):
        folder = Path.cwd().parent
        if name == "traceback":
            raise KeyError("x.pth")
        if name == "silence":
            return 1
        if name == "escape":
            print("error: x.pth \x1b[2J", file=sys.stderr)
        elif name == "two lines":
            print("x\nerror: x.pth", file=sys.stderr)
        elif name == "another name":
            print("error: y", file=sys.stderr)
        elif name == "output":
            (folder / "out" / "x").touch()
        elif name == "beyond":
            Path(f"{folder}-beyond").touch()
        elif name == "start":
            subprocess.run(["true"], check=True)
        elif name == "memory":
            bytearray(1 << 31)
        elif name == "signal":
            os.kill(os.getpid(), signal.SIGKILL)
        elif name == "temporary":
            (folder / "tmp" / "x").touch()
        if name not in ("escape", "two lines", "another name"):
            print("error: x.pth", file=sys.stderr)
        return name != "accepted"

    return run


HARMS = [
    "traceback",
    "silence",
    "escape",
    "output",
    "beyond",
    "start",
    "memory",
    "signal",
    "temporary",
    "accepted",
]
HARMS += ["temporary", "accepted", "two lines", "another name"]


@pytest.mark.parametrize("name", ["nothing", *HARMS])
def test_harm_is_noticed(monkeypatch, tmp_path, name):
    monkeypatch.setitem(case.PROGRAMS, "harm", harm(name))
    one = case.Case("harm", name, "harm", ["@x.pth"], named="x.pth")
    wrong = case.run_case(one, valid.World(tmp_path), tmp_path / "case")
    assert (wrong is None) == (name == "nothing"), wrong


def test_hangs_end(monkeypatch, tmp_path):
    monkeypatch.setattr(case, "WALL_SECONDS", 0.2)
    monkeypatch.setitem(case.PROGRAMS, "harm", lambda words: signal.pause())
    wrong = case.run_case(case.Case("harm", "hang", "harm", []), valid.World(tmp_path), tmp_path)
    assert "0.2" in wrong


def test_unknown_classes_are_named():
    with pytest.raises(SystemExit):
        call(main, "nonesuch")
