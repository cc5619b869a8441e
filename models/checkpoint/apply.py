"""Reading checkpoint files, safely, and loading weights into a model, strictly."""

import argparse
import importlib
import json
import pickle
import re
import stat
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import safetensors
import torch
from torch import nn

from models.checkpoint.archive import verify_archive
from models.checkpoint.checksum import file_digest, verify_checksum
from models.checkpoint.contents import settings_of, state_dict_of
from models.checkpoint.mindcv_names import fill_missing_bias_tables
from models.checkpoint.mindspore import MindSporeError, looks_like_mindspore, read_mindspore
from models.checkpoint.pickled import UnsafeFileError
from models.checkpoint.report import LoadReport
from models.errors import CheckpointError
from models.layers import set_gelu, set_qk_scale_factor

JSON_METADATA = {"model_kwargs", "classes", "input_size", "args"}  # of a header with the first
COMPUTED_KEYS = ("relative_position_index", "attn_mask", "rel_indices")
START_BYTES = 256  # enough to tell the formats apart
SHOWN = 4


def fetch(url: str) -> Path:
    """Download a checkpoint into torch.hub's folder, once.

    A name such as ``visformer_small-839e1f5b.pth`` holds the first digits of the file's
    SHA-256, which are verified; a copy that fails is fetched again.

    Raises:
        CheckpointError: The address names no file, or downloading or the digits fail.
    """
    name = Path(urlparse(url).path).name
    if name in ("", ".."):
        raise CheckpointError(f"cannot download {url}: it names no file")
    path = Path(torch.hub.get_dir(), "checkpoints", name)
    digits = re.search(r"-([0-9a-f]{8,})\.", name)
    try:
        if path.is_file() and (not digits or _digest(path).startswith(digits[1])):
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(
            url, str(path), hash_prefix=digits and digits[1], progress=False
        )
    except (OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"cannot download {url}: {error}") from error
    return path


def _digest(path: Path) -> str:
    with path.open("rb", buffering=0) as file:
        return file_digest(file, path.stat().st_size).hexdigest()


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint file onto the CPU without executing anything it holds.

    Accepted are PyTorch files of tensors and plain values, with an ``argparse.Namespace``
    as DeiT's and Visformer's files hold, safetensors, and MindSpore's ``.ckpt`` of MindCV's
    networks. The content decides, not the name. The file's seal is verified first, if it has
    one (see :mod:`models.checkpoint.checksum`), and what it would have torch.load do (see
    :mod:`models.checkpoint.archive`).

    Args:
        path: File, or http(s) address of one.

    Raises:
        CheckpointError: The file is missing, damaged, of another kind, or a pickle that
            asks for more than plain values.
    """
    path = fetch(str(path)) if str(path).startswith(("http://", "https://")) else Path(path)
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # a pipe would be waited for
            raise CheckpointError(f"cannot read checkpoint {path}: it is no regular file")
        verify_checksum(path)
        size = status.st_size
        with path.open("rb") as file:
            start = file.read(START_BYTES)
    except OSError as error:
        raise CheckpointError(f"cannot read checkpoint {path}: {error.strerror}") from error
    if not start:
        raise CheckpointError(f"{path} is empty, not a checkpoint")
    try:
        if start[8:9] == b"{":
            return _read_safetensors(path)
        if looks_like_mindspore(start, size):
            return _read_mindspore(path)
        verify_archive(path)
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except MindSporeError as error:
        raise CheckpointError(str(error)) from error
    except UnsafeFileError as error:
        raise CheckpointError(f"{path} {error}") from error
    except Exception as error:  # bytes of any kind make the readers raise errors of any kind
        raise CheckpointError(f"{path} {_why_unreadable(error)}") from error
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not a checkpoint")
    return dict(content)


def _read_safetensors(path: Path) -> dict[str, Any]:
    """The tensors under ``state_dict``, and the texts of the header, JSON where it is ours."""
    with safetensors.safe_open(path, "pt") as file:
        content: dict[str, Any] = dict(file.metadata() or {})
        for key in JSON_METADATA & content.keys() if "model_kwargs" in content else ():
            content[key] = json.loads(content[key])
        content["state_dict"] = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    return content


def _read_mindspore(path: Path) -> dict[str, Any]:
    """The parameters under ``mindspore``, and what MindCV's networks compute with them."""
    state = read_mindspore(path)
    content: dict[str, Any] = {"mindspore": state, "gelu": "tanh"}
    if any(name.endswith("patch_embed0.proj.weight") for name in state):
        content["qk_scale_factor"] = -0.5  # VisformerV2
    return content


def _why_unreadable(error: Exception) -> str:
    wanted = re.search(r"GLOBAL ([\w.]+)", str(error))
    if wanted and "nsupported" in str(error):
        return (
            f"is refused: it asks for {wanted[1]}, and a checkpoint may hold tensors and plain "
            f"values only"
        )
    if isinstance(error, pickle.UnpicklingError | IndexError | KeyError):
        return "is not a checkpoint, or damaged"
    reason = str(error).strip() or type(error).__name__
    return f"is damaged or cut short ({reason.splitlines()[0][:200]})"


