"""Submit a run to Slurm: ``python -m tools.submit --nodes 2 --ngpus 8 -- --model NAME ...``.

Flags after ``--`` are those of ``main.py``. Every process is a Slurm task with its own logs. Before
the job's time is up (``--signal-delay``) the run saves, stops and is requeued, and then resumes by
``--resume auto``. Needs submitit (``pip install submitit``).
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tools import cli
from training.flags import parse_args
from training.parser import Parser
from utils import UserError

SHARED = ("partition", "constraint", "account", "qos", "comment", "exclude")


def get_parser() -> argparse.ArgumentParser:
    """Return the parser of the flags before ``--``."""
    parser = Parser(
        "python -m tools.submit",
        description=__doc__.partition("\n")[0],
        usage="%(prog)s [options] -- FLAGS OF main.py",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--nodes", type=int, default=1, help="number of machines")
    add("--ngpus", type=int, default=8, help="processes per machine, with one GPU each")
    add("--timeout", type=int, default=2800, metavar="MINUTES", help="time limit of a job")
    add("--max-timeouts", type=int, default=100, metavar="N", help="maximum number of requeues")
    add("--signal-delay", type=int, default=120, metavar="SECONDS", help="time to save, at the end")
    add("--job-dir", default="output/%j", help="logs and checkpoints; %%j: the job's number")
    add("--name", default="main", help="name of the job")
    add("--cpus-per-task", type=int, help="CPU cores per process")
    add("--mem", type=float, metavar="GB", help="memory per machine")
    for name in SHARED:
        add(f"--{name}", help=f"sbatch --{name}")
    add("--local", action="store_true", help="run on this machine, without Slurm")
    return parser


def flags_of_run(options: argparse.Namespace, argv: Sequence[str]) -> tuple[list[str], bool]:
    """Return the flags of ``main.py`` for the job, and True if it uses GPUs.

    Without ``--output_dir`` a run is saved in ``--job-dir``; without ``--resume`` it resumes from
    there.
    """
    flags = ["--output_dir", str(Path(options.job_dir).absolute()), *argv]
    args, _ = parse_args(flags)
    if not args.resume:
        flags += ["--resume", "auto"]
        parse_args(flags)  # which excludes other flags
    return flags, args.device != "cpu"


def submit(options: argparse.Namespace, argv: Sequence[str]) -> Any:
    """Submit ``main.py`` with the flags ``argv``; return submitit's job."""
    try:
        import submitit

        from tools.submit.job import Job
    except ImportError as error:
        raise UserError("submitit is not installed: pip install submitit") from error
    flags, uses_gpus = flags_of_run(options, argv)
    gpus = options.ngpus if uses_gpus else 0
    common = {"nodes": options.nodes, "signal_delay_s": options.signal_delay}
    try:
        if options.local:
            executor = submitit.LocalExecutor(options.job_dir, options.max_timeouts)
            executor.update_parameters(
                **common,
                tasks_per_node=options.ngpus,
                gpus_per_node=gpus,
                timeout_min=options.timeout,
            )
        else:
            executor = submitit.SlurmExecutor(options.job_dir, options.max_timeouts)
            executor.update_parameters(
                **common,
                job_name=options.name,
                ntasks_per_node=options.ngpus,
                gpus_per_node=gpus or None,
                time=options.timeout,
                mem=options.mem and f"{options.mem * 1024:.0f}M",
                additional_parameters={"requeue": True},
                **{name: getattr(options, name) for name in (*SHARED, "cpus_per_task")},
            )
        return executor.submit(Job(flags))
    except (RuntimeError, ValueError, OSError, submitit.core.utils.FailedJobError) as error:
        hint = "" if options.local else "; --local runs on this machine, without Slurm"
        raise UserError(f"{error}{hint}") from error


@cli.program
def main(argv: list[str]) -> None:
    """Run with the flags ``argv``."""
    split = argv.index("--") if "--" in argv else len(argv)
    job = submit(get_parser().parse_args(argv[:split]), argv[split + 1 :])
    print(f"job {job.job_id}: {job.paths.stdout} and {job.paths.stderr.name}", flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
