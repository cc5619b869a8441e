"""Train and evaluate image classifiers; ``python main.py --help`` lists the flags."""

import contextlib
import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torchvision.utils import make_grid

import datasets
import engine
import models
import utils
from pipeline.prefetch import Prefetcher
from samplers import SampleIndex
from training import launch
from training.distillation import (
    DistillationLoss,
    TeacherTargets,
    build_teacher,
    learn_from_teacher,
)
from training.flags import parse_args
from training.launch import DistInfo
from training.network import Network, build_network, count_parameters, fused, renormalized
from training.output import Output
from training.resume import read_resume
from training.run_state import RunState
from training.trainer import Evaluation, Trainer
from utils import UserError, log


def choose_input_size(args: Namespace, checkpoint: Mapping[str, Any], source: str) -> int:
    """``--input-size`` where given, else the checkpoint's, else the dataset's usual one."""
    saved = checkpoint.get("input_size")
    if args.input_size and saved and args.input_size != saved:
        log(f"warning: --input-size {args.input_size}, but {source} was trained at {saved}")
    return args.input_size or saved or datasets.input_size_of(args)


def compare_classes(checkpoint: Mapping[str, Any], source: str, names: Sequence[str]) -> None:
    """Warn where a classifier was trained for classes of other names than the dataset's."""
    saved = models.class_names(checkpoint, source) or list(names)
    if len(saved) == len(names) and saved != list(names):
        number = next(
            i for i, pair in enumerate(zip(saved, names, strict=True)) if len({*pair}) > 1
        )
        log(
            f"warning: class {number} of {source} is {saved[number]!r}, that of the dataset is "
            f"{names[number]!r}"
        )


def run(args: Namespace, given: set[str], place: DistInfo, device: torch.device) -> int:
    """One run: build what evaluation and training share, then do either; the exit status."""
    found = "found" if device.type == "cuda" else "not found"
    why = "" if args.device else f" (CUDA {found})"
    log(f"device {device}{why}, {place.world_size} process(es) started by {place.launcher}")
    group = utils.control_group(args.dist_timeout)
    folder = "" if args.eval else args.output_dir  # evaluation locks and writes nothing there
    with contextlib.closing(
        utils.all_or_none(lambda: Output(folder, args.keep_checkpoints), group)
    ) as output:
        source, checkpoint = read_resume(args, place, group)
        size = choose_input_size(args, checkpoint, source)
        args = Namespace(**vars(args) | {"input_size": size})
        utils.seed_everything(args.seed)
        engine.set_determinism(args.deterministic)

        eval_set, num_classes = datasets.build_dataset(False, args, device)
        compare_classes(checkpoint, source, eval_set.classes)
        part = (place.world_size, place.rank) if args.dist_eval else (1, 0)
        eval_loader = datasets.build_eval_loader(eval_set, args, *part)
        network = build_network(args, given, checkpoint, source, num_classes, device)
        placement = (device, torch.float32, network.precision.memory_format)
        eval_feed = datasets.build_prefetcher(eval_loader, *placement)
        evaluation = Evaluation(args, eval_feed, network.precision, group)
        if args.eval:
            return evaluate(args, network, evaluation, checkpoint, source)
        return train(args, network, evaluation, (checkpoint, source), place, output, group)


def evaluate(
    args: Namespace,
    network: Network,
    evaluation: Evaluation,
    checkpoint: Mapping[str, Any],
    source: str,
) -> int:
    """Evaluate a checkpoint and its moving average; the exit status."""
    model, name = network.model, network.name
    log(str(models.load_weights(model, checkpoint, source)))
    own = models.normalization_of(checkpoint, model.pretrained_cfg)
    if own != datasets.NORMALIZATION:
        log(f"images are normalised as {source} expects: mean {own[0]}, std {own[1]}")

    def net() -> torch.nn.Module:
        folded = fused(model, name) if args.fuse else model
        return renormalized(folded, datasets.NORMALIZATION, own)

    evaluation(net())
    if checkpoint.get("model_ema"):
        models.load_weights(model, checkpoint, source, ema=True)
        evaluation(net(), "EMA ")
    return 0


