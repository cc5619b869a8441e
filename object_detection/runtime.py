"""Shared by the commands on mmdet: its import, configs, models, and errors of one line."""

import argparse
import contextlib
import importlib
import inspect
import io
import os
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from object_detection import checkpoints, masks
from training.launch import USER_ERRORS, run_program
from utils import UserError

if TYPE_CHECKING:
    from mmengine.config import Config
    from torch import nn

# keys of a config that mmengine's runner reads besides those of its signature
RUNNER_KEYS = {"model_wrapper_cfg", "find_unused_parameters", "sync_bn", "compile"}
RUNNER_KEYS |= {"activation_checkpointing", "efficient_conv_bn_eval"}
INSTALL = "pip install -r object_detection/requirements.txt"


def load_mmdet() -> None:
    """Import mmdet with all its parts and this repository's backbones.

    Raises:
        UserError: It is missing, or another version; the message says how to install it.
    """
    masks.use_coco_api()
    try:
        for name in ("mmengine", "mmcv", "mmdet"):
            version = importlib.import_module(name).__version__
        if not version.startswith("3."):
            raise ImportError(f"mmdet {version} is installed")
        # warnings and output are about parts that are not used here
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            importlib.import_module("mmdet.utils").register_all_modules(init_default_scope=True)
        importlib.import_module("object_detection.mmdet_backbones")
        importlib.import_module("object_detection.mmdet_data").install()
    except (ImportError, AssertionError) as error:
        reason = f"mmdet 3 cannot be imported ({last_line(error)})"
        raise UserError(f"{reason}: {INSTALL}") from error
    checkpoints.install_loader()


def last_line(error: BaseException) -> str:
    """Return the last line of an error, with its kind."""
    return traceback.format_exception_only(error)[-1].strip().splitlines()[-1]


@contextlib.contextmanager
def understood(what: str) -> Iterator[None]:
    """Convert what mmengine and mmdet raise for a wrong config into UserError."""
    try:
        yield
    except USER_ERRORS:
        raise
    except Exception as error:  # of any kind: a config is a program
        raise UserError(f"{what}: {last_line(error)}") from error


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


def read_config(path: str, options: Sequence[str] = (), data_root: str | None = None) -> "Config":
    """Read a config, and change it.

    A config is Python and is executed: treat it as a program.

    Args:
        path: Config file.
        options: ``KEY=VALUE``, with dots for nested keys; the first part must be known.
        data_root: Replaces the config's ``data_root`` wherever it occurs.

    Raises:
        UserError: The file cannot be read, or an option does not fit it.
    """
    from mmengine.config import Config, DictAction
    from mmengine.runner import Runner

    with understood(f"cannot read config {path}"):
        config = Config.fromfile(path)
    given = argparse.Namespace(changes={})
    with understood(f"--cfg-options {' '.join(options)} must be KEY=VALUE"):
        DictAction(["--cfg-options"], "changes")(None, given, options)
    root = given.changes.pop("data_root", data_root)
    if root is not None:
        with understood(f"cannot replace the data_root of {path}"):
            moved = _moved(config.to_dict(), config.data_root, os.path.join(str(root), ""))
            config.merge_from_dict(moved)
    known = RUNNER_KEYS.union(config, inspect.signature(Runner).parameters)
    for key in given.changes:
        if key.partition(".")[0] not in known:
            raise UserError(f"--cfg-options {key}: {path} does not have {key.partition('.')[0]}")
    with understood(f"--cfg-options do not fit {path}"):
        config.merge_from_dict(given.changes)
    return config


def _moved(value: Any, old: str, root: str) -> Any:
    """Return a config's value with ``root`` for ``old`` at the beginning of every path."""
    if isinstance(value, dict):
        return {key: _moved(part, old, root) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_moved(part, old, root) for part in value)
    is_path = isinstance(value, str) and value.startswith(old)
    return root + value.removeprefix(old) if is_path else value


def build_model(config: "Config", path: str) -> "nn.Module":
    """Return the detector of a config, on the CPU, with SyncBN as BatchNorm.

    Raises:
        UserError, ModelError: mmdet cannot build it.
    """
    from mmdet.registry import MODELS
    from mmengine.model import revert_sync_batchnorm

    with understood(f"cannot build the model of {path}"):
        model = revert_sync_batchnorm(MODELS.build(config.model))
    check_channels(model)
    return model


def check_channels(model: "nn.Module") -> None:
    """Raise UserError if the neck's input channels are not those of the backbone."""
    given = getattr(getattr(model, "backbone", None), "num_features", None)
    expected = getattr(getattr(model, "neck", None), "in_channels", given)
    if isinstance(given, list) and list(expected) != given:
        raise UserError(f"model.neck.in_channels is {expected}, and the backbone gives {given}")


def number_of_classes(model: "nn.Module") -> int:
    """Return the number of classes of a detector's heads.

    Raises:
        UserError: It does not have heads, or they disagree.
    """
    heads = getattr(model, "roi_head", None) or getattr(model, "bbox_head", None)
    parts = heads.modules() if heads else ()
    found = {part.num_classes for part in parts if hasattr(part, "num_classes")}
    if len(found) != 1:
        raise UserError(f"the heads of {type(model).__name__} know {sorted(found)} classes")
    return found.pop()


def run(command: Callable[[argparse.Namespace], None], args: argparse.Namespace) -> int:
    """Run ``command``; print an error that the user can fix as one line; return the status."""

    def program() -> None:
        load_mmdet()
        try:
            command(args)
        except OSError as error:
            raise UserError(last_line(error)) from error
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()

    resumes = "interrupted; train --resume continues from the last checkpoint"
    return run_program(program, resumes)
