"""A run that is killed at any moment of its saving loses nothing that it had saved."""

import errno
import json
import os
import shutil
import signal
import sys
import tempfile
import threading
from argparse import Namespace
from collections import Counter
from functools import partial
from tempfile import NamedTemporaryFile

import pytest
from conftest import ROOT, read_log, run_python
from saving import done, fail, in_child, number_in, numbers, save, state, temporaries

from models.checkpoint import checksum
from training import checkpoints, files
from training import output as module
from training.checkpoints import find_checkpoint
from training.output import Output

WRITER = {module.__file__, checkpoints.__file__, files.__file__, checksum.__file__}
UNTRACED = {"log", "plain", "snapshot", "size_of"}  # functions that touch no file
BEST_EPOCHS = [[0], [0, 1], [2, 0]]  # of a run of three epochs, after each


def run_of_saves(folder, kill_at):
    """Three epochs, of which the first and the last are the best; killed at a point.

    A point is a line of the writer before which the folder has changed: whether it is one of the
    main thread, and its number. Without one to be killed at, all are printed.
    """
    lines, seen = Counter(), []

    def trace(frame, event, arg):
        nonlocal seen
        code = frame.f_code
        if code.co_filename not in WRITER or code.co_name in UNTRACED:
            return None
        if event == "line":
            thread = threading.current_thread() is threading.main_thread()
            lines[thread] += 1
            point = [thread, lines[thread]]
            if point == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            if kill_at is None and seen != (seen := look(folder)):
                print(json.dumps(point))
        return trace

    threading.settrace(trace)
    sys.settrace(trace)
    output = Output(str(folder), keep=2)
    for epoch, best in enumerate(BEST_EPOCHS):
        output.log_epoch({"epoch": epoch}, epoch)
        save(output, epoch, epoch in (0, 2), epoch, best)
        print("saved")
    output.close()


def look(folder):
    """The names, files and sizes in a folder; of a temporary file, the size in half KiB."""
    if not folder.exists():
        return []
    found = [(entry.name, entry.stat()) for entry in os.scandir(folder)]
    return sorted((n, s.st_ino, s.st_size // 512 if n[0] == "." else s.st_size) for n, s in found)


def kill_everywhere(folder, links):
    """Kill a run of saves at every point, look at what is left, and go on; prints the number."""
    os.fsync = lambda file: None  # a kill spares what the system holds
    # what is written is at once in the file, so that a kill leaves a part of it there
    tempfile.NamedTemporaryFile = partial(NamedTemporaryFile, buffering=0)
    if not links:
        os.link = partial(fail, errno.EPERM)
    said = done(run_of_saves, folder, None)
    points = [json.loads(line) for line in said.splitlines() if line.startswith("[")]
    for point in points:
        shutil.rmtree(folder)
        status, text = in_child(run_of_saves, folder, point)
        assert status == -signal.SIGKILL, (point, text)
        check_after_kill(folder, text.count("saved"))
        go_on(folder, text.count("saved"))
    print("points", len(points))


@pytest.mark.parametrize("links, points", [(True, 40), (False, 50)])
def test_a_kill_at_any_line_of_the_writer_loses_nothing(tmp_path, links, points):
    # in a process of its own, of which hundreds are forked: it is smaller than this one
    code = "import pathlib, sys, test_kills as t\n"
    code += "t.kill_everywhere(pathlib.Path(sys.argv[1]), bool(sys.argv[2]))"
    words = ["-c", code, tmp_path / "run", "links" if links else ""]
    folders = (ROOT, ROOT / "tests", ROOT / "tests" / "slow")
    ended = run_python(*words, PYTHONPATH=os.pathsep.join(map(str, folders)))
    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr
    assert int(ended.stdout.split()[-1]) >= points


def check_after_kill(folder, saved):
    found = find_checkpoint(folder, set_aside=False)
    assert (found[1]["number"] if found else -1) in (saved - 1, saved)
    kept = numbers(folder)  # whole ones, each
    if not saved:
        return
    assert kept["checkpoint.pth"] in (saved - 1, saved)  # at no time is there none
    assert saved == 1 or kept["previous.pth"] in (saved - 2, saved - 1)
    assert kept["best.pth"] in ([0, 0, 2][saved - 1], saved)
    assert kept[f"checkpoint-{saved - 1:04d}.pth"] == saved - 1
    wanted = [{f"best-{epoch:04d}.pth" for epoch in epochs} for epochs in BEST_EPOCHS]
    assert any(best <= set(kept) for best in wanted[saved - 1 : saved + 1])


def go_on(folder, saved):
    """Go on as after a kill: what it left is cleared away, and ``log.txt`` has whole lines."""
    output = Output(str(folder), keep=2)
    assert not temporaries(folder)
    output.begin(Namespace(), saved)
    output.log_epoch({"epoch": saved}, saved)
    output.save(state(saved), False, saved, [0])
    output.close()
    assert number_in(folder / "checkpoint.pth") == saved
    assert [line["epoch"] for line in read_log(folder)] == list(range(saved + 1))
    wanted = {f"checkpoint-{epoch:04d}.pth" for epoch in (saved - 1, saved) if epoch >= 0}
    wanted |= {"checkpoint.pth", "previous.pth", "best.pth", "best-0000.pth", "run.lock", "log.txt"}
    events = {path.name for path in folder.glob("events.*")}
    assert {path.name for path in folder.iterdir()} <= wanted | events | {"args.yaml"}
