"""Experiment trackers: what they get, once and in order, and what they must not change."""

import json
import os
import random
import signal
import struct
import sys
from argparse import Namespace
from types import SimpleNamespace

import pytest
from conftest import read_log
from saving import warnings_of

from training import flag_checks, tracking
from training.existing_run import TRACKING
from training.flags import parse_args
from training.output import Output
from training.tracking import TRACKERS, Tracking
from utils import UserError

NAMES = list(TRACKERS)
ROWS = [
    {"epoch": e, "test_acc1": acc, "train_loss": 2 - e / 4} for e, acc in enumerate([20, 50, 40])
]
BEST = [20, 50, 50]
BLOCK = 32768


class Fake:
    """A tracker that notes its calls in ``calls``, and fails where ``fails`` says so."""

    calls: list
    fails: dict

    def __init__(self, package):
        self.package = package

    def note(self, *call):
        random.random()
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        sys.excepthook, sys.exit = print, print
        print("banner")
        self.calls.append((self.package.name, *call))
        if self.fails.get(call[0], -1) in ("always", call[-1]):
            raise RuntimeError("network 7")

    def begin(self, folder, name, config, run):
        self.note("begin", name, config["lr"], run)
        return run or "id5"

    def log(self, metrics, epoch):
        self.note("log", metrics, epoch)

    def end(self, status):
        self.note("end", status)


@pytest.fixture(autouse=True)
def environment(tmp_path, monkeypatch):
    """The environment is as before afterwards, and nothing is sent anywhere."""
    monkeypatch.setattr(os, "environ", os.environ.copy() | {"HF_HUB_OFFLINE": "1"})


@pytest.fixture
def fake(monkeypatch):
    Fake.calls, Fake.fails = [], {}
    monkeypatch.setattr(tracking, "TRACKERS", dict.fromkeys(NAMES, Fake))
    modules = {name: SimpleNamespace(name=name) for name in NAMES}
    monkeypatch.setattr(tracking.importlib, "import_module", modules.__getitem__)
    return Fake


def train(folder, epochs, start=0, resumes=False, names=("wandb",), status="finished", **flags):
    """Log ``epochs`` from ``start`` on, as main.py does."""
    args = Namespace(log_to=list(names), experiment="", lr=0.5)
    args = Namespace(**vars(args) | flags)
    output = Output(str(folder))
    try:
        output.begin(args, start)
        with Tracking(args, output, resumes) as tracked:
            for epoch in range(start, epochs):
                output.log_epoch(ROWS[epoch], epoch)
                tracked.log(ROWS[epoch] | {"best_acc1": BEST[epoch]}, epoch)
            tracked.status = status
    finally:
        output.close()


def logged(fake, name="wandb"):
    return [call[2:] for call in fake.calls if call[:2] == (name, "log")]


EXPECTED = [(row | {"best_acc1": best}, row["epoch"]) for row, best in zip(ROWS, BEST, strict=True)]


def test_a_tracker_gets_flags_epochs_and_the_end(fake, tmp_path):
    train(tmp_path / "run", 3, names=["wandb", "mlflow"], experiment="mine")
    for name in ("wandb", "mlflow"):
        calls = [call[1:] for call in fake.calls if call[0] == name]
        assert calls[0] == ("begin", "mine", 0.5, None)
        assert calls[1:-1] == [("log", *row) for row in EXPECTED]
        assert calls[-1] == ("end", "finished")


@pytest.mark.parametrize("start", [0, 1, 2])
def test_a_resumed_run_logs_every_epoch_once(fake, tmp_path, start):
    """From a checkpoint of the end, or of before an epoch that was logged."""
    train(tmp_path, 2, status="interrupted")
    assert fake.calls[-1] == ("wandb", "end", "interrupted")
    train(tmp_path, 3, start, resumes=True)
    assert logged(fake) == EXPECTED
    assert [call[-1] for call in fake.calls if call[1] == "begin"] == [None, "id5"]
    assert json.loads((tmp_path / TRACKING).read_text()) == {"wandb": {"id": "id5", "epoch": 2}}


