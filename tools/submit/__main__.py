"""Submit a training run to a Slurm cluster.

``python -m tools.submit --nodes 2 --ngpus 8 -- --model NAME ...``: flags after ``--`` are those of
``main.py``. Every process is a Slurm task with its own logs. Before the job's time is up
(``--signal-delay``) the run saves, stops and is requeued, and then resumes by ``--resume auto``.
Needs submitit (``pip install submitit``).
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

SHARED = {  # flags of sbatch
    "partition": "partition to submit to",
    "constraint": "features that machines must have",
    "account": "account to charge",
    "qos": "quality of service",
    "comment": "comment of the job",
    "exclude": "machines not to use",
}


def get_parser() -> argparse.ArgumentParser:
    """Return the parser of the flags before ``--``."""
    parser = Parser(
        "python -m tools.submit",
        description=__doc__.splitlines()[0],
        usage="%(prog)s [options] -- FLAGS OF main.py",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--nodes", type=int, default=1, metavar="N", help="number of machines")
    processes = "processes per machine, with one GPU each"
    add("--ngpus", type=int, default=8, metavar="N", help=processes)
    add("--timeout", type=int, default=2800, metavar="MINUTES", help="time limit of a job")
    requeues = "maximum number of requeues after a time limit"
    add("--max-timeouts", type=int, default=100, metavar="N", help=requeues)
    delay = "time before the limit at which the run saves and stops"
    add("--signal-delay", type=int, default=120, metavar="SECONDS", help=delay)
    folder = "folder for logs and checkpoints; %%j: the job's number"
    add("--job-dir", default="output/%j", metavar="FOLDER", help=folder)
    add("--name", default="main", help="name of the job")
    cores = "CPU cores per process; default: the cluster's"
    add("--cpus-per-task", type=int, metavar="N", help=cores)
    memory = "memory per machine; default: the cluster's"
    add("--mem", type=float, metavar="GB", help=memory)
    for name, what in SHARED.items():
        add(f"--{name}", help=f"{what}, as for sbatch")
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
