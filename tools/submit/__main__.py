"""Submit a run to Slurm: ``python -m tools.submit --nodes 2 --ngpus 8 -- --model NAME ...``.

What follows ``--`` are the flags of ``main.py``. Every process is a task of Slurm's, with logs of
its own. Before the job's time is up (``--signal-delay``) the run saves, stops and is queued again,
and then goes on by ``--resume auto``. Needs submitit (``pip install submitit``).
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from training import launch
from training.flags import parse_args
from utils import UserError

SHARED = ("partition", "constraint", "account", "qos", "comment", "exclude")


def get_parser() -> argparse.ArgumentParser:
    """The parser of the flags before ``--``."""
    parser = argparse.ArgumentParser(
        "python -m tools.submit",
        description=__doc__.partition("\n")[0],
        usage="%(prog)s [options] -- FLAGS OF main.py",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--nodes", type=int, default=1, help="machines")
    add("--ngpus", type=int, default=8, help="processes of a machine, with a GPU each")
    add("--timeout", type=int, default=2800, metavar="MINUTES", help="of one start of the job")
    add("--max-timeouts", type=int, default=100, metavar="N", help="starts after a timeout")
    add("--signal-delay", type=int, default=120, metavar="SECONDS", help="to save in, at the end")
    add("--job-dir", default="output/%j", help="of logs and checkpoints; %%j is the job's number")
    add("--name", default="main", help="of the job")
    add("--cpus-per-task", type=int, help="cores of a process")
    add("--mem", type=float, metavar="GB", help="memory of a machine")
    for name in SHARED:
        add(f"--{name}", help=f"sbatch --{name}")
    add("--local", action="store_true", help="run on this machine, without Slurm")
    return parser


def flags_of_run(options: argparse.Namespace, argv: Sequence[str]) -> tuple[list[str], bool]:
    """The flags of ``main.py`` as the job gets them, and whether it uses GPUs.

    Without ``--output_dir`` a run is saved in ``--job-dir``; without ``--resume`` it goes on from
    what is saved.

    Raises:
        UserError: They contradict each other.
    """
    flags = ["--output_dir", str(Path(options.job_dir).absolute()), *argv]
    args, _ = parse_args(flags)
    return flags if args.resume else [*flags, "--resume", "auto"], args.device != "cpu"


def submit(options: argparse.Namespace, argv: Sequence[str]) -> Any:
    """Submit ``main.py`` with the flags ``argv``; returns submitit's job.

    Raises:
        UserError: submitit or Slurm is missing, or does not take the job.
    """
    try:
        import submitit

        from tools.submit.job import Job
    except ImportError as error:
        raise UserError("submitit is not installed: pip install submitit") from error
    flags, uses_gpus = flags_of_run(options, argv)
    gpus = options.ngpus if uses_gpus else 0
    try:
        if options.local:
            executor = submitit.LocalExecutor(options.job_dir, options.max_timeouts)
            executor.update_parameters(
                nodes=options.nodes,
                tasks_per_node=options.ngpus,
                gpus_per_node=gpus,
                timeout_min=options.timeout,
                signal_delay_s=options.signal_delay,
            )
        else:
            executor = submitit.SlurmExecutor(options.job_dir, options.max_timeouts)
            given = {name: getattr(options, name) for name in (*SHARED, "cpus_per_task")}
            executor.update_parameters(
                job_name=options.name,
                nodes=options.nodes,
                ntasks_per_node=options.ngpus,
                gpus_per_node=gpus or None,
                time=options.timeout,
                signal_delay_s=options.signal_delay,
                mem=options.mem and f"{options.mem * 1024:.0f}M",
                additional_parameters={"requeue": True},
                **given,
            )
        return executor.submit(Job(flags))
    except (RuntimeError, ValueError, OSError, submitit.core.utils.FailedJobError) as error:
        hint = "" if options.local else "; --local runs on this machine, without Slurm"
        raise UserError(f"{launch.last_message(error)}{hint}") from error


def main(words: Sequence[str]) -> int:
    """Submit, and say where the logs are; the exit status."""
    parser = get_parser()
    words = list(words)
    split = words.index("--") if "--" in words else len(words)
    options = parser.parse_args(words[:split])
    job = submit(options, words[split + 1 :])
    print(f"job {job.job_id}: {job.paths.stdout} and {job.paths.stderr.name}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(launch.run_program(lambda: main(sys.argv[1:])))
