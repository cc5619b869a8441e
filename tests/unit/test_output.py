"""The output folder: nothing is lost to a kill, a full disk, lost permission or a second run."""

import errno
import json
import os
import re
import resource
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import traceback
from argparse import Namespace
from collections import Counter
from functools import partial
from pathlib import Path
from tempfile import NamedTemporaryFile

import pytest
import torch
from conftest import ROOT, read_log, run_python

from models import read_checkpoint
from models.checkpoint import checksum
from training import checkpoints, files
from training import output as module
from training.checkpoints import find_checkpoint, save_checkpoint
from training.files import OutputError
from training.output import Output

WRITER = {module.__file__, checkpoints.__file__, files.__file__, checksum.__file__}
NOBODY = 65534
UNTRACED = {"log", "plain", "snapshot", "size_of"}  # functions that touch no file
BEST_EPOCHS = [[0], [0, 1], [2, 0]]  # of a run of three epochs, after each


def state(number):
    return {"number": number, "weights": torch.full((4,), float(number))}


def number_in(path):
    """The number of the state in a checkpoint, which is whole."""
    assert checksum.verify_checksum(path), path
    content = read_checkpoint(path)
    assert torch.equal(content["weights"], state(content["number"])["weights"])
    return content["number"]


def numbers(folder):
    return {path.name: number_in(path) for path in folder.glob("*.pth")}


def temporaries(folder):
    return [path.name for path in folder.glob(".*")]


def warnings_of(text, *parts):
    """The warnings in an output that name all of ``parts``."""
    lines = [line for line in text.splitlines() if line.startswith("warning: ")]
    return [line for line in lines if all(str(part) in line for part in parts)]


