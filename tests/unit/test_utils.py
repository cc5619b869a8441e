"""Progress on a terminal and elsewhere, the log of a resumed run, seeds."""

import io
import json
import random
import sys
from argparse import Namespace

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

import engine
import utils
from training import launch, progress
from training.output import Output


class Terminal(io.StringIO):
    def isatty(self):
        return True


def use_terminal(monkeypatch):
    """In the test itself: capsys replaces what a fixture sets."""
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("LINES", "40")
    monkeypatch.setenv("COLUMNS", "150")
    return sys.stderr


def walk(progress):
    for step, _ in enumerate(progress, start=1):
        progress.report(step, 0.5, 1e-3, 8.0)


def test_progress_is_a_bar_on_a_terminal(monkeypatch, capsys):
    use_terminal(monkeypatch)
    walk(progress.Progress(DataLoader(range(8), batch_size=4), 1, 3, world_size=2))
    bar = sys.stderr.getvalue()
    # 2 steps of 4 images are left in the next epoch, at 8 images per second and process
    assert "epoch 1:   0%|" in bar
    assert "loss 0.5000 lr 0.001 16 images/s eta 0:00:01" in bar
    assert capsys.readouterr().out.splitlines() == [
        "epoch 1 step 2/2 loss 0.5000 lr 0.001 16 images/s eta 0:00:01"
    ]


def test_progress_is_lines_elsewhere(capsys):
    walk(progress.Progress(DataLoader(range(12), batch_size=4), 0, 1, world_size=1))
    output, errors = capsys.readouterr()
    assert [line.split(" loss")[0] for line in output.splitlines()] == [
        "epoch 0 step 1/3",
        "epoch 0 step 2/3",
        "epoch 0 step 3/3",
    ]
    assert errors == ""


def train_on(items):
    """An epoch of engine's loop over ``items``, with the loader's rate and loss shown."""
    model = torch.nn.Linear(2, 2)
    shown = progress.Progress(Batches(items), 0, 1, world_size=1)
    engine.train_one_epoch(
        model,
        torch.nn.CrossEntropyLoss(),
        shown,
        torch.optim.SGD(model.parameters(), 0.1),
        torch.device("cpu"),
        0,
        engine.Precision(torch.device("cpu")),
        log_interval=shown.interval(50),
        report=shown.report,
    )


class Batches(list):
    batch_size = 4


@pytest.mark.parametrize(("steps", "reports"), [(3, 3), (20, 10)])
def test_short_epochs_show_loss_and_rate(monkeypatch, capsys, steps, reports):
    terminal, told = use_terminal(monkeypatch), []
    report = progress.Progress.report
    monkeypatch.setattr(
        progress.Progress,
        "report",
        lambda self, *args: (told.append(args[0]), report(self, *args))[0],
    )
    train_on([(torch.ones(4, 2), torch.ones(4, dtype=torch.long), [])] * steps)
    assert len(told) == reports and told[-1] == steps
    assert "images/s" in terminal.getvalue() and "loss" in terminal.getvalue()
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_short_epochs_are_one_line_elsewhere(capsys):
    train_on([(torch.ones(4, 2), torch.ones(4, dtype=torch.long), [])] * 20)
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_any_loop_is_a_bar_on_a_terminal(monkeypatch, capsys):
    terminal = use_terminal(monkeypatch)
    assert list(progress.shown("abc", "packing", 5, done=2)) == [*"abc"]
    assert "packing" in terminal.getvalue() and "2/5" in terminal.getvalue()
    assert capsys.readouterr().out == ""


def test_any_loop_is_few_lines_elsewhere(monkeypatch, capsys):
    assert list(progress.shown("abc", "packing", 3)) == [*"abc"]
    assert capsys.readouterr() == ("", "")
    now = iter(range(0, 10_000, 20))
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(now))
    assert sum(progress.shown(range(30), "packing", 30, seconds=200)) == 435
    lines = capsys.readouterr().out.splitlines()
    assert 1 <= len(lines) <= 5 and all("of 30" in line for line in lines)


def test_lines_of_an_interrupted_run_are_dropped(tmp_path):
    lines = [json.dumps({"epoch": epoch}) + "\n" for epoch in range(4)]
    (tmp_path / "log.txt").write_text("".join(lines) + '{"epoch": 4, "tes')
    output = Output(str(tmp_path))
    output.begin(Namespace(lr=0.1), start_epoch=2)
    output.log_epoch({"epoch": 2, "test_acc1": 50.0}, 2)
    output.close()
    kept = [json.loads(line) for line in (tmp_path / "log.txt").read_text().splitlines()]
    assert [line["epoch"] for line in kept] == [0, 1, 2]


def test_without_a_folder_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    output = Output("")
    output.begin(Namespace(), 0)
    output.log_epoch({"epoch": 0}, 0)
    output.save({"epoch": 0}, is_best=True)
    output.close()
    assert not list(tmp_path.iterdir())


def draw():
    return random.random(), np.random.rand(), torch.rand(1).item()


def test_seeds_depend_on_every_number():
    draws = []
    for numbers in [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0), (0, 0, 0)]:
        utils.seed_everything(*numbers)
        draws.append(draw())
    assert draws[0] == draws[-1]
    assert len({values[i] for values in draws for i in range(3)}) == 12


def test_a_dead_loader_process_is_told_from_other_errors():
    message = "DataLoader worker (pid 7) is killed by signal: Killed."
    assert message in launch.loader_message(RuntimeError(message))
    with pytest.raises(RuntimeError, match="another"):
        launch.loader_message(RuntimeError("another"))
    broken = [EOFError(), ConnectionResetError(104, "Connection reset by peer")]
    for error in [*broken, BrokenPipeError(32, "Broken pipe")]:
        code = compile("raise error", "/x/torch/utils/data/dataloader.py", "exec")
        with pytest.raises(type(error)) as caught:
            exec(code, {"error": error})
        assert "--num_workers" in launch.loader_message(caught.value)


def test_messages_lose_the_traceback_of_a_loader_process():
    wrapped = (
        "Caught X in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n"
        '  File "x", line 1\ndatasets.CorruptImageError: cannot decode image a: b'
    )
    assert launch.last_message(RuntimeError(wrapped)) == "cannot decode image a: b"
    assert launch.last_message(RuntimeError("plain: text")) == "plain: text"


def test_an_interrupt_says_what_the_program_knows(capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    assert launch.run_program(interrupt) == 130
    assert capsys.readouterr().err.startswith("error: ")
    assert launch.run_program(interrupt, launch.RESUMES) == 130
    assert "--resume auto" in capsys.readouterr().err


def test_names_command_no_terminal_and_forge_no_lines(capsys, tmp_path):
    name = "a\x1b[2Jb\nerror: c\u202ed\udcffe\x9b"
    utils.log(name)
    launch.fail(name)
    output = Output(str(tmp_path))
    output.list_corrupt([name])
    output.close()
    printed = capsys.readouterr()
    texts = printed.out, printed.err, (tmp_path / "corrupt.txt").read_text()
    for text in texts:
        line, end = text[:-1], text[-1:]
        assert line.isprintable() and end == "\n"
        assert r"a\x1b[2Jb\nerror: c\u202ed\udcffe\x9b" in line
