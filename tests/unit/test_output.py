"""The output folder: nothing is lost to a full disk, lost permission or a second run."""

import errno
import json
import os
import resource
import signal
import socket
import subprocess
import tempfile
import threading
from argparse import Namespace
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import read_log
from saving import (
    begin_child,
    done,
    fail,
    number_in,
    numbers,
    run,
    save,
    state,
    temporaries,
    warnings_of,
)

from training import checkpoints
from training import output as module
from training.checkpoints import find_checkpoint, save_checkpoint
from training.files import OutputError
from training.output import Output

NOBODY = 65534


# --- disks that take nothing ----------------------------------------------------------------


def limit_files(size):
    """Let no file of this process grow beyond ``size`` bytes, as on a full disk; -1 lifts it."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, -1))


def epochs_on_a_full_disk(folder):
    output = Output(str(folder))
    output.begin(Namespace(lr=0.1), 0)
    for epoch, (room, best) in enumerate([(-1, True), (100, True), (100, False), (-1, False)]):
        limit_files(room)
        output.log_epoch({"epoch": epoch, "test_acc1": 1 / 3, "train_loss": 2 / 3}, epoch)
        save(output, epoch, best)
        print(json.dumps([numbers(folder), temporaries(folder)]))
    output.close()


def test_what_a_full_disk_did_not_take_is_written_later(tmp_path):
    text = done(epochs_on_a_full_disk, tmp_path)
    seen = [json.loads(line) for line in text.splitlines() if line.startswith("[")]
    before = {"checkpoint.pth": 0, "best.pth": 0}
    # the last epoch was not the best: the best one is of the second, which is made up for
    after = {"checkpoint.pth": 3, "previous.pth": 0, "best.pth": 1}
    assert seen == [[before, []], [before, []], [before, []], [after, []]]
    assert len(warnings_of(text, tmp_path / "checkpoint.pth", "(16 bytes")) == 2
    assert [line["epoch"] for line in read_log(tmp_path)] == [0, 1, 2, 3]
    assert len(warnings_of(text, tmp_path / "log.txt")) == 2
    assert len(warnings_of(text, "TensorBoard")) == 1
    assert "Traceback" not in text


def end_on_a_full_disk(folder):
    output = Output(str(folder))
    save(output, 0)
    limit_files(150)
    output.save(state(1), is_best=True)
    output.save(state(2))
    for end in (output.finish_saving, output.close):
        with pytest.raises(OutputError, match=r"checkpoint\.pth"):
            end()
    assert numbers(folder) == {"checkpoint.pth": 0}
    limit_files(-1)
    output.finish_saving()


def test_the_end_of_a_run_says_that_it_could_not_save(tmp_path):
    done(end_on_a_full_disk, tmp_path)
    assert numbers(tmp_path) == {"checkpoint.pth": 2, "previous.pth": 0, "best.pth": 1}


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MiB."""
    words = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", tmp_path]
    try:
        subprocess.run(words, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("a small disk cannot be mounted here")
    yield tmp_path
    subprocess.run(["umount", "--lazy", tmp_path], check=True)


def test_a_disk_that_fills_up(small_disk, capsys):
    big = torch.zeros(100_000)  # 400 kB, of which the disk takes two
    output = Output(str(small_disk))
    for number in range(2):
        output.save(state(number) | {"big": big}, is_best=True)
        output.wait()
    (small_disk / "other").write_bytes(bytes(100_000))
    output.save(state(2) | {"big": big}, is_best=True)
    output.wait()
    assert warnings_of(capsys.readouterr().out, "(400,016 bytes")
    assert numbers(small_disk) == {"checkpoint.pth": 1, "previous.pth": 0, "best.pth": 1}
    assert not temporaries(small_disk)
    output.save(state(3))  # small: it takes the place of the first, which makes room for the best
    output.close()
    assert numbers(small_disk) == {"checkpoint.pth": 3, "previous.pth": 1, "best.pth": 2}


def events_on_a_full_disk(folder):
    output = Output(str(folder))
    limit_files(60)
    output.begin(Namespace(), 0)
    limit_files(10_000)
    output.add_images("train/images", torch.rand(3, 100, 100))
    output.log_epoch({"epoch": 0, "test_a\x1b[2J\udcff": 1.0}, 0)
    limit_files(-1)
    output.log_epoch({"epoch": 1, "test_a\x1b[2J\udcff": 2.0}, 1)
    limit_files(10)
    output.log_epoch({"epoch": 2}, 2)
    limit_files(-1)
    output.close()


def test_events_that_a_full_disk_did_not_take_are_written_later(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    text = done(events_on_a_full_disk, tmp_path)
    (events,) = tmp_path.glob("events.*")
    assert len(warnings_of(text, events)) == 1
    assert len(text.splitlines()) == 2, text  # the other one is of log.txt
    found = EventAccumulator(str(tmp_path)).Reload()
    assert found.Tags()["scalars"] == ["test/a\\x1b[2J\\udcff"]
    values = found.Scalars("test/a\\x1b[2J\\udcff")
    assert [(value.step, value.value) for value in values] == [(0, 1.0), (1, 2.0)]
    assert len(found.Images("train/images")) == 1


# --- permission -----------------------------------------------------------------------------


@pytest.fixture
def own_folder():
    """A folder that :func:`as_user` may write, wherever the tests' folders are."""
    with tempfile.TemporaryDirectory() as name:
        if os.geteuid() == 0:
            os.chown(name, NOBODY, NOBODY)
        yield Path(name)


def as_user(function, folder):
    if os.geteuid() == 0:  # whom no permission stops
        os.setgid(NOBODY)
        os.setuid(NOBODY)
    function(folder)


def lose_permission(folder):
    output = Output(str(folder))
    save(output, 0)
    folder.chmod(0o555)
    save(output, 1, is_best=True)
    with pytest.raises(OutputError, match=f"--output_dir {folder}/new"):
        Output(f"{folder}/new")
    (folder / "checkpoint.pth").write_bytes(b"damaged")
    with pytest.raises(OutputError, match=r"checkpoint\.pth"):
        find_checkpoint(folder, set_aside=True)
    folder.chmod(0o755)
    output.save(state(2))
    output.close()


def test_lost_permission_is_warned_about(own_folder):
    text = done(as_user, lose_permission, own_folder)
    path = own_folder / "checkpoint.pth"
    assert warnings_of(text, path)
    (own_folder / "previous.pth").unlink()  # which the test has damaged
    assert numbers(own_folder) == {"checkpoint.pth": 2, "best.pth": 1}


def lose_permission_while_writing(folder):
    verify = checkpoints.verify_checksum
    checkpoints.verify_checksum = lambda path: (verify(path), folder.chmod(0o555))[0]
    output = Output(str(folder))
    save(output, 0)
    checkpoints.verify_checksum = verify
    folder.chmod(0o755)
    output.save(state(1))
    output.close()


def test_permission_lost_while_writing(own_folder):
    text = done(as_user, lose_permission_while_writing, own_folder)
    assert warnings_of(text, "checkpoint.pth") and "Traceback" not in text
    assert numbers(own_folder) == {"checkpoint.pth": 1}
    assert len(temporaries(own_folder)) == 1  # which could not be removed
    run(own_folder)
    assert not temporaries(own_folder)


# --- background -----------------------------------------------------------------------------


def test_saving_does_not_hold_up_training(tmp_path, monkeypatch):
    gate, begun = threading.Event(), []

    def slow_save(content, path, also, keep):
        begun.append(content["number"])
        assert gate.wait(30)
        save_checkpoint(content, path, also, keep)

    monkeypatch.setattr(checkpoints, "save_checkpoint", slow_save)
    output, content = Output(str(tmp_path)), state(0)
    output.save(content)
    content["weights"].fill_(7)  # training goes on while the state is being written
    assert output.busy
    second = threading.Thread(target=output.save, args=(state(1),))
    second.start()
    second.join(0.2)
    assert second.is_alive()  # it waits for the first
    assert begun == [0]
    gate.set()
    second.join()
    output.close()
    assert not output.busy
    assert numbers(tmp_path) == {"checkpoint.pth": 1, "previous.pth": 0}


def test_what_else_goes_wrong_in_the_background_comes_out_at_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr(threading, "excepthook", lambda error: None)
    monkeypatch.setattr(checkpoints, "save_checkpoint", lambda *args, **kwargs: 1 / 0)
    output = Output(str(tmp_path))
    output.save(state(0))
    with pytest.raises(ZeroDivisionError):
        output.finish_saving()


# --- the best and the last ones -------------------------------------------------------------


def end_epoch(output, epoch, accuracies):
    """Save an epoch as the trainer does, which ranks the accuracies so far."""
    ranked = sorted(range(epoch + 1), key=lambda i: -accuracies[i])
    output.save(state(epoch), ranked[0] == epoch, epoch, ranked[: output.keep])


@pytest.mark.parametrize("links", [True, False])
def test_the_best_and_the_last_ones_are_kept(tmp_path, monkeypatch, links):
    if not links:
        monkeypatch.setattr(os, "link", partial(fail, errno.EPERM))
    output = Output(str(tmp_path), keep=3)
    for epoch in range(6):
        end_epoch(output, epoch, [10, 50, 30, 40, 20, 5])
    output.save(state(6))  # in the middle of an epoch
    output.close()
    kept = {f"checkpoint-000{epoch}.pth": epoch for epoch in (3, 4, 5)}
    kept |= {f"best-000{epoch}.pth": epoch for epoch in (1, 2, 3)}
    assert numbers(tmp_path) == kept | {"checkpoint.pth": 6, "previous.pth": 5, "best.pth": 1}
    files = {path.stat().st_ino for path in tmp_path.glob("*.pth")}
    assert len(files) == (6 if links else 9)  # with links, one per state
    assert not temporaries(tmp_path)


def test_none_is_removed_for_one_that_cannot_be_written(tmp_path, monkeypatch):
    output = Output(str(tmp_path), keep=2)
    for epoch in range(2):
        end_epoch(output, epoch, [10, 20, 30, 0])
    output.wait()
    kept = numbers(tmp_path)
    with monkeypatch.context() as full:
        full.setattr(checkpoints, "write_with_checksum", partial(fail, errno.ENOSPC))
        end_epoch(output, 2, [10, 20, 30, 0])
        output.wait()
    assert numbers(tmp_path) == kept
    end_epoch(output, 3, [10, 20, 30, 0])
    output.close()
    names = {"best-0001.pth": 1, "best-0002.pth": 2, "best.pth": 2, "checkpoint.pth": 3}
    names |= {"checkpoint-0002.pth": 2, "checkpoint-0003.pth": 3, "previous.pth": 1}
    assert numbers(tmp_path) == names


# --- the lock -------------------------------------------------------------------------------


def hold(folder, gate):
    Output(str(folder))
    print("holding", flush=True)
    os.read(gate, 1)


def test_a_second_run_is_refused_until_the_first_one_is_gone(tmp_path, main, capsys):
    gate, _ = os.pipe()
    holder, out = begin_child(hold, tmp_path, gate)
    assert out.readline() == "holding\n"
    status, _, errors = main("--data-path", "none", "--output_dir", tmp_path)
    assert status == 1
    for part in (f"--output_dir {tmp_path}", f"process {holder}", socket.gethostname()):
        assert part in errors
    os.kill(holder, signal.SIGKILL)
    os.waitpid(holder, 0)
    run(tmp_path)
    assert f"process {holder} on {socket.gethostname()}" in capsys.readouterr().out
    run(tmp_path)
    assert capsys.readouterr().out == ""


def contend(folder, start, gate):
    os.read(start, 1)
    try:
        output = Output(str(folder))
    except OutputError as error:
        print(error)
    else:
        print("won", flush=True)
        os.read(gate, 1)  # until all have tried
        output.close()


def test_of_runs_that_start_at_once_one_wins(tmp_path):
    start, starter = os.pipe()
    gate, opener = os.pipe()
    children = [begin_child(contend, tmp_path / "new", start, gate) for _ in range(6)]
    os.write(starter, b"123456")
    said = [out.readline() for _, out in children]
    os.write(opener, b"1")
    assert [os.waitpid(child, 0)[1] for child, _ in children] == [0] * 6
    assert said.count("won\n") == 1
    assert sum(f"--output_dir {tmp_path / 'new'}" in line for line in said) == 5


def test_a_file_system_that_cannot_lock_is_warned_about(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(module.fcntl, "lockf", partial(fail, errno.ENOLCK))
    run(tmp_path)
    assert warnings_of(capsys.readouterr().out, tmp_path)


# --- odd folders ----------------------------------------------------------------------------


def test_names_links_and_other_devices(tmp_path):
    (tmp_path / "linked").symlink_to(tmp_path / "a [b] *c\n")
    folders = [tmp_path / "a [b] *c\n", tmp_path / "linked"]
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as name:
        for folder in [*folders, Path(name)]:
            folder.resolve().mkdir(exist_ok=True)
            output = Output(str(folder), keep=2)
            for epoch in range(3):
                end_epoch(output, epoch, [1, 2, 3])
            output.close()
            assert find_checkpoint(folder, set_aside=False)[1]["number"] == 2
            assert len(numbers(folder)) == 7


def test_a_link_to_a_checkpoint_is_replaced_and_what_it_names_stays(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    save_checkpoint(state(0), tmp_path / "elsewhere" / "old.pth")
    (tmp_path / "checkpoint.pth").symlink_to("elsewhere/old.pth")
    run(tmp_path, 1)
    assert numbers(tmp_path) == {"checkpoint.pth": 1, "previous.pth": 0}
    run(tmp_path, 2)
    assert numbers(tmp_path) == {"checkpoint.pth": 2, "previous.pth": 1}
    assert number_in(tmp_path / "elsewhere" / "old.pth") == 0


def test_a_folder_in_the_place_of_a_checkpoint_is_named(tmp_path, capsys):
    save_checkpoint(state(0), tmp_path / "checkpoint.pth")
    previous = tmp_path / "previous.pth"
    previous.mkdir()
    output = Output(str(tmp_path))
    save(output, 1)
    assert warnings_of(capsys.readouterr().out, previous)
    assert number_in(tmp_path / "checkpoint.pth") == 0
    assert not temporaries(tmp_path)
    previous.rmdir()
    output.close()
    assert numbers(tmp_path) == {"checkpoint.pth": 1, "previous.pth": 0}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_folder_that_is_deleted_during_the_run(tmp_path, capsys):
    folder = tmp_path / "run"
    output = Output(str(folder))
    output.begin(Namespace(), 0)
    folder.rename(tmp_path / "gone")  # at one stroke, whatever TensorBoard is writing
    for epoch in range(2):
        output.log_epoch({"epoch": epoch, "test_acc1": 1.0}, epoch)
        save(output, epoch)
    assert warnings_of(capsys.readouterr().out, folder / "checkpoint.pth")
    folder.mkdir()
    output.close()
    assert numbers(folder) == {"checkpoint.pth": 1}
    assert [line["epoch"] for line in read_log(folder)] == [0, 1]