def to_own_names(state: Mapping[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """Weights in any layout that the model's file knows -> weights in the model's own."""
    own = model.state_dict()
    # what has the right keys and shapes needs no filter (timm's may rename on suspicion)
    if {k: v.shape for k, v in state.items()} == {k: v.shape for k, v in own.items()}:
        return dict(state)
    modules = (importlib.import_module(cls.__module__) for cls in type(model).__mro__)
    converts = (getattr(module, "checkpoint_filter_fn", None) for module in modules)
    convert = next(filter(None, converts), lambda state, model: state)
    return dict(convert(dict(state), model))


def _nothing(key: str) -> bool:
    return False


def load_weights(
    model: nn.Module,
    checkpoint: Mapping[str, Any],
    source: str,
    ema: bool = False,
    new_head: bool = False,
    spare: Callable[[str], bool] = _nothing,
    fresh: Callable[[str], bool] = _nothing,
    other_classes: bool = False,
) -> LoadReport:
    """Load the weights of a checkpoint that has been read; see :func:`load_checkpoint`.

    Args:
        model, checkpoint, source, ema, new_head: See there.
        spare: Tells of a key of the checkpoint that the model may lack.
        fresh: Tells of a key of the model that the checkpoint may lack.
        other_classes: With ``new_head``, leave a classifier of the same shape, too.
    """
    state, others = state_dict_of(checkpoint, source, ema)
    own = model.state_dict()
    ignored = [k for k in state if k.rpartition(".")[2] in COMPUTED_KEYS and k not in own]
    state = {key: value for key, value in state.items() if key not in ignored}
    settings = settings_of(checkpoint, source)
    try:
        converted = to_own_names(state, model)
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as e:
        # shapes of any kind make conversions raise errors of any kind
        raise CheckpointError(f"{source} does not fit the model: {e or type(e).__name__}") from e
    if "mindspore" in checkpoint:
        converted = fill_missing_bias_tables(converted, own)
    dropped = [key for key in converted if key not in own and spare(key)]
    converted = {key: value for key, value in converted.items() if key not in dropped}
    # counters that other frameworks do not keep, and no function depends on
    converted = {k: own[k] for k in own if k.endswith(".num_batches_tracked")} | converted
    left = _unfit_head(model, converted, own, other_classes) if new_head else []
    left += [key for key in own if key not in converted and fresh(key)]
    for key in left:
        converted[key] = own[key]
    _check_fit(converted, own, source)
    model.load_state_dict(converted)
    resampled = (k for k, v in converted.items() if k in state and v.shape != state[k].shape)
    return LoadReport(
        source=source,
        loaded=tuple(key for key in own if key not in left),
        renamed=tuple(key for key in state if key not in own and key not in dropped),
        resampled=tuple(key for key in resampled if key not in left),
        ignored=(*ignored, *others),
        left=tuple(left),
        dropped=tuple(dropped),
        notes=tuple(_apply(model, *settings)),
    )


def load_checkpoint(
    model: nn.Module, path: str | Path, ema: bool = False, new_head: bool = False
) -> LoadReport:
    """Load a checkpoint file into ``model``, strictly.

    Layouts that the model's file knows are converted (for Visformer the original's and
    timm's); position embeddings and biases are resampled to the model's size. Where the
    checkpoint says with which exponent of the query/key pre-scale, or which GELU, its weights
    were trained, the model takes that over.

    Args:
        model: Receives the weights.
        path: File in any form that :func:`read_checkpoint` takes.
        ema: Load the moving average instead of the raw weights.
        new_head: Leave a classifier of another number of classes at its initial value.

    Returns:
        What was loaded, renamed, resampled and left.

    Raises:
        CheckpointError: The file cannot be read, or keys or shapes differ from the model's;
            the message names the first few, and the model is unchanged.
    """
    return load_weights(model, read_checkpoint(path), str(path), ema, new_head)


def _unfit_head(
    model: nn.Module,
    state: Mapping[str, torch.Tensor],
    own: Mapping[str, torch.Tensor],
    other_classes: bool,
) -> list[str]:
    """Keys of the classifier that the state has in another shape, for others or not at all."""
    names = (getattr(model, "pretrained_cfg", None) or {}).get("classifier") or ()
    heads = tuple(f"{name}." for name in ([names] if isinstance(names, str) else names))
    return [
        key
        for key in own
        if heads and key.startswith(heads)
        if other_classes or key not in state or state[key].shape != own[key].shape
    ]


def _apply(model: nn.Module, exponent: float | None, gelu: str) -> Iterator[str]:
    """Make the model compute what the weights were trained for; says what was changed."""
    if exponent is not None and getattr(model, "qk_scale_factor", exponent) != exponent:
        set_qk_scale_factor(model, exponent)
        yield f"pre-scale exponent {exponent}, as trained"
    if gelu != "none":
        set_gelu(model, gelu)
        yield f"{gelu} GELU, as trained"


def _check_fit(
    state: Mapping[str, torch.Tensor], own: Mapping[str, torch.Tensor], source: str
) -> None:
    missing = [key for key in own if key not in state]
    unknown = [key for key in state if key not in own]
    shapes = [
        f"{key} ({tuple(state[key].shape)} for {tuple(own[key].shape)})"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    kinds = [
        f"{key} ({state[key].dtype} for {own[key].dtype})"
        for key in own
        if key in state and _kind(state[key]) != _kind(own[key])
    ]
    parts = [
        f"{len(keys)} {what}: {', '.join(keys[:SHOWN])}{', ...' if len(keys) > SHOWN else ''}"
        for what, keys in (
            ("missing", missing),
            ("not in the model", unknown),
            ("of another shape", shapes),
            ("of another kind", kinds),
        )
        if keys
    ]
    if parts:
        raise CheckpointError(f"{source} does not fit the model: {'; '.join(parts)}")


def _kind(tensor: torch.Tensor) -> tuple[bool, bool]:
    """What copying a tensor into another must not change: float32 to bfloat16 may be."""
    return tensor.is_floating_point(), tensor.is_complex()