def test_a_new_run_in_a_used_folder_is_another_one(fake, tmp_path):
    train(tmp_path, 2)
    train(tmp_path, 1)
    assert [call[-1] for call in fake.calls if call[1] == "begin"] == [None, None]
    assert logged(fake) == [*EXPECTED[:2], EXPECTED[0]]


def test_a_tracker_added_later_gets_the_epochs_before(fake, tmp_path):
    train(tmp_path, 2)
    train(tmp_path, 3, 2, resumes=True, names=["wandb", "trackio"])
    assert logged(fake) == logged(fake, "trackio") == EXPECTED


def test_a_failing_tracker_costs_one_warning(fake, tmp_path, capsys):
    fake.fails = {"log": 1}
    train(tmp_path, 3)
    assert len(read_log(tmp_path)) == 3
    assert logged(fake) == EXPECTED[:2]
    assert len(warnings_of(capsys.readouterr().out, "wandb", "network 7")) == 1
    assert fake.calls[-1] == ("wandb", "end", "finished")  # it may be back
    fake.fails, fake.calls = {}, []
    train(tmp_path, 3, 3, resumes=True)
    assert logged(fake) == EXPECTED[1:]  # made up for


def test_a_tracker_that_cannot_start(fake, tmp_path, capsys):
    fake.fails = {"begin": "always"}
    with pytest.raises(UserError, match=r"wandb.*network 7"):
        train(tmp_path, 3)
    assert not (tmp_path / "log.txt").exists()
    train(tmp_path, 3, resumes=True)  # a job that continues by itself does not end for it
    assert len(warnings_of(capsys.readouterr().out, "wandb", "network 7")) == 1


def test_a_damaged_record_is_another_run(fake, tmp_path, capsys):
    train(tmp_path, 1)
    (tmp_path / TRACKING).write_text("{")
    train(tmp_path, 1, 1, resumes=True)
    assert warnings_of(capsys.readouterr().out, tmp_path / TRACKING)
    assert fake.calls[-3:-1] == [
        ("wandb", "begin", "", 0.5, None),
        ("wandb", "log", *EXPECTED[0]),
    ]


