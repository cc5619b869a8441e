"""Processes of the fork server are as ordinary ones, bit by bit."""

import os
import select
import signal
import subprocess
import sys

import pytest
from conftest import (
    ROOT,
    clean_env,
    run_python,
    same_log,
    same_state,
    start_python,
    write_images,
)
from forking import Forked, can_fork

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Linux forks with PyTorch loaded")

STATE = """
import atexit, os, signal, sys, threading
print(__name__, __file__, sys.argv, sys.orig_argv[1:], sys.path, os.getcwd(), os.getppid())
print(sorted(os.environ.items()), os.popen("echo $RANK $PATH").read())
print([str(signal.getsignal(n)) for n in signal.valid_signals()], signal.pthread_sigmask(0, []))
print(sys.stdin.read(), sys.stdout.isatty(), sys.stdout.encoding, sys.stdout.line_buffering)
print(sorted(os.listdir("/proc/self/fd"), key=int)[:3], os.umask(0), os.getpgrp(), os.getsid(0))
print(len(os.listdir("/proc/self/task")), __import__("resource").getrlimit(7))
print("an error", file=sys.stderr)
threading.Timer(0.05, print, ["a thread's"]).start()
atexit.register(print, "at the end", end="")
"""
ENDINGS = {
    "by itself": "print(1)",
    "exit": "import sys; print(1); sys.exit(3)",
    "exit with a message": "import sys; sys.exit('what is wrong')",
    "error": "print(1)\nraise ValueError('x')",
    "at once": "import os; print(1); os._exit(7)",
    "interrupt": "import os, signal; os.kill(os.getpid(), signal.SIGINT)",
    "terminated": "import os, signal; os.kill(os.getpid(), signal.SIGTERM)",
    "killed": "import os, signal; print(1, flush=True); os.kill(os.getpid(), signal.SIGKILL)",
    "broken pipe": "import os; os.close(1); os.write(2, b'closed'); print(1)",
}


def both(*words, **env):
    """Status, output and errors of an ordinary process, and of one of the fork server."""
    results = []
    for kind in (subprocess.Popen, Forked):
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        command = [sys.executable, *map(str, words)]
        with kind(command, cwd="/", env=clean_env(**env), text=True, **pipes) as process:
            output, errors = process.communicate("told", timeout=60)
        results.append((process.returncode, output, errors))
    return results


def test_all_that_a_process_has_is_as_usual(tmp_path, monkeypatch):
    script = tmp_path / "script.py"
    script.write_text("print(1)")
    assert run_python(script).stdout == "1\n"  # the server has begun: it knows this variable
    monkeypatch.delenv("HOME")
    script.write_text(STATE)
    ordinary, forked = both(script, "--flag", "a b", RANK="3")
    assert ordinary == forked
    assert ordinary[0] == 0 and f"{os.getpid()}\n" in ordinary[1] and "('RANK', '3')" in ordinary[1]


def test_modules_run_as_usual():
    ordinary, forked = both("-m", "json.tool", "--help")
    assert ordinary == forked
    assert ordinary[0] == 0 and "-m json.tool" in ordinary[1]


@pytest.mark.parametrize("code", ENDINGS.values(), ids=ENDINGS)
def test_endings(tmp_path, code):
    script = tmp_path / "script.py"
    script.write_text(code)
    ordinary, forked = both(script)
    assert forked[:2] == ordinary[:2]
    assert forked[2].splitlines()[-1:] == ordinary[2].splitlines()[-1:]  # traces differ


@pytest.fixture
def three(tmp_path):
    """Processes that wait to be ended."""
    script = tmp_path / "script.py"
    script.write_text("import time\nprint('ready', flush=True)\nwhile True: time.sleep(0.01)")
    processes = [start_python(script) for _ in range(3)]
    yield processes
    for process in processes:
        process.kill()
        process.communicate(timeout=20)


