"""``python -m tools.submit``: what Slurm is given, and runs that are preempted and go on."""

import os
import pickle
import re
import signal
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
from conftest import (
    ROOT,
    clean_env,
    read_log,
    run_python,
    same_log,
    same_state,
    together,
    write_images,
)

pytest.importorskip("submitit", reason="pip install submitit")

RUN = ["--model", "test_vit", "--input-size", 32, "--batch-size", 2, "--num_workers", 1]
RUN += ["--epochs", 1, "--log-interval", 1, "--device", "cpu", "--no-repeated-aug"]
JOB = "4242"

# Slurm's part: tasks with their places and logs (what the first one prints is shown, too); a signal
# goes to all processes of the step
SRUN = f"""#!{sys.executable}
import os, signal, subprocess, sys
words, files = sys.argv[1:], {{}}
while words[0].startswith("--"):
    name = words.pop(0)
    if name in ("--output", "--error"):
        files[name] = words.pop(0)
job, tasks = os.environ["SLURM_JOB_ID"], []
for rank in range(int(os.environ["SLURM_NTASKS"])):
    place = {{"SLURM_PROCID": str(rank), "SLURM_NODEID": str(rank), "SLURM_LOCALID": "0"}}
    logs = [
        open(files[name].replace("%j", job).replace("%t", str(rank)), "a")
        for name in ("--output", "--error")
    ]
    out = logs[0] if rank else None
    options = {{"stdout": out, "stderr": logs[1], "start_new_session": True}}
    tasks.append(subprocess.Popen(words, env=os.environ | place, **options))
signal.signal(signal.SIGUSR2, lambda *_: [os.killpg(t.pid, signal.SIGUSR2) for t in tasks])
sys.exit(max(task.wait() & 255 for task in tasks))
"""


@pytest.fixture
def slurm(tmp_path):
    """A PATH with what stands for Slurm's programs, which write down what they are told."""
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "srun").write_text(SRUN)
    (programs / "sbatch").write_text(
        f'#!/bin/sh\ncp "$1" {tmp_path}/batch.sh\necho "Submitted batch job {JOB}"\n'
    )
    (programs / "scontrol").write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/scontrol.txt\n')
    for program in programs.iterdir():
        program.chmod(0o755)
    return f"{programs}:{os.environ['PATH']}"


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("data") / "images", train=12, val=3)


@pytest.fixture(scope="module")
def whole(images, tmp_path_factory):
    """The folder of a run of two ranks that was never interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    codes, _, errors = together(2, [*RUN, "--data-path", images, "--output_dir", folder])
    assert codes == [0, 0], errors
    return folder


def lines_of(script):
    return dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(.*))?$", script, re.MULTILINE))


def batch(folder, path, restarts):
    """Slurm starts the batch script."""
    job = {"SLURM_JOB_ID": JOB, "SLURM_NTASKS": "2", "SLURM_JOB_NUM_NODES": "2"}
    job |= {"SLURM_JOB_NODELIST": "localhost", "SLURM_RESTART_COUNT": restarts}
    return subprocess.Popen(
        ["bash", folder / "batch.sh"],
        cwd=ROOT,
        env=clean_env(PATH=path, **job),
        stdout=subprocess.PIPE,
        text=True,
    )


def test_a_job_is_preempted_queued_again_and_goes_on(slurm, images, whole, tmp_path):
    options = ["--nodes", 2, "--ngpus", 1, "--timeout", 600, "--partition", "big gpus"]
    options += ["--constraint", "a100|h100", "--cpus-per-task", 5, "--mem", 64, "--comment", "x"]
    options += ["--job-dir", tmp_path / "jobs" / "%j", "--signal-delay", 200]
    words = ["-m", "tools.submit", *options, "--", *RUN, "--data-path", images]
    done = run_python(*words, PATH=slurm)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "jobs" / JOB
    assert done.stdout == f"job {JOB}: {folder}/{JOB}_0_log.out and {JOB}_0_log.err\n"
    given = lines_of((tmp_path / "batch.sh").read_text())
    assert given["signal"] == "USR2@200"
    assert (
        given
        | {
            "nodes": "2",
            "ntasks-per-node": "1",
            "time": "600",
            "partition": "'big gpus'",
            "constraint": "'a100|h100'",
            "cpus-per-task": "5",
            "mem": "65536M",
            "comment": "x",
            "requeue": "",
            "job-name": "main",
        }
        == given
    )
    assert not {"gpus-per-node", "account", "qos", "exclude"} & given.keys()  # --device cpu

    output = ""
    with batch(tmp_path, slurm, "0") as job:
        for line in job.stdout:
            output += line
            if line.startswith("epoch 0 step 2/"):
                (srun,) = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
                os.kill(int(srun), signal.SIGUSR2)
    assert "2 process(es)" in output
    assert "stopped by SIGUSR1 in epoch 0 after step" in output
    assert job.returncode == 255  # of the first task, as submitit ends it
    assert (tmp_path / "scontrol.txt").read_text() == f"requeue {JOB}\n"
    assert not (folder / "log.txt").exists()  # the epoch has not ended

    # Slurm starts it again
    with batch(tmp_path, slurm, "1") as job:
        output, _ = job.communicate(timeout=200)
    assert job.returncode == 0
    assert re.search(r"going on in epoch 0 after step [2-5]\b", output)
    assert (tmp_path / "scontrol.txt").read_text() == f"requeue {JOB}\n"
    assert same_log(folder, whole)
    assert same_state(folder, whole)
    for rank in range(2):
        content = pickle.loads((folder / f"{JOB}_{rank}_result.pkl").read_bytes())
        assert content == ("success", None)


def local(folder, *flags):
    """Submit to this machine, and wait: the job's results."""
    from tools.submit.__main__ import get_parser, submit

    options = get_parser().parse_args(["--local", "--ngpus", "2", "--job-dir", str(folder / "%j")])
    return submit(options, [str(flag) for flag in flags])


