"""Train and evaluate torchvision's Mask R-CNN on data in COCO's format, without mmdet.

``python -m object_detection.torchvision_rcnn --help`` lists the flags.
"""

import contextlib
import sys
import time
from argparse import Namespace
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from timm.optim import param_groups_weight_decay
from timm.scheduler import MultiStepLRScheduler
from torch import nn
from torch.utils.data import DataLoader
from torchvision.models.detection import MaskRCNN

import engine
import models
import utils
from models.checkpoint.contents import class_names
from object_detection import annotations, coco_evaluation, data
from object_detection.mask_rcnn import CHANNELS, MAX_SIZE, MIN_SIZE, build_mask_rcnn
from object_detection.rcnn_flags import MODEL, WARMUP_ITERS, parse_args
from training import agreement, launch, optimizers
from training.checkpoints import read_resume, was_restarted
from training.ddp import distribute
from training.existing_run import treatment
from training.network import choose_precision, count_parameters, with_amp_dtype
from training.output import Output
from training.progress import Progress
from training.trainer import finished
from utils import log

WARMUP_START = 0.001  # of the learning rate
DECAYS = (8, 11)  # twelfths of the training after which the learning rate falls to a tenth
DEFAULTS = {"model_name": MODEL, "min_size": [MIN_SIZE]}
DEFAULTS |= {"max_size": MAX_SIZE, "channels": CHANNELS}


