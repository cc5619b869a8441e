"""Train and evaluate torchvision's Mask R-CNN on data in COCO's format, without mmdet.

``python -m object_detection.torchvision_rcnn --help`` lists the flags.
"""

import contextlib
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Mapping
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from timm.optim import param_groups_weight_decay
from torch import nn
from torch.utils.data import DataLoader
from torchvision.models.detection import MaskRCNN

import engine
import models
import utils
from object_detection import coco, coco_evaluation
from object_detection.mask_rcnn import CHANNELS, MAX_SIZE, MIN_SIZE, build_mask_rcnn
from object_detection.rcnn_flags import MODEL, WARMUP_ITERS, parse_args
from training import agreement, launch, optimizers, progress
from training.checkpoints import read_resume, was_restarted
from training.ddp import distribute
from training.existing_run import treatment
from training.launch import DistInfo
from training.network import choose_precision, with_amp_dtype
from training.output import Output
from training.trainer import finished
from utils import log

__all__ = ["build_mask_rcnn", "main"]

WARMUP_START = 0.001  # of the learning rate
MAX_NONFINITE = 10
DECAYS = (8, 11)  # twelfths of the training after which the learning rate falls to a tenth


def lr_factor(update: int, updates: int, warmup: int) -> float:
    """Return the learning rate of an update, relative to ``--lr``.

    It rises linearly over the first ``warmup`` of all ``updates``, and falls to a tenth after 8
    and after 11 twelfths of them.
    """
    rise = min(update / warmup, 1.0) if warmup else 1.0
    falls = sum(12 * update >= twelfths * updates for twelfths in DECAYS)
    return (WARMUP_START + (1 - WARMUP_START) * rise) * 0.1**falls