@pytest.fixture
def plain_env(monkeypatch):
    """What the tasks of this machine inherit."""
    for key in set(os.environ) - set(clean_env()):
        monkeypatch.delenv(key)
    for key, value in clean_env().items():
        monkeypatch.setenv(key, value)
    monkeypatch.chdir(ROOT)


def test_two_local_tasks_form_one_run(plain_env, images, whole, tmp_path):
    job = local(tmp_path, *RUN, "--data-path", images)
    assert job.results() == [None, None], job.stderr()
    folder = tmp_path / job.job_id
    assert "2 process(es)" in job.stdout()
    assert [line["epoch"] for line in read_log(folder)] == [0]
    assert same_log(folder, whole)
    assert same_state(folder, whole)


def test_an_error_of_the_run_is_the_jobs(plain_env, images, tmp_path):
    job = local(tmp_path, *RUN, "--data-path", images, "--batch-size", 1000)
    with pytest.raises(Exception, match=r"main\.py ended with status 1"):
        job.results()
    assert "--batch-size 1000 is larger than the training set" in job.stderr()


def test_flags_of_the_run():
    from tools.submit.__main__ import flags_of_run

    options = Namespace(job_dir="/jobs/%j")
    assert flags_of_run(options, ["--model", "m"]) == (
        ["--output_dir", "/jobs/%j", "--model", "m", "--resume", "auto"],
        True,
    )
    mine = ["--output_dir", "/mine", "--resume", "weights.pth", "--device", "cpu"]
    assert flags_of_run(options, mine) == (["--output_dir", "/jobs/%j", *mine], False)


@pytest.mark.parametrize(
    ("flags", "status", "message"),
    [
        (["--partition", "p", "--", *RUN], 1, 'error: Could not detect "srun".*; --local runs on'),
        (["--local", "--nodes", 2, "--", *RUN], 1, "error: LocalExecutor can use only one node"),
        (["--", "--epochs", 0], 1, "error: --epochs 0 must be positive"),
        (["--", "--no-such-flag"], 2, "main.py: error: unrecognized arguments: --no-such-flag"),
        (["--model", "m"], 2, "tools.submit: error: unrecognized arguments: --model m"),
    ],
)
def test_what_cannot_be_submitted_is_an_error(flags, status, message, tmp_path, capsys):
    from tools.submit import __main__ as command
    from training.launch import run_program

    words = ["--job-dir", str(tmp_path), *map(str, flags)]
    expected = (command.ConfigError, command.SubmitError)
    try:
        found = run_program(lambda: command.main(words), expected)
    except SystemExit as usage:
        found = usage.code
    assert found == status
    assert re.search(message, capsys.readouterr().err)


def test_submitit_is_asked_for(monkeypatch, capsys):
    from tools.submit import __main__ as command

    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(command.SubmitError, match="pip install submitit"):
        command.main(["--local"])