def begin_child(function, *args):
    """Fork a process that calls ``function``; its id, and a file of what it prints."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        signal.alarm(60)  # a child that hangs ends
        os.close(read)
        sys.stdout = sys.stderr = os.fdopen(write, "w", 1)
        status = 1
        try:
            function(*args)
            status = 0
        except BaseException:
            traceback.print_exc()
        os._exit(status)
    os.close(write)
    return child, os.fdopen(read)


def in_child(function, *args):
    """Call ``function`` in a forked process; its return code (-9 if killed) and its output."""
    child, out = begin_child(function, *args)
    with out:
        text = out.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), text


def fail(number, *args, **kwargs):
    raise OSError(number, os.strerror(number))


def done(function, *args):
    status, text = in_child(function, *args)
    assert status == 0, text
    return text


# --- kills ----------------------------------------------------------------------------------


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
        output.save(state(epoch), epoch in (0, 2), epoch, best)
        output.wait()
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


@pytest.mark.slow
@pytest.mark.parametrize("links, points", [(True, 40), (False, 50)])
def test_a_kill_at_any_line_of_the_writer_loses_nothing(tmp_path, links, points):
    # in a process of its own, of which hundreds are forked: it is smaller than this one
    code = "import sys, test_output as t; t.kill_everywhere(t.Path(sys.argv[1]), bool(sys.argv[2]))"
    words = ["-c", code, tmp_path / "run", "links" if links else ""]
    folders = (ROOT, ROOT / "tests", ROOT / "tests" / "unit")
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
    log = [json.loads(line)["epoch"] for line in (folder / "log.txt").read_text().splitlines()]
    assert log == list(range(saved + 1))
    wanted = {f"checkpoint-{epoch:04d}.pth" for epoch in (saved - 1, saved) if epoch >= 0}
    wanted |= {"checkpoint.pth", "previous.pth", "best.pth", "best-0000.pth", "run.lock", "log.txt"}
    events = {path.name for path in folder.glob("events.*")}
    assert {path.name for path in folder.iterdir()} <= wanted | events | {"args.yaml"}


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
        output.save(state(epoch), best)
        output.wait()
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


def end_on_a_full_disk(folder):
    output = Output(str(folder))
    output.save(state(0))
    output.wait()
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


def test_a_log_begun_on_a_full_disk_needs_no_tensorboard(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(module, "SummaryWriter", partial(fail, errno.ENOSPC))
    output = Output(str(tmp_path))
    output.begin(Namespace(), 0)
    output.log_epoch({"epoch": 0}, 0)
    output.close()
    assert read_log(tmp_path) == [{"epoch": 0}]
    assert warnings_of(capsys.readouterr().out, "TensorBoard")


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
    output.save(state(0))
    output.wait()
    folder.chmod(0o555)
    output.save(state(1), is_best=True)
    output.wait()
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
    output.save(state(0))
    output.wait()
    checkpoints.verify_checksum = verify
    folder.chmod(0o755)
    output.save(state(1))
    output.close()


def test_permission_lost_while_writing(own_folder):
    text = done(as_user, lose_permission_while_writing, own_folder)
    assert warnings_of(text, "checkpoint.pth") and "Traceback" not in text
    assert numbers(own_folder) == {"checkpoint.pth": 1}
    assert len(temporaries(own_folder)) == 1  # which could not be removed
    Output(str(own_folder)).close()
    assert not temporaries(own_folder)


# --- damage ---------------------------------------------------------------------------------


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def replace_by_folder(path):
    path.unlink()
    path.mkdir()


DAMAGES = {
    "flipped": flip,
    "truncated": lambda path: os.truncate(path, path.stat().st_size // 2),
    "emptied": lambda path: os.truncate(path, 0),
    "folder": replace_by_folder,
}


def save_three(folder):
    for number in range(3):
        best = [folder / "best.pth"] if number == 0 else []
        keep = folder / "previous.pth"
        save_checkpoint(state(number), folder / "checkpoint.pth", also=best, keep=keep)


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path, capsys, damage):
    save_three(tmp_path)
    newest = tmp_path / "checkpoint.pth"
    damage(newest)
    for set_aside in (False, True):
        path, content = find_checkpoint(tmp_path, set_aside)
        assert (path.name, content["number"]) == ("previous.pth", 1)
        assert warnings_of(capsys.readouterr().out, newest)
        assert newest.exists() is not set_aside
    assert (tmp_path / "checkpoint.pth.damaged").exists()
    output = Output(str(tmp_path))
    output.save(state(3))
    output.close()
    assert numbers(tmp_path) == {"checkpoint.pth": 3, "previous.pth": 1, "best.pth": 0}


def test_damaged_ones_are_never_deleted(tmp_path):
    save_three(tmp_path)
    for path in tmp_path.glob("*.pth"):
        flip(path)
    assert find_checkpoint(tmp_path, set_aside=True) is None
    names = {"checkpoint.pth.damaged", "previous.pth.damaged", "best.pth.damaged"}
    assert {path.name for path in tmp_path.iterdir()} == names


def test_a_file_that_lost_its_end_on_the_disk_is_not_used(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pth"
    save_checkpoint(state(0), path)
    monkeypatch.setattr(os, "fsync", lambda file: os.ftruncate(file, 600))
    with pytest.raises(OutputError, match=re.escape(str(path))):
        save_checkpoint(state(1), path, also=[tmp_path / "best.pth"])
    assert numbers(tmp_path) == {"checkpoint.pth": 0}
    assert not temporaries(tmp_path)


@pytest.mark.parametrize("links", [True, False])
def test_files_are_on_the_disk_before_they_get_their_names(tmp_path, monkeypatch, links):
    calls, fsync, replace = [], os.fsync, os.replace

    def name_of(file):
        name = Path(os.readlink(f"/proc/self/fd/{file}")).name
        return re.sub(r"-\w+\.tmp", "", name)

    save_three(tmp_path)
    monkeypatch.setattr(os, "fsync", lambda f: (calls.append(f"sync {name_of(f)}"), fsync(f)))
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append(f"name {b.name}"), replace(a, b)))
    if not links:
        monkeypatch.setattr(os, "link", partial(fail, errno.EPERM))
    best, previous = tmp_path / "best.pth", tmp_path / "previous.pth"
    save_checkpoint(state(3), tmp_path / "checkpoint.pth", also=[best], keep=previous)
    assert numbers(tmp_path) == {"checkpoint.pth": 3, "previous.pth": 2, "best.pth": 3}
    names = ["name best.pth", "name previous.pth", "name checkpoint.pth"]
    if not links:  # each copy is on the disk before it gets its name
        names = ["sync .best.pth", names[0], "sync .previous.pth", *names[1:]]
    assert calls == ["sync .checkpoint.pth", *names, f"sync {tmp_path.name}"]


def test_a_file_system_that_cannot_sync_folders(tmp_path, monkeypatch):
    fsync = os.fsync

    def sync_files(file):
        return fail(errno.EINVAL) if stat.S_ISDIR(os.fstat(file).st_mode) else fsync(file)

    monkeypatch.setattr(os, "fsync", sync_files)
    save_checkpoint(state(0), tmp_path / "checkpoint.pth")
    assert numbers(tmp_path) == {"checkpoint.pth": 0}


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
    Output(str(tmp_path)).close()
    assert f"process {holder} on {socket.gethostname()}" in capsys.readouterr().out
    Output(str(tmp_path)).close()
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
    Output(str(tmp_path)).close()
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
    output = Output(str(tmp_path))
    output.save(state(1))
    output.wait()
    assert numbers(tmp_path) == {"checkpoint.pth": 1, "previous.pth": 0}
    output.save(state(2))
    output.close()
    assert numbers(tmp_path) == {"checkpoint.pth": 2, "previous.pth": 1}
    assert number_in(tmp_path / "elsewhere" / "old.pth") == 0


def test_a_folder_in_the_place_of_a_checkpoint_is_named(tmp_path, capsys):
    save_checkpoint(state(0), tmp_path / "checkpoint.pth")
    previous = tmp_path / "previous.pth"
    previous.mkdir()
    output = Output(str(tmp_path))
    output.save(state(1))
    output.wait()
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
        output.save(state(epoch))
        output.wait()
    assert warnings_of(capsys.readouterr().out, folder / "checkpoint.pth")
    folder.mkdir()
    output.close()
    assert numbers(folder) == {"checkpoint.pth": 1}
    assert [line["epoch"] for line in read_log(folder)] == [0, 1]
