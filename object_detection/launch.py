"""mmengine's runner, with errors raised before the first image is read."""

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from engine import unwrap
from models import CheckpointError
from object_detection import checkpoints, runtime
from utils import UserError, log

if TYPE_CHECKING:
    from mmengine.config import Config
    from mmengine.runner import Runner

LAUNCHERS = ("none", "pytorch", "slurm", "mpi")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the flags of a run."""
    runtime.add_options(parser)
    parser.add_argument("--data-root", help="data folder; replaces the config's")
    parser.add_argument("--work-dir", help="folder for logs and checkpoints; output/NAME")
    parser.add_argument(
        "--launcher", choices=LAUNCHERS, default="none", help="what started the processes"
    )
    # what torch.distributed.launch adds without --use_env
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)


def prepare(args: argparse.Namespace) -> "Config":
    """Return the config of a run."""
    config = runtime.read_config(args.config, args.cfg_options, args.data_root)
    if args.local_rank is not None:
        os.environ.setdefault("LOCAL_RANK", str(args.local_rank))
    config.launcher = args.launcher
    config.work_dir = args.work_dir or config.get("work_dir") or f"output/{Path(args.config).stem}"
    if args.launcher == "pytorch" and "RANK" not in os.environ:
        raise UserError("--launcher pytorch needs processes started by torchrun")
    if args.launcher == "pytorch" and not torch.cuda.is_available():
        torch.distributed.init_process_group("gloo")  # mmengine joins processes of GPUs alone
        config.model_wrapper_cfg = {"type": "MMDistributedDataParallel", "device_ids": None}
    return config


def choose_precision(config: "Config", amp: bool | None) -> None:
    """Switch mixed precision in place: as requested, else as the config has it; on a GPU only."""
    wrapper = config.get("optim_wrapper") or {}
    if amp is None:
        amp = wrapper.get("type") == "AmpOptimWrapper"
    if amp and not torch.cuda.is_available():
        log("no CUDA: float32 instead of mixed precision")
        amp = False
    if amp:
        wrapper |= {"type": "AmpOptimWrapper", "loss_scale": wrapper.get("loss_scale", "dynamic")}
    elif wrapper.get("type") == "AmpOptimWrapper":
        wrapper["type"] = "OptimWrapper"
        for key in ("loss_scale", "dtype", "use_fsdp"):
            wrapper.pop(key, None)


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
            whole = resuming or evaluating
            checkpoints.check_fit(unwrap(runner.model), checkpoint, source, whole)

    with runtime.understood(f"cannot run {path}"):
        runner = Runner.from_cfg(config)
    runtime.check_channels(unwrap(runner.model))
    runner.register_hook(Fit())
    return runner


def load_data(runner: "Runner", split: str, path: str) -> None:
    """Build the loop of ``split`` (train, val or test) with its dataset and metrics.

    Raises:
        UserError: The dataset or a metric's annotations cannot be used, or do not fit the model.
    """
    from mmdet.evaluation import CocoMetric

    from object_detection import mmdet_data

    model = unwrap(runner.model)
    with runtime.understood(f"{path} cannot load its {split} data"):
        dataset = getattr(runner, f"{split}_dataloader").dataset
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
