"""What the commands share: a working mmdet, and errors of one line."""

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

from models import ModelError
from object_detection import checkpoints
from training.launch import fail
from utils import UserError

if TYPE_CHECKING:
    from mmengine.config import Config
    from torch import nn

INSTALL = "pip install -r object_detection/requirements.txt"
# what mmengine and mmdet raise for a config that they cannot build
REFUSALS = (KeyError, TypeError, ValueError, AttributeError, AssertionError, RuntimeError)
DATA = ("/torch/utils/data/", "/mmdet/datasets/", "/mmengine/dataset/", "/pycocotools/")


EXPECTED_ERRORS = (UserError, ModelError, OSError)


def load_mmdet() -> None:
    """Import mmdet with all its parts and this repository's backbones.

    Raises:
        UserError: It is missing, or not of a version that runs; the message says what is needed.
    """
    for name in ("mmengine", "mmcv", "mmdet"):
        if importlib.util.find_spec(name) is None:
            raise UserError(f"{name} is not installed: {INSTALL}")
    try:
        version = importlib.import_module("mmdet").__version__
        if not version.startswith("3."):
            raise UserError(f"mmdet {version} is installed, and 3 is needed: {INSTALL}")
        # what it says meanwhile is about parts that are not used here
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            importlib.import_module("mmdet.utils").register_all_modules(init_default_scope=True)
        importlib.import_module("object_detection.mmdet_backbones")
    except (ImportError, AssertionError) as error:
        raise UserError(f"mmdet cannot be imported ({last_line(error)}): {INSTALL}") from error
    checkpoints.install_loader()


def choose_device(name: str | None) -> torch.device:
    """The device of that name; if none is given, a GPU where there is one.

    Raises:
        UserError: There is no such device here.
    """
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: {last_line(error)}") from error
    return device


@contextlib.contextmanager
def understood(what: str) -> Iterator[None]:
    """Turn what mmengine and mmdet raise for a wrong config into a UserError."""
    try:
        yield
    except EXPECTED_ERRORS:
        raise
    except REFUSALS as error:
        raise UserError(f"{what}: {last_line(error)}") from error


def build_model(config: "Config", path: str) -> "nn.Module":
    """The detector of a config, on the CPU, with SyncBN as BatchNorm.

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
    """Raise UserError if a detector's pyramid expects other channels than its backbone gives."""
    given = getattr(getattr(model, "backbone", None), "num_features", None)
    expected = getattr(getattr(model, "neck", None), "in_channels", given)
    if isinstance(given, list) and list(expected) != given:
        raise UserError(f"model.neck.in_channels is {expected}, and the backbone gives {given}")


def say(message: str) -> None:
    """Print, of several processes the first."""
    if os.environ.get("RANK", "0") == "0":
        print(message, flush=True)


def number_of_classes(model: "nn.Module") -> int:
    """Classes that a detector's heads know.

    Raises:
        UserError: It has no heads, or they disagree.
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
    """The last line that an error says: what a loader's process died of, its cause included."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[-1] if lines else type(error).__name__
    text = text.partition(" Please check whether the value")[0]  # mmengine's advice, at length
    if isinstance(error, KeyError):  # which quotes its text
        return text.strip("'\"") if " " in text else f"there is no {text}"
    return text


def run(command: Callable[[argparse.Namespace], None], args: argparse.Namespace) -> int:
    """Run ``command``; an error that a user can mend is printed as one line.

    Returns:
        The exit status.
    """
    try:
        load_mmdet()
        command(args)
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    except EXPECTED_ERRORS as error:
        return fail(last_line(error))
    except KeyboardInterrupt:
        return fail("interrupted; train --resume continues from the last checkpoint", 130)
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        if any(part in frame.filename for frame in frames for part in DATA):
            return fail(f"an image or its annotation cannot be used: {last_line(error)}")
        raise
    return 0
