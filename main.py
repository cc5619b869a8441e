"""Train and evaluate image classifiers; ``python main.py --help`` lists the flags."""

import contextlib
import sys
from argparse import Namespace
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from timm.data import Mixup
from torch import nn

import datasets
import engine
import utils
from models import ModelSource
from pipeline.prefetch import Prefetcher
from training import agreement, launch
from training.checkpoints import read_resume
from training.distillation import TeacherTargets, distill
from training.flags import parse_args
from training.launch import DistInfo
from training.network import (
    Network,
    build_network,
    choose_source,
    compare_classes,
    fused,
)
from training.output import Output
from training.run_state import RunState
from training.trainer import Evaluation, Trainer, example_images
from utils import log


class Job(NamedTuple):
    """What a rank has built from the flags, before any rank trains or evaluates."""

    args: Namespace  # with the input size
    source: ModelSource
    network: Network
    evaluation: Evaluation
    batches: Prefetcher | None  # of training; None for an evaluation
    mixup_fn: Mixup | TeacherTargets | None
    criterion: nn.Module | None
    facts: agreement.Facts  # that must be the same on all ranks


def run(args: Namespace, given: set[str], info: DistInfo, device: torch.device) -> int:
    """Build what evaluation and training share, then do either; return the exit status."""
    found = "found" if device.type == "cuda" else "not found"
    why = "" if args.device else f" (CUDA {found})"
    log(f"device {device}{why}, {info.world_size} process(es) started by {info.launcher}")
    group = utils.control_group(args.dist_timeout)
    agreement.agree(agreement.start_facts(args, device), group)
    folder = "" if args.eval else args.output_dir  # evaluation locks and writes nothing there
    with contextlib.closing(
        utils.all_or_none(lambda: Output(folder, args.keep_checkpoints), group)
    ) as output:
        resumed = read_resume(args, info, group)
        job = utils.all_or_none(lambda: build(args, given, *resumed, info, device, group), group)
        agreement.agree(job.facts, group)
        if args.eval:
            return evaluate(job)
        return train(job, bool(resumed[1]), info, output, group)


def build(
    args: Namespace,
    given: set[str],
    label: str,
    checkpoint: Mapping[str, Any],
    info: DistInfo,
    device: torch.device,
    group: dist.ProcessGroup | None,
) -> Job:
    """Build datasets, model and loss; no rank waits for another one here."""
    source = choose_source(args, given, label, checkpoint)
    weights = (source.data_config, source.label) if source.has_weights else ()
    images = datasets.choose_images(args, *weights)
    log(f"images: {images}")
    args = Namespace(**vars(args) | {"input_size": images.side})
    utils.seed_everything(args.seed)
    engine.set_determinism(args.deterministic)

    eval_set, num_classes = datasets.build_dataset(False, args, device, images)
    compare_classes(source, eval_set.classes, new_head=not args.eval and not checkpoint)
    part = (info.world_size, info.rank) if args.dist_eval else (1, 0)
    eval_loader = datasets.build_eval_loader(eval_set, args, *part)
    network = build_network(args, given, source, images, num_classes, device)
    precision = network.precision
    placement = (device, torch.float32, precision.memory_format)
    eval_batches = datasets.build_prefetcher(eval_loader, *placement)
    evaluation = Evaluation(args, eval_batches, len(eval_set), precision, group)
    facts = agreement.model_facts(source, network) | agreement.image_facts("validation", eval_set)
    if args.eval:
        return Job(args, source, network, evaluation, None, None, None, facts)

    train_set, trained = datasets.build_dataset(True, args, device, images)
    if trained != num_classes:
        raise datasets.DataError(
            f"the training set has {trained} classes, the validation set {num_classes}"
        )
    loader = datasets.build_train_loader(train_set, args, info.world_size, info.rank)
    placement = (device, precision.dtype or torch.float32, precision.memory_format)
    batches = datasets.build_prefetcher(loader, *placement)
    mixup_fn = engine.build_mixup(args, num_classes)
    criterion = engine.build_criterion(args, mixup_fn, num_classes)
    facts |= agreement.image_facts("training", train_set)
    if args.distillation_type != "none":
        mixup_fn, criterion = distill(args, network, mixup_fn, criterion)
        teacher = engine.unwrap(mixup_fn.teacher)
        facts["teacher's weights"] = lambda: agreement.contents(teacher.state_dict())
    return Job(args, source, network, evaluation, batches, mixup_fn, criterion, facts)


def evaluate(job: Job) -> int:
    """Evaluate the weights of a source and their moving average; return the exit status."""
    source, network = job.source, job.network
    for weights in source.weights():
        report = source.load(network.model, weights)
        if weights == "model":
            log(str(report or source.label))
        model = fused(network.model, network.name) if job.args.fuse else network.model
        job.evaluation(model, "EMA " if weights == "ema" else "")
    return 0


def train(
    job: Job, resumes: bool, info: DistInfo, output: Output, group: dist.ProcessGroup | None
) -> int:
    """Train, resuming a run or from the weights of a source; return the exit status."""
    args, batches = job.args, job.batches
    train_set = batches.loader.dataset
    lr = engine.scaled_lr(args, info.world_size)
    global_batch = args.batch_size * args.accum_iter * info.world_size
    share = "" if args.sampling_ratio == 1 else f" ({args.sampling_ratio:g} of the set)"
    log(f"learning rate {lr:.6g} (--lr {args.lr:g}) for {global_batch} images per step")
    log(f"training on {len(train_set)} images{share}")
    updates = -(-len(batches) // args.accum_iter)
    state = RunState(
        *(args, job.network, lr, updates),
        *(batches.sampler, info, group, train_set.classes),
    )
    state.start(job.source, resumes)
    utils.all_or_none(lambda: output.begin(args, state.epoch + 1), group)
    if state.epoch < 0 and not state.meter.steps:
        output.add_images(
            "train/images", example_images(batches, len(train_set), job.network.images)
        )
    criterion = job.criterion.to(batches.device)
    return Trainer(state, output, batches, job.evaluation, job.mixup_fn, criterion).train()


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
