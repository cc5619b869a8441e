"""Shared by the commands: a working mmdet, and one-line errors."""

import argparse
import contextlib
import importlib
import importlib.util
import io
import os
import traceback
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch

from object_detection import annotations, checkpoints
from training.launch import USER_ERRORS, run_program
from utils import UserError, printable

if TYPE_CHECKING:
    from mmengine.config import Config
    from torch import nn

INSTALL = "pip install -r object_detection/requirements.txt"
# what mmengine and mmdet raise for a config that they cannot build
REFUSALS = (KeyError, TypeError, ValueError, AttributeError, AssertionError, RuntimeError)
DATA = ("/torch/utils/data/", "/mmdet/datasets/", "/mmengine/dataset/", "/pycocotools/")
EXPECTED_ERRORS = (*USER_ERRORS, OSError)  # reported as they are


def load_mmdet() -> None:
    """Import mmdet with all its parts and this repository's backbones.

    Raises:
        UserError: It is missing, or its version is not supported; the message says what is needed.
    """
    for name in ("mmengine", "mmcv", "mmdet"):
        if importlib.util.find_spec(name) is None:
            raise UserError(f"{name} is not installed: {INSTALL}")
    annotations.use_coco_api()
    try:
        version = importlib.import_module("mmdet").__version__
        if not version.startswith("3."):
            raise UserError(f"mmdet {version} is installed, and 3 is needed: {INSTALL}")
        # warnings and output are about parts that are not used here
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            importlib.import_module("mmdet.utils").register_all_modules(init_default_scope=True)
        importlib.import_module("object_detection.mmdet_backbones")
        importlib.import_module("object_detection.mmdet_data").install()
    except (ImportError, AssertionError) as error:
        raise UserError(f"mmdet cannot be imported ({last_line(error)}): {INSTALL}") from error
    checkpoints.install_loader()


@contextlib.contextmanager
def understood(what: str) -> Iterator[None]:
    """Convert the errors of mmengine and mmdet for a wrong config into UserError."""
    try:
        yield
    except EXPECTED_ERRORS:
        raise
    except REFUSALS as error:
        raise UserError(f"{what}: {last_line(error)}") from error


def build_model(config: "Config", path: str) -> "nn.Module":
    """Return the detector of a config, on the CPU, with SyncBN as BatchNorm.

    Raises:
        UserError, ModelError: mmdet cannot build it.
    """
    from mmdet.registry import MODELS
    from mmengine.model import revert_sync_batchnorm

    with understood(f"cannot build the model of {path}"):
        model = revert_sync_batchnorm(MODELS.build(config["model"]))
    check_channels(model)
    return model


def check_channels(model: "nn.Module") -> None:
    """Raise UserError if the neck's input channels are not those of the backbone."""
    given = getattr(getattr(model, "backbone", None), "num_features", None)
    expected = getattr(getattr(model, "neck", None), "in_channels", given)
    if isinstance(given, list) and list(expected) != given:
        raise UserError(f"model.neck.in_channels is {expected}, and the backbone gives {given}")


def say(message: str) -> None:
    """Print on the first process only."""
    if os.environ.get("RANK", "0") == "0":
        print(printable(message), flush=True)


def number_of_classes(model: "nn.Module") -> int:
    """Return the number of classes of a detector's heads.

    Raises:
        UserError: It does not have heads, or they disagree.
    """
    heads = getattr(model, "roi_head", None) or getattr(model, "bbox_head", None)
    found = (
        {part.num_classes for part in heads.modules() if hasattr(part, "num_classes")}
        if heads
        else set()
    )
    if len(found) != 1:
        raise UserError(f"the heads of {type(model).__name__} know {sorted(found)} classes")
    return found.pop()


def last_line(error: BaseException) -> str:
    """Return the last line of an error's message, which names the cause in a loader process."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[-1] if lines else type(error).__name__
    text = text.partition(" Please check whether the value")[0]  # mmengine's advice, at length
    if isinstance(error, KeyError):  # its text is quoted
        return text.strip("'\"") if " " in text else f"there is no {text}"
    return text


def run(command: Callable[[argparse.Namespace], None], args: argparse.Namespace) -> int:
    """Run ``command``; print an error that the user can fix as one line; return the status."""

    def program() -> None:
        load_mmdet()
        try:
            command(args)
        except USER_ERRORS:
            raise
        except OSError as error:
            raise UserError(last_line(error)) from error
        except Exception as error:
            frames = traceback.extract_tb(error.__traceback__)
            if any(part in frame.filename for frame in frames for part in DATA):
                reason = f"an image or its annotation cannot be used: {last_line(error)}"
                raise UserError(reason) from error
            raise
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()

    resumes = "interrupted; train --resume continues from the last checkpoint"
    return run_program(program, resumes)
