"""Read mmdet's configs, change them by flags, and adapt them to the machine."""

import argparse
import inspect
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from object_detection.runtime import REFUSALS, last_line
from training.parser import positive
from utils import UserError

if TYPE_CHECKING:
    from mmengine.config import Config


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the flags that change a config."""
    parser.add_argument("config", help="config file of mmdet 3")
    parser.add_argument(
        "--cfg-options",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="values that replace those of the config, such as train_dataloader.batch_size=4",
    )


def add_size(parser: argparse.ArgumentParser) -> None:
    """Add the flag of the image size, ``args.size`` as width and height."""
    parser.add_argument(
        "--size",
        nargs=2,
        type=positive,
        default=(1280, 800),
        metavar=("WIDTH", "HEIGHT"),
        help="pixels of the image; 1280 800",
    )


def read_config(path: str, options: Sequence[str] = (), data_root: str | None = None) -> "Config":
    """Read a config, and change it.

    A config is Python and is executed: treat it as a program.

    Args:
        path: Config file.
        options: ``KEY=VALUE``, with dots for nested keys.
        data_root: Replaces the config's ``data_root`` wherever it occurs.

    Raises:
        UserError: The file cannot be read, or an option does not fit it.
    """
    from mmengine.config import Config

    if not Path(path).is_file():
        raise UserError(f"config {path} does not exist")
    try:
        config = Config.fromfile(path)
    except Exception as error:  # whatever the executed file raises
        raise UserError(f"cannot read config {path}: {last_line(error)}") from error
    changes = parse_options(options, config)
    data_root = changes.pop("data_root", data_root)
    if data_root is not None:
        replace_root(config, str(data_root))
    try:
        config.merge_from_dict(changes)
    except (*REFUSALS, IndexError) as error:
        raise UserError(f"--cfg-options do not fit {path}: {last_line(error)}") from error
    if "model" not in config:
        raise UserError(f"{path} does not define model")
    return config


def parse_options(options: Sequence[str], config: "Config") -> dict[str, Any]:
    """Parse ``KEY=VALUE`` into a dict; the first part of each key must be known."""
    from mmengine.config import DictAction
    from mmengine.runner import Runner

    known = {*config, *inspect.signature(Runner).parameters, "data_root"}
    for option in options:
        name, equals, _ = option.partition("=")
        if not equals:
            raise UserError(f"--cfg-options {option} must have the form KEY=VALUE")
        if name.split(".")[0] not in known:
            raise UserError(f"--cfg-options {option}: unknown key {name.split('.')[0]}")
    parsed = argparse.Namespace(changes={})
    try:
        DictAction(["--cfg-options"], "changes")(None, parsed, options)
    except AssertionError as error:
        raise UserError(f"--cfg-options: {error}") from error
    return parsed.changes


def replace_root(config: "Config", root: str) -> None:
    """Replace the config's ``data_root`` in every path that begins with it."""
    old = config.get("data_root")
    if not old:
        raise UserError("the config does not have a data_root to replace")
    root = os.path.join(root, "")

    def replaced(value: Any) -> Any:
        if isinstance(value, str):
            return root + value.removeprefix(old) if value.startswith(old) else value
        if isinstance(value, dict):
            return {key: replaced(part) for key, part in value.items()}
        return type(value)(map(replaced, value)) if isinstance(value, list | tuple) else value

    config.merge_from_dict({key: replaced(value) for key, value in config.to_dict().items()})


def name_annotations(config: "Config", split: str) -> None:
    """Let metrics without an annotation file compare with that of their dataset, in place."""
    dataset = (config.get(f"{split}_dataloader") or {}).get("dataset") or {}
    evaluators = config.get(f"{split}_evaluator") or []
    for evaluator in evaluators if isinstance(evaluators, list) else [evaluators]:
        if evaluator.get("type") == "CocoMetric" and not evaluator.get("ann_file"):
            name = dataset.get("ann_file")
            evaluator["ann_file"] = name and os.path.join(dataset.get("data_root") or "", name)


def adapt_to_machine(config: "Config", amp: bool | None = None) -> list[str]:
    """Switch mixed precision as requested; without a GPU, replace what needs one.

    Args:
        config: Changed in place.
        amp: Mixed precision; the config's if not given.

    Returns:
        The changes made because there is no GPU.
    """
    wrapper = config.get("optim_wrapper") or {}
    mixed = wrapper.get("type") == "AmpOptimWrapper"
    wanted = mixed if amp is None else amp
    changes = []
    if wanted and not torch.cuda.is_available():
        wanted = False
        changes.append("float32 for mixed precision")
    if wanted != mixed:
        wrapper["type"] = "AmpOptimWrapper" if wanted else "OptimWrapper"
        for key in ("loss_scale", "dtype", "use_fsdp"):
            wrapper.pop(key, None)
        if wanted:
            wrapper["loss_scale"] = "dynamic"
    if not torch.cuda.is_available() and _replace_norm(config["model"]):
        changes.append("BatchNorm of each process for SyncBN")
    return changes


def _replace_norm(value: Any) -> bool:
    """Replace every SyncBN by BN in place; return True if there was one."""
    if isinstance(value, dict):
        here = value.get("type") in ("SyncBN", "MMSyncBN")
        if here:
            value["type"] = "BN"
        return any([here, *map(_replace_norm, value.values())])
    if isinstance(value, list | tuple):
        return any(list(map(_replace_norm, value)))
    return False