def test_an_error_marks_the_run(fake, tmp_path, monkeypatch):
    monkeypatch.setattr(Output, "log_epoch", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(tmp_path, 1)
    assert fake.calls[-1] == ("wandb", "end", "failed")


def test_nothing_else_changes(fake, tmp_path, capsys):
    def surroundings():
        hooks = signal.getsignal(signal.SIGTERM), sys.excepthook, sys.exit
        return random.getstate(), hooks, sys.stdout, sys.stderr

    before = surroundings()
    train(tmp_path, 2)
    assert surroundings() == before
    assert "banner" not in "".join(capsys.readouterr())


def test_other_ranks_track_nothing(fake, tmp_path, monkeypatch):
    monkeypatch.setattr(tracking.utils, "is_main_process", lambda: False)
    with Tracking(Namespace(log_to=["wandb"]), Output(""), False) as tracked:
        tracked.log({}, 0)
    assert not fake.calls


# --- flags ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "names"),
    [
        ("--log-to wandb", ["wandb", "--output_dir"]),
        ("--log-to trackio --output_dir out", ["pip install trackio"]),
        ("--experiment mine", ["mine", "--log-to"]),
    ],
)
def test_flags_that_cannot_be_followed(words, names, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    (tmp_path / "trackio").mkdir()  # a folder of that name is no package
    monkeypatch.delitem(sys.modules, "trackio", raising=False)
    with pytest.raises(UserError) as caught:
        parse_args(words.split())
    assert all(name in str(caught.value) for name in names)


def test_an_evaluation_needs_no_tracker(monkeypatch):
    monkeypatch.setattr(flag_checks, "check_installed", lambda names: 1 / 0)
    args, _ = parse_args(["--eval", "--resume", "x.pth", "--log-to", "wandb"])
    assert args.log_to == ["wandb"]


def test_no_package_is_imported_unless_asked_for(tmp_path):
    before = set(sys.modules)
    train(tmp_path, 2, names=[])
    assert not {"wandb", "mlflow", "trackio"} & (set(sys.modules) - before)
    assert not (tmp_path / TRACKING).exists()


# --- the packages ---------------------------------------------------------------------------


def interrupted_and_resumed(name, folder):
    pytest.importorskip(name)
    os.environ["WANDB_DIR"] = str(folder.parent)  # whose folders are named by the second
    train(folder, 2, names=[name], status="interrupted")
    del os.environ["WANDB_DIR"]
    run = json.loads((folder / TRACKING).read_text())[name]["id"]
    train(folder, 3, 1, resumes=True, names=[name])
    assert json.loads((folder / TRACKING).read_text()) == {name: {"id": run, "epoch": 2}}
    return run


def test_mlflow(tmp_path):
    pytest.importorskip("sqlalchemy")
    os.environ["MLFLOW_TRACKING_URI"] = address = f"sqlite:///{tmp_path}/runs.db"
    run = interrupted_and_resumed("mlflow", tmp_path / "run")
    import mlflow

    client = mlflow.MlflowClient(address)
    found = client.get_run(run)
    assert found.info.status == "FINISHED"
    assert found.info.run_name == "run"
    assert found.data.params["lr"] == "0.5"
    assert found.data.metrics["best_acc1"] == 50
    history = [(m.step, m.value) for m in client.get_metric_history(run, "test_acc1")]
    assert history == [(0, 20), (1, 50), (2, 40)]


def test_trackio(tmp_path, monkeypatch):
    pytest.importorskip("trackio.utils")
    monkeypatch.setattr("trackio.utils.TRACKIO_DIR", tmp_path / "trackio")
    monkeypatch.setattr("trackio.sqlite_storage.TRACKIO_DIR", tmp_path / "trackio")
    run = interrupted_and_resumed("trackio", tmp_path / "run")
    assert run == "run"
    (tmp_path / "b").mkdir()
    train(tmp_path / "b" / "run", 1, names=["trackio"])  # of the same name
    assert json.loads((tmp_path / "b" / "run" / TRACKING).read_text())["trackio"]["id"] == "run-2"
    from trackio.sqlite_storage import SQLiteStorage

    rows = SQLiteStorage.get_logs("visformer", "run")
    assert [(row["step"], row["test_acc1"], row["best_acc1"]) for row in rows] == [
        (0, 20, 20),
        (1, 50, 50),
        (2, 40, 50),
    ]
    assert SQLiteStorage.get_run_config("visformer", "run")["lr"] == 0.5
    assert [alert["title"] for alert in SQLiteStorage.get_alerts("visformer", "run")] == [
        "interrupted"
    ]


def test_wandb_offline(tmp_path):
    os.environ["WANDB_MODE"] = "offline"
    run = interrupted_and_resumed("wandb", tmp_path / "run")
    records = [list(scan(path)) for path in sorted(tmp_path.glob("wandb/*run-*/*.wandb"))]
    records += [list(scan(path)) for path in (tmp_path / "run").glob("wandb/*run-*/*.wandb")]
    steps = [
        {
            item.key or item.nested_key[0]: json.loads(item.value_json)
            for item in record.history.item
        }
        for part in records
        for record in part
        if record.HasField("history")
    ]
    assert [(step["_step"], step["test_acc1"]) for step in steps] == [(0, 20), (1, 50), (2, 40)]
    runs = [record.run for part in records for record in part if record.HasField("run")]
    assert {(r.run_id, r.project, r.display_name) for r in runs} == {(run, "visformer", "run")}
    ends = [[r.exit.exit_code for r in part if r.HasField("exit")] for part in records]
    assert ends == [[1], [0]]


def scan(path):
    """The records of a file of W&B's: 7 bytes, then a log in LevelDB's format."""
    from wandb.proto import wandb_internal_pb2

    data, at, parts = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if BLOCK - at % BLOCK < 7:  # no header fits in the rest of a block
            at += BLOCK - at % BLOCK
        _, length, kind = struct.unpack_from("<IHB", data, at)  # 1: whole, 2: first, 4: last
        parts = (parts if kind in (3, 4) else b"") + data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            yield record
