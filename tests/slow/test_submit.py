"""``python -m tools.submit``: what Slurm is given, and runs that are preempted and resumed."""

import os
import pickle
import re
import signal
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
from conftest import ROOT, clean_env, read_log, run_python, run_ranks, same_run

from tools.submit.__main__ import flags_of_run, get_parser, main, submit
from utils import UserError

submitit = pytest.importorskip("submitit", reason="pip install submitit")

from tools.submit import job  # noqa: E402

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
def whole(images, tmp_path_factory):
    """The folder of a run of two ranks that was never interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    run_ranks(2, [*RUN, "--data-path", images, "--output_dir", folder])
    return folder


def lines_of(script):
    return dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(.*))?$", script, re.MULTILINE))


def batch(folder, path, restarts):
    job = {"SLURM_JOB_ID": JOB, "SLURM_NTASKS": "2", "SLURM_JOB_NUM_NODES": "2"}
    job |= {"SLURM_JOB_NODELIST": "localhost", "SLURM_RESTART_COUNT": restarts}
    return subprocess.Popen(
        ["bash", folder / "batch.sh"],
        cwd=ROOT,
        env=clean_env(PATH=path, **job),
        stdout=subprocess.PIPE,
        text=True,
    )


def test_a_job_is_preempted_requeued_and_resumed(
    slurm, images, whole, tmp_path, capsys, monkeypatch
):
    options = ["--nodes", 2, "--ngpus", 1, "--timeout", 600, "--partition", "big gpus"]
    options += ["--constraint", "a100|h100", "--cpus-per-task", 5, "--mem", 64, "--comment", "x"]
    options += ["--job-dir", tmp_path / "jobs" / "%j", "--signal-delay", 200]
    words = [*options, "--", *RUN, "--data-path", images]
    with monkeypatch.context() as patch:
        patch.setattr(os, "environ", clean_env(PATH=slurm))
        assert main([str(word) for word in words]) == 0
    folder = tmp_path / "jobs" / JOB
    printed = f"job {JOB}: {folder}/{JOB}_0_log.out and {JOB}_0_log.err\n"
    assert capsys.readouterr().out == printed
    given = lines_of((tmp_path / "batch.sh").read_text())
    expected = {"signal": "USR2@200", "nodes": "2", "ntasks-per-node": "1", "time": "600"}
    expected |= {"partition": "'big gpus'", "constraint": "'a100|h100'", "cpus-per-task": "5"}
    expected |= {"mem": "65536M", "comment": "x", "requeue": "", "job-name": "main"}
    assert given | expected == given
    assert not {"gpus-per-node", "account", "qos", "exclude"} & given.keys()  # --device cpu

    output = ""
    with batch(tmp_path, slurm, "0") as job:
        for line in job.stdout:
            output += line
            if line.startswith("epoch 0 step 2/"):
                (srun,) = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
                os.kill(int(srun), signal.SIGUSR2)
    assert "2 process(es)" in output
    assert re.search(r"SIGUSR1 in epoch 0 after step \d", output)
    assert job.returncode == 255  # of the first task, as submitit ends it
    assert (tmp_path / "scontrol.txt").read_text() == f"requeue {JOB}\n"
    assert not (folder / "log.txt").exists()  # the epoch has not ended

    # Slurm starts it again
    with batch(tmp_path, slurm, "1") as job:
        output, _ = job.communicate(timeout=200)
    assert job.returncode == 0
    assert re.search(r"\bin epoch 0 after step \d+", output)
    assert (tmp_path / "scontrol.txt").read_text() == f"requeue {JOB}\n"
    assert same_run(folder, whole)
    for rank in range(2):
        content = pickle.loads((folder / f"{JOB}_{rank}_result.pkl").read_bytes())
        assert content == ("success", None)


def test_two_local_tasks_form_one_run(images, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "environ", clean_env())
    monkeypatch.chdir(ROOT)
    words = ["--local", "--ngpus", "2", "--job-dir", str(tmp_path / "%j")]
    flags = [*RUN, "--data-path", images]
    job = submit(get_parser().parse_args(words), [str(flag) for flag in flags])
    assert job.results() == [None, None], job.stderr()
    folder = tmp_path / job.job_id
    assert "2 process(es)" in job.stdout()
    assert [line["epoch"] for line in read_log(folder)] == [0]
    assert same_run(folder, whole)


MAIN = """
import os, sys
print(sys.argv[1:], *(os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")))
print(os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"], flush=True)
sys.exit(3)
"""


def test_a_task_runs_main_as_its_rank_and_reports_its_status(tmp_path, monkeypatch, capfd):
    (tmp_path / "main.py").write_text(MAIN)
    monkeypatch.setattr(job, "ROOT", tmp_path)
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "slurm")
    slurm = {"JOB_ID": JOB, "NTASKS": "4", "JOB_NUM_NODES": "2", "JOB_NODELIST": "n[3-4]"}
    slurm |= {"PROCID": "3", "LOCALID": "1", "NODEID": "1"}
    for name, value in slurm.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setattr(submitit.slurm.slurm.SlurmJobEnvironment, "hostnames", ["n3", "n4"])
    with pytest.raises(UserError, match=r"main\.py.*\b3\b"):
        job.Job(["--output_dir", "/jobs/%j"])()
    assert capfd.readouterr().out.split("\n") == [
        f"['--output_dir', '/jobs/{JOB}'] 3 4 1",
        f"n3 {20000 + int(JOB)}",
        "",
    ]


def test_flags_of_the_run():
    options = Namespace(job_dir="/jobs/%j")
    assert flags_of_run(options, ["--model", "m"]) == (
        ["--output_dir", "/jobs/%j", "--model", "m", "--resume", "auto"],
        True,
    )
    mine = ["--output_dir", "/mine", "--resume", "weights.pth", "--device", "cpu"]
    assert flags_of_run(options, mine) == (["--output_dir", "/jobs/%j", *mine], False)


@pytest.mark.parametrize(
    ("flags", "status", "names"),
    [
        (["--partition", "p", "--", *RUN], 1, "srun.*--local"),
        (["--local", "--nodes", 2, "--", *RUN], 1, "node"),
        (["--", "--epochs", 0], 1, "--epochs 0"),
        (["--", "--no-such-flag"], 2, "main.py: .*--no-such-flag"),
        (["--model", "m"], 2, r"tools.submit: .*--model\b"),
    ],
)
def test_what_cannot_be_submitted_is_an_error(flags, status, names, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    try:
        found = main(["--job-dir", str(tmp_path), *map(str, flags)])
    except SystemExit as usage:
        found = usage.code
    assert found == status
    errors = capsys.readouterr().err
    assert re.search(names, errors) and (status == 2 or errors.count("\n") == 1), errors


def test_submitit_is_asked_for(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "submitit", None)
    assert main(["--local"]) == 1
    assert "submitit" in capsys.readouterr().err


def test_tasks_import_only_what_they_need():
    done = run_python("-c", "import sys, tools.submit.job; print('torch' in sys.modules)")
    assert (done.returncode, done.stdout) == (0, "False\n"), done.stderr
