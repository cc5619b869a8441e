"""mmengine's runner, with errors raised before the first image is read."""

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from models import CheckpointError
from object_detection import checkpoints, recipe, runtime
from utils import UserError

if TYPE_CHECKING:
    from mmengine.config import Config
    from mmengine.runner import Runner

LAUNCHERS = ("none", "pytorch", "slurm", "mpi")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the flags of a run."""
    recipe.add_options(parser)
    parser.add_argument("--data-root", help="data folder; replaces the config's")
    parser.add_argument("--work-dir", help="folder for logs and checkpoints; output/NAME")
    parser.add_argument(
        "--launcher", choices=LAUNCHERS, default="none", help="what started the processes"
    )
    # what torch.distributed.launch adds
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)


def prepare(args: argparse.Namespace, amp: bool | None = None) -> "Config":
    """Return the config of a run on this machine; print what had to be changed."""
    config = recipe.read_config(args.config, args.cfg_options, args.data_root)
    if args.local_rank is not None:
        os.environ.setdefault("LOCAL_RANK", str(args.local_rank))
    config.launcher = args.launcher
    config.work_dir = args.work_dir or config.get("work_dir") or f"output/{Path(args.config).stem}"
    for split in ("val", "test"):
        recipe.name_annotations(config, split)
    if changes := recipe.adapt_to_machine(config, amp):
        runtime.say(f"no CUDA: {', '.join(changes)}")
    if args.launcher == "pytorch" and "RANK" not in os.environ:
        raise UserError("--launcher pytorch needs processes started by torchrun")
    if args.launcher != "none" and not torch.cuda.is_available():
        _join_on_cpu(config)
    return config


def _join_on_cpu(config: "Config") -> None:
    """Join the processes of a machine without GPUs, which mmengine would require."""
    if config.launcher != "pytorch":
        raise UserError(
            f"--launcher {config.launcher} needs GPUs; without, use torchrun and pytorch"
        )
    torch.distributed.init_process_group("gloo")
    config.model_wrapper_cfg = {
        "type": "MMDistributedDataParallel",
        "device_ids": None,
        "broadcast_buffers": False,
    }


def build_runner(config: "Config", path: str, evaluating: bool = False) -> "Runner":
    """Return mmengine's runner of a config, which refuses checkpoints that do not fit.

    Args:
        config: From :func:`prepare`.
        path: Its name in messages.
        evaluating: A checkpoint must hold the whole detector, as it must to resume.

    Raises:
        UserError, ModelError: mmengine or mmdet cannot build what the config asks for.
    """
    from mmengine.hooks import Hook
    from mmengine.runner import Runner

    resuming = config.get("resume", False)

    class Fit(Hook):
        """Looks at a checkpoint before mmengine loads what happens to fit."""

        def after_load_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
            source = str(config.get("load_from") or f"the last checkpoint of {config.work_dir}")
            if resuming and not {"meta", "optimizer", "message_hub"} <= set(checkpoint):
                raise CheckpointError(
                    f"{source} holds weights, and no state of a run to resume: "
                    f"--cfg-options load_from={source} starts from them"
                )
            model = getattr(runner.model, "module", runner.model)
            checkpoints.check_fit(model, checkpoint, source, whole=resuming or evaluating)

    with runtime.understood(f"cannot run {path}"):
        runner = Runner.from_cfg(config)
    runtime.check_channels(getattr(runner.model, "module", runner.model))
    runner.register_hook(Fit())
    return runner


def load_data(runner: "Runner", split: str, path: str) -> None:
    """Build the loop of ``split`` (train, val or test) with its dataset and metrics.

    Raises:
        UserError: The dataset or a metric's annotations cannot be used, or do not fit the model.
    """
    from mmdet.evaluation import CocoMetric

    from object_detection import mmdet_data

    settings = (runner.cfg.get(f"{split}_dataloader") or {}).get("dataset") or {}
    file = os.path.join(settings.get("data_root") or "", settings.get("ann_file") or "")
    model = getattr(runner.model, "module", runner.model)
    try:
        dataset = getattr(runner, f"{split}_dataloader").dataset
    except runtime.EXPECTED_ERRORS:
        raise
    except runtime.REFUSALS as error:
        # an empty list is the first thing that mmengine stumbles on
        is_empty = "at least one array" in str(error)
        reason = "its filter_cfg leaves no image" if is_empty else runtime.last_line(error)
        raise UserError(f"{path} cannot load {file or split}: {reason}") from error
    classes, known = dataset.metainfo.get("classes", ()), runtime.number_of_classes(model)
    if known != len(classes):
        raise UserError(
            f"{path}: the data has {len(classes)} classes, and the heads know {known}: set "
            f"num_classes"
        )
    if split == "train":
        mmdet_data.train_boxes_alone(model, dataset)
        return
    for metric in getattr(runner, f"{split}_loop").evaluator.metrics:
        if isinstance(metric, CocoMetric):
            mmdet_data.truth_of(metric)
