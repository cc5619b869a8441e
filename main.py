"""Train and evaluate image classifiers; ``python main.py --help`` lists the flags."""

import contextlib
import sys
from argparse import Namespace

import torch
import torch.distributed as dist

import models
import utils
from training import agreement, launch, schedules
from training.checkpoints import read_resume, was_restarted
from training.existing_run import check_resumed, treatment
from training.flags import parse_args
from training.job import Job, build_job
from training.launch import DistInfo
from training.network import with_amp_dtype
from training.output import Output
from training.run_state import RunState
from training.tracking import Tracking
from training.trainer import Trainer, example_images
from utils import log


def run(args: Namespace, given: set[str], info: DistInfo, device: torch.device) -> int:
    """Build what evaluation and training share, then do either; return the exit status."""
    found = "found" if device.type == "cuda" else "not found"
    why = "" if args.device else f" (CUDA {found})"
    log(f"device {device}{why}, {info.world_size} process(es) started by {info.launcher}")
    group = utils.control_group(args.dist_timeout)
    agreement.agree(agreement.start_facts(args, device), group)
    folder = "" if args.eval else args.output_dir  # evaluation locks and writes nothing there
    existing = treatment(args, "overwrite" in given, was_restarted(info, group))
    with contextlib.closing(
        utils.all_or_none(lambda: Output(folder, args.keep_checkpoints, existing), group)
    ) as output:
        resumed = read_resume(args, info, group)
        args = with_amp_dtype(args, device, {} if args.eval else resumed[1])
        if folder:
            utils.all_or_none(lambda: check_resumed(args, resumed[1]), group)
        job = utils.all_or_none(
            lambda: build_job(args, given, *resumed, info, device, group), group
        )
        agreement.agree(job.facts, group)
        if args.eval:
            return evaluate(job)
        return train(job, bool(resumed[1]), info, output, group)


def evaluate(job: Job) -> int:
    """Evaluate the weights of a source and their moving average; return the exit status."""
    source, network = job.source, job.network
    for weights in source.weights():
        report = source.load(network.model, weights)
        if weights == "model":
            log(str(report or source.label))
        model = models.fused(network.model, network.name) if job.args.fuse else network.model
        job.evaluation(model, "EMA " if weights == "ema" else "")
    return 0


def train(
    job: Job, resumes: bool, info: DistInfo, output: Output, group: dist.ProcessGroup | None
) -> int:
    """Train, resuming a run or from the weights of a source; return the exit status."""
    args, batches = job.args, job.batches
    train_set = batches.loader.dataset
    continues = resumes and {"optimizer", "epoch"} <= job.source.checkpoint.keys()
    rates = schedules.learning_rates(
        args, info.world_size, job.source.checkpoint if continues else None
    )
    global_batch = args.batch_size * args.accum_iter * info.world_size
    share = "" if args.sampling_ratio == 1 else f" ({args.sampling_ratio:g} of the set)"
    schedules.describe(args, rates, global_batch)
    log(f"training on {len(train_set)} images{share}")
    updates = -(-len(batches) // args.accum_iter)
    state = RunState(
        *(args, job.network, rates, updates),
        *(batches.sampler, info, group, train_set.classes),
    )
    utils.all_or_none(lambda: state.start(job.source, resumes), group)
    utils.all_or_none(lambda: output.begin(args, state.epoch + 1, job.data_record()), group)
    continues = resumes or bool(args.resume)  # or was stopped before there was a checkpoint
    with utils.all_or_none(lambda: Tracking(args, output, continues), group) as tracking:
        if state.epoch < 0 and not state.meter.steps:
            output.add_images(
                "train/images", example_images(batches, len(train_set), job.network.images)
            )
        criterion = job.criterion.to(batches.device)
        parts = (job.evaluation, job.mixup_fn, criterion, job.batches_at, tracking)
        return Trainer(state, output, batches, *parts).train()


def start(argv: list[str]) -> int:
    """Parse the flags, join the process group and run; return the exit status."""
    args, given = parse_args(argv)
    with launch.process_group(args) as (info, device):
        return run(args, given, info, device)


def main(argv: list[str]) -> int:
    """Run the command line ``argv``; return the exit status."""
    return launch.run_program(lambda: start(argv), launch.RESUMES)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
