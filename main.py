"""Train and evaluate image classifiers; ``python main.py --help`` lists the flags."""

import contextlib
import sys
from argparse import Namespace

import torch
import torch.distributed as dist

import datasets
import engine
import utils
from models import ModelSource
from training import launch
from training.checkpoints import read_resume
from training.distillation import distill
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


def run(args: Namespace, given: set[str], info: DistInfo, device: torch.device) -> int:
    """Build what evaluation and training share, then do either; return the exit status."""
    found = "found" if device.type == "cuda" else "not found"
    why = "" if args.device else f" (CUDA {found})"
    log(f"device {device}{why}, {info.world_size} process(es) started by {info.launcher}")
    group = utils.control_group(args.dist_timeout)
    folder = "" if args.eval else args.output_dir  # evaluation locks and writes nothing there
    with contextlib.closing(
        utils.all_or_none(lambda: Output(folder, args.keep_checkpoints), group)
    ) as output:
        label, checkpoint = read_resume(args, info, group)
        source = choose_source(args, given, label, checkpoint)
        weights = (source.data_config, source.label) if source.has_weights else ()
        images = datasets.choose_images(args, *weights)
        log(f"images: {images}")
        args = Namespace(**vars(args) | {"input_size": images.side})
        utils.seed_everything(args.seed)
        engine.set_determinism(args.deterministic)

        eval_set, num_classes = datasets.build_dataset(False, args, device, images)
        tunes = not args.eval and not checkpoint
        compare_classes(source, eval_set.classes, new_head=tunes)
        part = (info.world_size, info.rank) if args.dist_eval else (1, 0)
        eval_loader = datasets.build_eval_loader(eval_set, args, *part)
        network = build_network(args, given, source, images, num_classes, device)
        placement = (device, torch.float32, network.precision.memory_format)
        eval_batches = datasets.build_prefetcher(eval_loader, *placement)
        evaluation = Evaluation(args, eval_batches, network.precision, group)
        if args.eval:
            return evaluate(args, network, evaluation, source)
        return train(args, network, evaluation, source, not tunes, info, output, group)


def evaluate(args: Namespace, network: Network, evaluation: Evaluation, source: ModelSource) -> int:
    """Evaluate the weights of a source and their moving average; return the exit status."""
    for weights in source.weights():
        report = source.load(network.model, weights)
        if weights == "model":
            log(str(report or source.label))
        model = fused(network.model, network.name) if args.fuse else network.model
        evaluation(model, "EMA " if weights == "ema" else "")
    return 0


def train(
    args: Namespace,
    network: Network,
    evaluation: Evaluation,
    source: ModelSource,
    resumes: bool,
    info: DistInfo,
    output: Output,
    group: dist.ProcessGroup | None,
) -> int:
    """Train, resuming a run or from the weights of a source; return the exit status."""
    precision, device = network.precision, network.precision.device
    train_set, num_classes = datasets.build_dataset(True, args, device, network.images)
    if num_classes != (validated := network.kwargs["num_classes"]):
        raise datasets.DataError(
            f"the training set has {num_classes} classes, the validation set {validated}"
        )
    train_loader = datasets.build_train_loader(train_set, args, info.world_size, info.rank)
    placement = (device, precision.dtype or torch.float32, precision.memory_format)
    train_batches = datasets.build_prefetcher(train_loader, *placement)
    mixup_fn = engine.build_mixup(args, num_classes)
    criterion = engine.build_criterion(args, mixup_fn, num_classes)
    if args.distillation_type != "none":
        mixup_fn, criterion = distill(args, network, mixup_fn, criterion)
    lr = engine.scaled_lr(args, info.world_size)
    global_batch = args.batch_size * args.accum_iter * info.world_size
    share = "" if args.sampling_ratio == 1 else f" ({args.sampling_ratio:g} of the set)"
    log(f"learning rate {lr:.6g} (--lr {args.lr:g}) for {global_batch} images per step")
    log(f"training on {len(train_set)} images{share}")
    updates = -(-len(train_loader) // args.accum_iter)
    state = RunState(
        *(args, network, lr, updates),
        *(train_loader.sampler, info, group, train_set.classes),
    )
    state.start(source, resumes)
    utils.all_or_none(lambda: output.begin(args, state.epoch + 1), group)
    if state.epoch < 0 and not state.meter.steps:
        output.add_images(
            "train/images", example_images(train_batches, len(train_set), network.images)
        )
    return Trainer(state, output, train_batches, evaluation, mixup_fn, criterion.to(device)).train()


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