def test_a_process_is_signalled_and_others_live(three, tmp_path):
    for process in three:
        assert isinstance(process, Forked)
        assert process.stdout.readline() == "ready\n"
    first, second, third = three
    with pytest.raises(subprocess.TimeoutExpired):
        first.communicate(timeout=0.01)
    first.kill()
    second.send_signal(signal.SIGSTOP)
    second.terminate()
    assert first.wait(20) == -signal.SIGKILL
    assert third.poll() is None
    second.send_signal(signal.SIGCONT)
    third.send_signal(signal.SIGUSR1)
    assert (second.wait(20), third.wait(20)) == (-signal.SIGTERM, -signal.SIGUSR1)
    (tmp_path / "script.py").write_text("print('alive')")
    assert run_python(tmp_path / "script.py").stdout == "alive\n"


def test_random_numbers_are_new(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import random, numpy as np, torch\n"
        "print(random.random(), np.random.rand(), torch.rand(1).item())"
    )
    first, second = (run_python(script).stdout.split() for _ in range(2))
    assert len(first) == 3 and not {*first} & {*second}


def test_nothing_is_begun_before_the_fork(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys\n"
        "print('torch' in sys.modules, len(os.listdir('/proc/self/task')))\n"
        "import torch\n"
        "print(torch.cuda.is_initialized(), torch.cuda._is_in_bad_fork(), torch.get_num_threads())"
    )
    assert run_python(script).stdout == "True 1\nFalse False 1\n"
    assert len(os.listdir(f"/proc/{Forked.server.process.pid}/task")) == 1


def test_training_is_the_same_to_the_last_bit(tmp_path):
    images = write_images(tmp_path / "images", train=12, val=5)
    words = ["main.py", "--model", "convit_tiny", "--data-path", images, "--input-size", 32]
    words += [
        "--batch-size",
        4,
        "--num_workers",
        1,
        "--epochs",
        1,
        "--device",
        "cpu",
        "--output_dir",
    ]
    forked = start_python(*words, tmp_path / "forked")
    ordinary = subprocess.run(
        [sys.executable, *map(str, words), tmp_path / "ordinary"],
        cwd=ROOT,
        env=clean_env(),
        capture_output=True,
        text=True,
    )
    forked.communicate(timeout=100)
    assert isinstance(forked, Forked)
    assert (forked.returncode, ordinary.returncode) == (0, 0), ordinary.stderr
    assert same_log(tmp_path / "forked", tmp_path / "ordinary")
    assert same_state(tmp_path / "forked", tmp_path / "ordinary")


def test_what_is_not_forked():
    for words in (["-c", "1"], ["-W", "error", "main.py"], ["-m", "pytest"]):
        assert not can_fork(words)
    with start_python("main.py", "--help", OMP_NUM_THREADS="2") as process:
        assert not isinstance(process, Forked)
        process.kill()


# a server that has nothing to import, of a process that tells who is there and ends so
TESTER = """
import os, signal, sys
import forking
forking.__file__ = sys.argv[1]
script = [sys.executable, sys.argv[2]]
quiet = {{"stdin": -3, "stdout": -3}}
child = forking.Forked(script, cwd=".", env=dict(os.environ), **quiet)
print(child.pid, forking.Forked.server.process.pid, flush=True)
input()
{}
"""


@pytest.mark.parametrize(
    "end",
    ["child.kill(); child.wait()", "os.kill(os.getpid(), signal.SIGKILL)"],
    ids=["end", "kill"],
)
def test_the_server_ends_with_its_tests(tmp_path, end):
    files = [tmp_path / name for name in ("tester.py", "server.py", "child.py")]
    codes = (
        TESTER.format(end),
        "import forking; forking.run(forking.serve())",
        "import signal; signal.pause()",
    )
    for file, code in zip(files, codes, strict=True):
        file.write_text(code)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    env = clean_env(PYTHONPATH=str(ROOT / "tests"))
    with subprocess.Popen([sys.executable, *files], env=env, **pipes) as tester:
        pids = [int(pid) for pid in tester.stdout.readline().split()]
        descriptors = [os.pidfd_open(pid) for pid in pids]
        tester.communicate(b"\n", timeout=60)
    assert tester.returncode == (-signal.SIGKILL if "getpid" in end else 0)
    child, server = descriptors
    assert select.select([server], [], [], 20)[0]
    if "getpid" in end:  # a process whose parent is killed goes on, as any other
        assert not select.select([child], [], [], 0)[0]
        os.kill(pids[0], signal.SIGKILL)
    assert select.select([child], [], [], 20)[0]
    for descriptor in descriptors:
        os.close(descriptor)