def train(
    args: Namespace,
    network: Network,
    evaluation: Evaluation,
    resumed: tuple[Mapping[str, Any], str],
    place: DistInfo,
    output: Output,
    group: dist.ProcessGroup | None,
) -> int:
    """Train, from a checkpoint and its name if they are not empty; the exit status."""
    precision, device = network.precision, network.precision.device
    train_set, num_classes = datasets.build_dataset(True, args, device)
    if num_classes != (of_network := network.kwargs["num_classes"]):
        raise datasets.DataError(
            f"the training set has {num_classes} classes, the validation set {of_network}"
        )
    train_loader = datasets.build_train_loader(train_set, args, place.world_size, place.rank)
    placement = (device, precision.dtype or torch.float32, precision.memory_format)
    train_feed = datasets.build_prefetcher(train_loader, *placement)
    mixup_fn = engine.build_mixup(args, num_classes)
    criterion = engine.build_criterion(args, mixup_fn, num_classes)
    if args.distillation_type != "none":
        teacher = build_teacher(args, num_classes, precision, datasets.NORMALIZATION)
        mixup_fn = TeacherTargets(engine.compiled(teacher, args.compile), mixup_fn, precision)
        weights = (args.distillation_type, args.distillation_alpha, args.distillation_tau)
        criterion = DistillationLoss(criterion, *weights)
        learn_from_teacher(network.model)
    lr = engine.scaled_lr(args, place.world_size)
    global_batch = args.batch_size * args.accum_iter * place.world_size
    share = "" if args.sampling_ratio == 1 else f" ({args.sampling_ratio:g} of the set)"
    log(f"learning rate {lr:.6g} (--lr {args.lr:g}) for {global_batch} images per step")
    log(f"training on {len(train_set)} images{share}")
    n_parameters = count_parameters(network.model)
    updates = -(-len(train_loader) // args.accum_iter)
    state = RunState(
        *(args, network.model, network.name, network.kwargs, precision, lr, updates),
        *(train_loader.sampler, place, group, train_set.classes),
    )
    checkpoint, source = resumed
    if checkpoint:
        state.restore(checkpoint, source)
        if args.finetune:
            log(f"--finetune {args.finetune} is not read: the run goes on from {source}")
    elif args.finetune:
        state.finetune(args.finetune)
    elif args.linear_probe or args.freeze_stages is not None:
        raise UserError(
            f"{args.output_dir} holds no checkpoint to resume, and what --linear-probe and "
            f"--freeze-stages keep would be random: give --finetune CHECKPOINT"
        )
    state.set_lr()
    utils.all_or_none(lambda: output.begin(args, state.epoch + 1), group)
    if state.epoch < 0 and not state.meter.steps:
        output.add_images("train/images", example_images(train_feed, len(train_set)))
    trainer = Trainer(state, output, train_feed, evaluation, mixup_fn, criterion.to(device))
    return trainer.train(n_parameters)


def example_images(feed: Prefetcher, num_images: int, count: int = 32) -> torch.Tensor:
    """A picture of augmented training images, spread over the classes."""
    images = feed.batch([SampleIndex(i * num_images // count) for i in range(count)]).images
    return make_grid(datasets.denormalize(images.float().cpu()), nrow=8)


def start(argv: list[str]) -> int:
    """Run with the flags ``argv``; returns the exit status."""
    args, given = parse_args(argv)
    with launch.process_group(args) as (place, device):
        return run(args, given, place, device)


def main(argv: list[str]) -> int:
    """Run with the flags ``argv``; returns the exit status."""
    return launch.run_program(lambda: start(argv), launch.RESUMES)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