def build_optimizer(model: MaskRCNN, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """Return AdamW without decay of norms, biases, their tables and ``no_weight_decay``."""
    net = model.backbone.body.net
    spared = set(net.no_weight_decay()) if hasattr(net, "no_weight_decay") else set()
    # as the original detector's recipes
    spared |= {name for name, _ in net.named_parameters() if name.endswith("bias_table")}
    names = [f"backbone.body.net.{name}" for name in spared]
    groups = param_groups_weight_decay(model, weight_decay, no_weight_decay_list=names)
    return torch.optim.AdamW(groups, lr=lr, weight_decay=weight_decay, fused=True)


def build_schedule(
    optimizer: torch.optim.Optimizer, updates: int, warmup: int
) -> MultiStepLRScheduler:
    """Return the learning rate's rise over ``warmup`` of all ``updates``, and its two falls."""
    decays = [-(-part * updates // 12) + 1 for part in DECAYS]  # timm counts from 1
    start = WARMUP_START * optimizer.defaults["lr"]
    return MultiStepLRScheduler(
        optimizer, decays, 0.1, warmup, start, warmup_prefix=False, t_in_epochs=False
    )


class SampleLosses(nn.Module):
    """Loss of a detector as a function of samples, as the training loop calls a model.

    Args:
        detector: Of torchvision's interface, on its device.
    """

    def __init__(self, detector: MaskRCNN):
        super().__init__()
        self.detector, self.totals = detector, Counter()
        self.qk_scale_factor = getattr(detector.backbone.body.net, "qk_scale_factor", None)

    def forward(self, samples: Sequence[tuple[torch.Tensor, dict]]) -> torch.Tensor:
        """Return the sum of the losses of images ``3 H W`` with their targets."""
        device = next(self.parameters()).device
        images = [image.to(device, non_blocking=True) for image, _ in samples]
        targets = [
            {key: value.to(device, non_blocking=True) for key, value in target.items()}
            for _, target in samples
        ]
        losses = self.detector(images, targets)
        for name, loss in losses.items():
            self.totals[name] += loss.detach().double().nan_to_num(0.0, 0.0, 0.0)
        return sum(loss.float() for loss in losses.values())

    def means(self, steps: int) -> dict[str, float]:
        """Return the mean of each loss over steps and ranks, and reset the sums."""
        totals, self.totals = self.totals, Counter()
        sums = torch.stack(list(totals.values()))
        sums = torch.cat([sums, sums.new_tensor([steps])])
        *sums, steps = utils.sum_over_processes(sums, sums.device).tolist()
        return {name: value / steps for name, value in zip(totals, sums, strict=True)}


def classes_of(checkpoint: Mapping[str, Any], source: str) -> list[str]:
    """Return the class names of a checkpoint; older ones have ``categories``, names by id.

    Raises:
        CheckpointError: This program did not write it; names what is missing.
    """
    keys = {"model", *DEFAULTS, "qk_scale_factor", "optimizer", "scaler", "epoch", "best_ap"}
    missing = keys - checkpoint.keys()
    names = class_names(checkpoint, source)
    if not names and isinstance(checkpoint.get("categories"), Mapping):
        names = list(map(str, checkpoint["categories"].values()))
    if missing or not names:
        what = ", ".join(sorted(missing)) or "classes"
        raise models.CheckpointError(
            f"{source} is not a checkpoint of this program: it does not have {what}; --finetune "
            f"loads the weights of a classifier"
        )
    return names


def annotation_file(args: Namespace, split: str) -> Path:
    """Return the file of ``"train"`` or ``"val"``: the flag's, else that in ``--data-path``."""
    folder = Path(args.data_path, "annotations")
    files = [folder / f"instances_{split}{year}.json" for year in ("", "2017")]
    found = next((file for file in files if file.is_file()), files[0])
    return Path(getattr(args, f"{split}_annotations") or found).resolve()


def read_split(
    args: Namespace, split: str, classes: Sequence[str] | None
) -> tuple[annotations.Annotations, Path]:
    """Return the annotations of ``"train"`` or ``"val"``, and the folder of their images."""
    file = annotation_file(args, split)
    limit = args.limit if file == annotation_file(args, "train") else None
    found = annotations.read(file, classes, is_training=split == "train", limit=limit)
    log(found.summary(split))
    # the images of either split, as --val-annotations may name the training file
    names = ("images", "train2017", "val2017", "images/train2017", "images/val2017", split, "")
    folders = [args.images] if args.images else [Path(args.data_path, name) for name in names]
    return found, data.find_images(found, [Path(folder) for folder in folders])


def choose_settings(
    args: Namespace, checkpoint: Mapping[str, Any], classes: Sequence[str]
) -> dict[str, Any]:
    """Return the detector's settings: given flags, else the checkpoint's, else the defaults.

    The exponent of attention is always the checkpoint's if it has the same model, since another
    would change its function.
    """
    flags = {**vars(args), "model_name": args.model}
    chosen = {key: flags[key] or checkpoint.get(key) or DEFAULTS[key] for key in DEFAULTS}
    same = chosen["model_name"] == checkpoint.get("model_name")
    exponent = checkpoint["qk_scale_factor"] if same else args.qk_scale_factor
    return chosen | {"qk_scale_factor": exponent, "classes": list(classes)}


def build_detector(settings: Mapping[str, Any], **backbone_options: Any) -> MaskRCNN:
    """Return the detector of :func:`choose_settings`; the options do not change its function."""
    exponent = settings["qk_scale_factor"]
    return build_mask_rcnn(
        settings["model_name"],
        len(settings["classes"]),
        *(settings[key] for key in ("min_size", "max_size", "channels")),
        model_kwargs=None if exponent is None else {"qk_scale_factor": exponent},
        **backbone_options,
    )


class Job(NamedTuple):
    """What evaluation and training share: the detector, and loaders of ``val`` and ``train``."""

    args: Namespace
    info: launch.DistInfo
    group: dist.ProcessGroup | None
    resumed: tuple[str, Mapping[str, Any]]  # name and content of --resume, or empty
    settings: dict[str, Any]
    model: MaskRCNN
    precision: engine.Precision
    loaders: dict[str, DataLoader]

    def state(self) -> dict[str, Any]:
        """Return the detector's part of a checkpoint."""
        gelus = [part for part in self.model.modules() if isinstance(part, nn.GELU)]
        return {
            **self.settings,
            "qk_scale_factor": getattr(self.model.backbone.body, "qk_scale_factor", None),
            "gelu": gelus[0].approximate if gelus else "none",
            "model": self.model.state_dict(),
        }


def build_job(
    args: Namespace, info: launch.DistInfo, device: torch.device, group: Any, resumed: tuple
) -> Job:
    """Read the annotations and build the detector, with the weights that it starts from."""
    source, checkpoint = resumed
    classes = classes_of(checkpoint, source) if checkpoint else None
    loaders = {}
    for split in ("val",) if args.eval else ("train", "val"):
        found, folder = read_split(args, split, classes)
        classes = list(found.categories.values())
        dataset = data.DetectionDataset(found, folder, split == "train", args.seed)
        share = (args.batch_size, args.num_workers, info.world_size, info.rank)
        loaders[split] = data.build_loader(dataset, *share)
    settings = choose_settings(args, checkpoint, classes)
    utils.seed_everything(args.seed)
    engine.select_kernels(device, args.tf32, search=False)  # images of many sizes
    model = build_detector(
        settings,
        drop_path_rate=args.drop_path,
        frozen_stages=args.frozen_stages,
        norm_eval=args.norm_eval,
        with_cp=args.grad_checkpointing,
    )
    precision = choose_precision(args, model.backbone.body.net, device)
    precision.place(model)
    log(
        f"Mask R-CNN on {settings['model_name']}, {len(classes)} classes, sizes "
        f"{settings['min_size']} to {settings['max_size']}: "
        f"{count_parameters(model) / 1e6:.2f} M parameters, {precision}"
    )
    if checkpoint:
        log(str(models.load_weights(model, checkpoint, source)))
    elif args.finetune:
        log(str(models.load_backbone(model.backbone.body, args.finetune)))
    return Job(args, info, group, resumed, settings, model, precision, loaders)


def facts_of(job: Job) -> agreement.Facts:
    """Return what must be the same on all ranks."""

    def lines(dataset: data.DetectionDataset) -> Iterator[str]:
        yield agreement.file_line(dataset.found.path, "annotations")
        yield from data.listing(dataset.found, dataset.samples.root)

    facts = {f"{split} images": partial(lines, job.loaders[split].dataset) for split in job.loaders}
    return facts | {
        "weights": lambda: agreement.contents(job.model.state_dict()),
        "checkpoint": lambda: agreement.contents(job.resumed[1]),
    }


def evaluate(job: Job) -> dict[str, float]:
    """Evaluate, print a line, and return the average precisions."""
    utils.broadcast_buffers(job.model)
    loader = job.loaders["val"]
    stats = coco_evaluation.evaluate(loader, job.model, job.precision, job.group)
    lines = []
    for kind, key in (("box", "bbox"), ("mask", "segm")):
        figures = (f"{name} {stats[f'{key}_{name}']:.4f}" for name in ("AP", "AP50", "AP75"))
        lines.append(f"{kind} {' '.join(figures)}")
    log(f"* {', '.join(lines)} on {len(loader.dataset)} images")
    return stats


def run(args: Namespace, info: launch.DistInfo, device: torch.device) -> None:
    """Run: lock the output folder, build everything, then evaluate or train."""
    log(f"device {device}, {info.world_size} process(es) started by {info.launcher}")
    group = utils.control_group(args.dist_timeout)
    agreement.agree(agreement.start_facts(args, device), group)
    folder = "" if args.eval else args.output_dir  # evaluation locks and writes nothing there
    existing = treatment(args, args.overwrite, was_restarted(info, group))
    with contextlib.closing(
        utils.all_or_none(lambda: Output(folder, existing=existing), group)
    ) as output:
        resumed = read_resume(args, info, group)
        args = with_amp_dtype(args, device, {} if args.eval else resumed[1])
        job = utils.all_or_none(lambda: build_job(args, info, device, group, resumed), group)
        agreement.agree(facts_of(job), group)
        if args.eval:
            evaluate(job)
        else:
            train(job, output)


def train(job: Job, output: Output) -> None:
    """Train, evaluate, log and save epochs up to ``--epochs`` or ``--stop-epoch``."""
    args, info, (source, checkpoint) = job.args, job.info, job.resumed
    loader, device, scaler = job.loaders["train"], job.precision.device, job.precision.scaler
    steps = len(loader)
    warmup = min(WARMUP_ITERS, steps) if args.warmup_iters is None else args.warmup_iters
    optimizer = build_optimizer(job.model, args.lr, args.weight_decay)
    schedule = build_schedule(optimizer, args.epochs * steps, warmup)
    start, best = 0, 0.0
    if checkpoint:
        optimizers.restore(optimizer, checkpoint["optimizer"], source)
        if checkpoint["scaler"]:  # empty unless the run used float16
            scaler.load_state_dict(checkpoint["scaler"])
        start, best = checkpoint["epoch"] + 1, checkpoint["best_ap"]
    schedule.step_update(start * steps)
    utils.all_or_none(lambda: output.begin(args, start), job.group)
    stop = args.epochs if args.stop_epoch is None else min(args.epochs, args.stop_epoch)
    if start >= stop:
        log(finished(start, args))
        return
    losses = SampleLosses(job.model)
    model = distribute(losses, device, static=False) if info.world_size > 1 else losses
    log(f"training epochs {start} to {stop - 1}: {steps} steps each, {warmup} in all to warm up")
    began = time.time()
    for epoch in range(start, stop):
        utils.seed_everything(args.seed, epoch, info.rank)
        loader.sampler.set_epoch(epoch)
        progress = Progress(loader, epoch, stop, info.world_size)
        stats = engine.train_one_epoch(
            *(model, lambda loss, _: loss, progress, optimizer, device, epoch, job.precision),
            max_norm=args.clip_grad,
            lr_scheduler=schedule,
            log_interval=progress.interval(args.log_interval),
            report=progress.report,
        )
        found = evaluate(job)
        is_best, best = found["bbox_AP"] > best, max(found["bbox_AP"], best)
        stats = {f"train_{key}": value for key, value in (stats | losses.means(steps)).items()}
        stats |= {f"test_{key}": value for key, value in found.items()}
        stats |= {"epoch": epoch, "n_parameters": count_parameters(job.model)}
        output.log_epoch(stats, epoch)
        if info.rank == 0:
            state = {"optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()}
            state |= {"epoch": epoch, "best_ap": best, "args": vars(args)}
            output.save(job.state() | state, is_best)
    output.finish_saving()
    log(f"Max box AP {best:.4f}")
    if stop < args.epochs:
        log(f"stopped before epoch {stop} of {args.epochs} (--stop-epoch)")
    log(f"Training time {timedelta(seconds=int(time.time() - began))}")


def main(argv: list[str]) -> int:
    """Run with the flags ``argv``; return the exit status."""

    def start() -> None:
        args = parse_args(argv)
        with launch.process_group(args) as (info, device):
            run(args, info, device)

    return launch.run_program(start, launch.RESUMES)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
