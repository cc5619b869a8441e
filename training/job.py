"""What a rank builds from the flags before any rank trains or evaluates."""

from argparse import Namespace
from collections.abc import Callable, Mapping
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
from pipeline.sources.summary import lines_of, orientation_lines
from training import agreement, losses
from training.class_weights import class_weights
from training.cosub import CosubLoss, TwoViews
from training.data import data_line, data_record, with_recorded_split
from training.distillation import TeacherTargets, distill
from training.launch import DistInfo
from training.network import (
    Network,
    build_network,
    check_single_images,
    check_size,
    choose_source,
    compare_classes,
)
from training.trainer import Evaluation
from utils import log


class Job(NamedTuple):
    """Parts of a training or an evaluation.

    Attributes:
        args: Flags, with the input size.
        source: Where the weights come from.
        network: Model on its device; only ``source`` has the weights of a file yet.
        evaluation: Evaluates a model.
        facts: What must be the same on all ranks.
        batches: This rank's part of the training set; None for an evaluation.
        mixup_fn: Mixes a batch on the device.
        criterion: Loss of the training.
        batches_at: Returns ``batches`` with images of another size, in pixels.
    """

    args: Namespace
    source: ModelSource
    network: Network
    evaluation: Evaluation
    facts: agreement.Facts
    batches: Prefetcher | None = None
    mixup_fn: Mixup | TeacherTargets | TwoViews | None = None
    criterion: nn.Module | None = None
    batches_at: Callable[[int], Prefetcher] | None = None

    def data_record(self) -> dict[str, Any]:
        """Return the content of ``data.json``."""
        loaders = {"train": self.batches, "validation": self.evaluation.loader}
        return data_record(
            self.args, {name: each.loader.dataset.source for name, each in loaders.items() if each}
        )


def _log_lines(split: str, dataset: datasets.LoadedDataset) -> None:
    for line in lines_of(split, dataset.source):
        log(line)


def _log_orientation(*loaded: datasets.LoadedDataset) -> None:
    if utils.is_main_process():  # which reads images
        for line in orientation_lines(*(dataset.source for dataset in loaded)):
            log(line)


def build_job(
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
    args = with_recorded_split(args, checkpoint, label)
    weights = (source.data_config, source.label) if source.has_weights else ()
    images = datasets.choose_images(args, *weights)
    log(f"images: {images}")
    args = Namespace(**vars(args) | {"input_size": images.size})
    if args.input_size is not None:
        check_size(args, given, source, images.size)
    utils.seed_everything(args.seed)
    engine.select_kernels(device, args.tf32, args.deterministic)

    names = (source.classes, source.label) if source.classes and source.has_weights else None
    eval_set, num_classes = datasets.build_dataset(
        False, args, device, images, names if args.eval else None
    )
    log(data_line(args, eval_set.source))
    _log_lines("validation", eval_set)
    compare_classes(source, eval_set.classes, new_head=not args.eval and not checkpoint)
    part = (info.world_size, info.rank) if args.dist_eval else (1, 0)
    eval_loader = datasets.build_eval_loader(eval_set, args, *part)
    network = build_network(args, given, source, images, num_classes, device)
    precision = network.precision
    placement = (device, torch.float32, precision.memory_format)
    eval_batches = datasets.build_prefetcher(eval_loader, *placement)
    evaluation = Evaluation(args, eval_batches, len(eval_set), precision, group)
    facts = agreement.label_facts(args) | agreement.model_facts(source, network)
    facts |= agreement.image_facts("validation", eval_set)
    if args.eval:
        _log_orientation(eval_set)
        return Job(args, source, network, evaluation, facts)

    train_set, trained = datasets.build_dataset(True, args, device, images)
    if trained != num_classes:
        raise datasets.DataError(
            f"the training set has {trained} classes, the validation set {num_classes}"
        )
    check_single_images(network, args)
    loader = datasets.build_train_loader(train_set, args, info.world_size, info.rank)
    placement = (device, precision.dtype or torch.float32, precision.memory_format)
    batches = datasets.build_prefetcher(loader, *placement)

    def batches_at(size: int) -> Prefetcher:
        resized = (train_set.source, True, args, device, images.at_size(size))
        part = (info.world_size, info.rank, loader.sampler)
        resized = datasets.build_train_loader(datasets.augmented(*resized), args, *part)
        return datasets.build_prefetcher(resized, *placement)

    for size in args.progressive_sizes or ():
        datasets.build_augmentation(True, args, images.at_size(size))  # raises errors
    mixup_fn = losses.build_mixup(args, num_classes)
    own = train_set.source
    weights = class_weights(args.class_weights, own.classes, own.targets)
    criterion = losses.build_criterion(args, mixup_fn, num_classes, weights)
    _log_lines("train", train_set)
    _log_orientation(train_set, eval_set)
    facts |= agreement.image_facts("training", train_set)
    if weights is not None:
        facts["weights of the classes"] = lambda: agreement.contents({"weights": weights})
    if args.distillation_type != "none":
        mixup_fn, criterion = distill(args, network, mixup_fn, criterion)
        teacher = engine.unwrap(mixup_fn.teacher)
        facts["teacher's weights"] = lambda: agreement.contents(teacher.state_dict())
    if args.cosub:
        mixup_fn, criterion = TwoViews(mixup_fn), CosubLoss(criterion)
    parts = (batches, mixup_fn, criterion, batches_at)
    return Job(args, source, network, evaluation, facts, *parts)