def build_optimizer(model: MaskRCNN, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """Return AdamW without decay of norms, biases and the backbone's ``no_weight_decay``."""
    net = model.backbone.body.net
    spared = net.no_weight_decay() if hasattr(net, "no_weight_decay") else ()
    names = [f"backbone.body.net.{name}" for name in spared]
    groups = param_groups_weight_decay(model, weight_decay, no_weight_decay_list=names)
    return torch.optim.AdamW(groups, lr=lr, weight_decay=weight_decay, fused=True)


def train_one_epoch(
    model: nn.Module,
    loader: progress.Progress,
    optimizer: torch.optim.Optimizer,
    lr_of: Callable[[int], float],
    precision: engine.Precision,
    epoch: int,
    max_norm: float | None = None,
    log_interval: int = 50,
) -> dict[str, float]:
    """Train for one epoch.

    Args:
        model: Detector, possibly wrapped in DistributedDataParallel.
        loader: Yields lists of images ``3 H W`` of bytes and of targets.
        optimizer: Optimizer, stepped at every batch.
        lr_of: Maps an update, counted from the start of the run, to its learning rate.
        precision: Device, autocast and loss scaling.
        epoch: Number of the epoch, from 0.
        max_norm: Maximum norm of the unscaled gradient.
        log_interval: Steps between log lines.

    Returns:
        ``loss`` and its parts, averaged over steps and processes, ``lr`` of the last step, and
        ``images_per_second`` over all processes.

    Raises:
        UserError: The loss is not finite; in float16 ten times in a row, as the loss scaler skips
            such updates.
    """
    model.train()
    body = engine.unwrap(model).backbone.body
    meter = engine.Meter()
    limit = MAX_NONFINITE if precision.scaler.is_enabled() else 1
    device, steps, images_seen, total = precision.device, len(loader), 0, 0.0
    started = time.perf_counter()
    for step, (images, targets) in enumerate(loader):
        lr = lr_of(epoch * steps + step)
        for group in optimizer.param_groups:
            group["lr"] = lr
        images = [coco.to_input(image, device) for image in images]
        targets = [
            {key: value.to(device, non_blocking=True) for key, value in target.items()}
            for target in targets
        ]
        with precision.autocast():
            losses = model(images, targets)
        parts = torch.stack([part.float() for part in losses.values()])
        loss = parts.sum()
        meter.lr = lr
        meter.add(loss.detach())
        meter.read()  # torchvision's sampling waits for the device anyway: this costs nothing
        engine.check_finite(meter, limit, epoch, precision, body)
        optimizer.zero_grad()
        precision.scaler.scale(loss).backward()
        if max_norm is not None:
            precision.scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        precision.scaler.step(optimizer)
        precision.scaler.update()
        total = total + parts.detach().double().nan_to_num(0.0, 0.0, 0.0)
        images_seen += len(images)
        if (step + 1) % log_interval == 0 or step + 1 == steps:
            rate = images_seen / (time.perf_counter() - started)
            loader.report(step + 1, total.sum().item() / (step + 1), lr, rate)
    sums = torch.tensor([*total.tolist(), steps, rate], dtype=torch.float64)
    *sums, steps, rate = utils.sum_over_processes(sums, device).tolist()
    means = {name: value / steps for name, value in zip(losses, sums, strict=True)}
    return {"loss": sum(means.values())} | means | {"lr": lr, "images_per_second": round(rate, 1)}


class Run:
    """State in a checkpoint: model, optimizer, scaler, progress.

    Args:
        args: Parsed flags.
        model: Detector, on its device.
        settings: From :func:`choose_settings`.
        precision: Mixed precision.
    """

    def __init__(
        self,
        args: Namespace,
        model: MaskRCNN,
        settings: Mapping[str, Any],
        precision: engine.Precision,
    ):
        self.args, self.model, self.settings, self.precision = args, model, settings, precision
        self.optimizer = build_optimizer(model, args.lr, args.weight_decay)
        self.epoch, self.best_ap = -1, 0.0

    def state(self) -> dict[str, Any]:
        """Return the content of a checkpoint."""
        gelus = (module for module in self.model.modules() if isinstance(module, nn.GELU))
        body = self.model.backbone.body
        return {
            **self.settings,
            "qk_scale_factor": getattr(body, "qk_scale_factor", None),
            "gelu": next((gelu.approximate for gelu in gelus), "none"),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.precision.scaler.state_dict(),
            "epoch": self.epoch,
            "best_ap": self.best_ap,
            "args": vars(self.args),
        }

    def restore(self, checkpoint: Mapping[str, Any], source: str) -> None:
        """Load a checkpoint."""
        log(str(models.load_weights(self.model, checkpoint, source)))
        optimizers.restore(self.optimizer, checkpoint["optimizer"], source)
        if checkpoint["scaler"]:  # empty unless the run used float16
            self.precision.scaler.load_state_dict(checkpoint["scaler"])
        self.epoch, self.best_ap = checkpoint["epoch"], checkpoint["best_ap"]


def check_resume(checkpoint: Mapping[str, Any], source: str) -> None:
    """Raise CheckpointError, naming missing keys, unless this program wrote a checkpoint."""
    missing = {"model", "optimizer", "scaler", "epoch", "best_ap", "categories"} - set(checkpoint)
    if checkpoint and missing:
        raise models.CheckpointError(
            f"{source} is not a checkpoint of this program: it does not have "
            f"{', '.join(sorted(missing))}; --finetune loads the weights of a classifier"
        )


def annotation_file(args: Namespace, split: str) -> Path:
    """Return the file of ``"train"`` or ``"val"``: the flag's, else that in ``--data-path``."""
    given = getattr(args, f"{split}_annotations")
    if given:
        return Path(given).resolve()
    folder = Path(args.data_path, "annotations").resolve()
    files = [folder / f"instances_{split}{year}.json" for year in ("", "2017")]
    return next((file for file in files if file.is_file()), files[0])


def read_split(args: Namespace, split: str) -> tuple[coco.Annotations, Path]:
    """Return the annotations of ``"train"`` or ``"val"``, and the folder of their images."""
    file = annotation_file(args, split)
    annotations = coco.read_annotations(file)
    if file == annotation_file(args, "train"):
        annotations = annotations.first(args.limit)
    # the images of either split, as --val-annotations may name the training file
    names = ("images", "train2017", "val2017", "images/train2017", "images/val2017", split, "")
    root = Path(args.data_path)
    folders = [Path(args.images)] if args.images else [root / name for name in names]
    return annotations, coco.find_images(annotations, folders)


def choose_settings(
    args: Namespace, checkpoint: Mapping[str, Any], categories: Mapping[int, str]
) -> dict[str, Any]:
    """Return the detector's settings: given flags, else the checkpoint's, else the defaults.

    The exponent of attention is always the checkpoint's if it has the same model, since another
    would change its function.
    """
    chosen = {
        key: getattr(args, flag) or checkpoint.get(key) or default
        for key, flag, default in (
            ("model_name", "model", MODEL),
            ("min_size", "min_size", [MIN_SIZE]),
            ("max_size", "max_size", MAX_SIZE),
            ("channels", "channels", CHANNELS),
        )
    }
    same = chosen["model_name"] == checkpoint.get("model_name")
    exponent = checkpoint["qk_scale_factor"] if same else args.qk_scale_factor
    return chosen | {"qk_scale_factor": exponent, "categories": dict(categories)}


def build_detector(args: Namespace, settings: Mapping[str, Any]) -> MaskRCNN:
    """Return the detector of ``settings``; these flags do not change its function."""
    exponent = settings["qk_scale_factor"]
    return build_mask_rcnn(
        settings["model_name"],
        len(settings["categories"]),
        settings["min_size"],
        settings["max_size"],
        settings["channels"],
        drop_path_rate=args.drop_path,
        frozen_stages=args.frozen_stages,
        norm_eval=args.norm_eval,
        with_cp=args.grad_checkpointing,
        model_kwargs=None if exponent is None else {"qk_scale_factor": exponent},
    )


def evaluate(
    loader: DataLoader,
    model: MaskRCNN,
    precision: engine.Precision,
    categories: Mapping[int, str],
) -> dict[str, float]:
    """Evaluate, print a line, and return the average precisions."""
    utils.broadcast_buffers(model)
    stats = coco_evaluation.evaluate(loader, model, precision, list(categories))
    lines = (
        f"{kind} AP {stats[f'{key}_AP']:.4f} AP50 {stats[f'{key}_AP50']:.4f} "
        f"AP75 {stats[f'{key}_AP75']:.4f}"
        for kind, key in (("box", "bbox"), ("mask", "segm"))
    )
    log(f"* {', '.join(lines)} on {len(loader.dataset)} images")
    return stats


def run(args: Namespace, info: DistInfo, device: torch.device) -> None:
    """Run: lock the output folder, build everything, then evaluate or train."""
    log(f"device {device}, {info.world_size} process(es) started by {info.launcher}")
    coco.require_pycocotools()
    group = utils.control_group(args.dist_timeout)
    agreement.agree(agreement.start_facts(args, device), group)
    folder = "" if args.eval else args.output_dir  # evaluation locks and writes nothing there
    existing = treatment(args, args.overwrite, was_restarted(info, group))
    with contextlib.closing(
        utils.all_or_none(lambda: Output(folder, existing=existing), group)
    ) as output:
        run_in(output, args, info, device, group)


def run_in(
    output: Output,
    args: Namespace,
    info: DistInfo,
    device: torch.device,
    group: dist.ProcessGroup | None,
) -> None:
    """Build everything, then evaluate or train."""
    source, checkpoint = read_resume(args, info, group)
    check_resume(checkpoint, source)
    args = with_amp_dtype(args, device, {} if args.eval else checkpoint)
    utils.seed_everything(args.seed)
    engine.select_kernels(device, args.tf32, search=False)  # images of many sizes
    share = (args.batch_size, args.num_workers, info.world_size, info.rank)

    val, val_folder = read_split(args, "val")
    if args.eval:
        categories = checkpoint["categories"]
    else:
        train, train_folder = read_split(args, "train")
        categories = train.categories
        if checkpoint:
            coco.check_categories(train, checkpoint["categories"], source)
            categories = checkpoint["categories"]
    coco.check_categories(val, categories, source if args.eval else train.path)
    labels = {key: label for label, key in enumerate(categories, start=1)}
    val_set = coco.CocoDataset(val, val_folder, labels, is_train=False)
    val_loader = coco.build_loader(val_set, *share)

    settings = choose_settings(args, checkpoint, categories)
    model = build_detector(args, settings)
    precision = choose_precision(args, model.backbone.body.net, device)
    precision.place(model)
    n_parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    log(
        f"Mask R-CNN on {settings['model_name']}, {len(categories)} categories, sizes "
        f"{settings['min_size']} to {settings['max_size']}: {n_parameters / 1e6:.2f} M "
        f"parameters, {precision}"
    )
    facts = {
        "annotations": lambda: (
            [agreement.file_line(val.path, "validation annotations")]
            + ([] if args.eval else [agreement.file_line(train.path, "training annotations")])
        ),
        "weights": lambda: agreement.contents(model.state_dict()),
        "checkpoint": lambda: agreement.contents(checkpoint),
    }
    folders = {"validation": (val, val_folder)}
    folders |= {} if args.eval else {"training": (train, train_folder)}
    facts |= {f"{split} images": partial(coco.listing, *where) for split, where in folders.items()}
    agreement.agree(facts, group)
    if args.eval:
        log(str(models.load_weights(model, checkpoint, source)))
        evaluate(val_loader, model, precision, categories)
        return

    train_set = coco.CocoDataset(train, train_folder, labels, is_train=True, seed=args.seed)
    train_loader = coco.build_loader(train_set, *share)
    if args.finetune and not checkpoint:
        log(str(models.load_backbone(model.backbone.body, args.finetune)))
    state = Run(args, model, settings, precision)
    if checkpoint:
        state.restore(checkpoint, source)
    utils.all_or_none(lambda: output.begin(args, state.epoch + 1), group)
    train_epochs(state, output, train_loader, val_loader, info, n_parameters)


def train_epochs(
    state: Run,
    output: Output,
    train_loader: DataLoader,
    val_loader: DataLoader,
    info: DistInfo,
    n_parameters: int,
) -> None:
    """Train, evaluate, log and save epochs up to ``--epochs`` or ``--stop-epoch``."""
    args, model, precision = state.args, state.model, state.precision
    stop = args.epochs if args.stop_epoch is None else min(args.epochs, args.stop_epoch)
    if state.epoch + 1 >= stop:
        log(finished(state.epoch + 1, args))
        return
    wrapped = model
    if info.world_size > 1:
        wrapped = distribute(model, precision.device, static=False)
    steps = len(train_loader)
    warmup = min(WARMUP_ITERS, steps) if args.warmup_iters is None else args.warmup_iters
    log(
        f"training epochs {state.epoch + 1} to {stop - 1} of {args.epochs}: "
        f"{len(train_loader.dataset)} images, {steps} steps, {warmup} of them to warm up"
    )
    started = time.time()
    for epoch in range(state.epoch + 1, stop):
        utils.seed_everything(args.seed, epoch, info.rank)
        train_loader.sampler.set_epoch(epoch)
        shown = progress.Progress(train_loader, epoch, stop, info.world_size)
        train_stats = train_one_epoch(
            wrapped,
            shown,
            state.optimizer,
            lambda update: args.lr * lr_factor(update, args.epochs * steps, warmup),
            precision,
            epoch,
            args.clip_grad,
            shown.interval(args.log_interval),
        )
        test_stats = evaluate(val_loader, model, precision, state.settings["categories"])
        state.epoch = epoch
        is_best = test_stats["bbox_AP"] > state.best_ap
        state.best_ap = max(test_stats["bbox_AP"], state.best_ap)
        stats = {f"train_{key}": value for key, value in train_stats.items()}
        stats |= {f"test_{key}": value for key, value in test_stats.items()}
        output.log_epoch(stats | {"epoch": epoch, "n_parameters": n_parameters}, epoch)
        if info.rank == 0:
            output.save(state.state(), is_best)
    output.finish_saving()
    log(f"Max box AP {state.best_ap:.4f}")
    if state.epoch + 1 < args.epochs:
        log(f"stopped before epoch {stop} of {args.epochs} (--stop-epoch)")
    log(f"Training time {timedelta(seconds=int(time.time() - started))}")


def start(argv: list[str]) -> None:
    """Run with the flags ``argv``."""
    args = parse_args(argv)
    with launch.process_group(args) as (info, device):
        run(args, info, device)


def main(argv: list[str]) -> int:
    """Run with the flags ``argv``; return the exit status."""
    return launch.run_program(lambda: start(argv), launch.RESUMES)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
