"""Load the weights of a checkpoint into a model, strictly."""

import importlib
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.layers import resample_abs_pos_embed
from timm.models import adapt_input_conv
from torch import nn

from ..data_config import trained_size
from ..errors import CheckpointError, printable
from ..layers import set_gelu, set_qk_scale_factor
from .contents import settings_of, state_dict_of
from .mindcv_names import fill_missing_bias_tables
from .read import read_checkpoint

COMPUTED_KEYS = ("relative_position_index", "attn_mask", "rel_indices")
SHOWN = 4


@dataclass(frozen=True)
class LoadReport:
    """Outcome of :func:`load_checkpoint`.

    Attributes:
        source: Name of the file.
        loaded: Keys of the model that were filled.
        renamed: Keys of the checkpoint that have another name in the model.
        resampled: Keys of the model whose value was resampled to the model's size.
        ignored: Keys of the checkpoint that the model computes itself.
        missing: Keys of the model that keep their initial value.
        unexpected: Keys of the checkpoint that the model does not use.
        notes: Settings of the checkpoint that were applied to the model, and removed prefixes.
    """

    source: str
    loaded: tuple[str, ...]
    renamed: tuple[str, ...] = ()
    resampled: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        parts = [f"{len(self.loaded)} tensors loaded"]
        for what in ("renamed", "resampled", "ignored"):
            if keys := getattr(self, what):
                parts.append(f"{len(keys)} {what}")
        for what in ("missing", "unexpected"):
            if keys := getattr(self, what):
                names = dict.fromkeys(re.sub(r"(\.\d+\..*|\.[^.]*)$", "", key) for key in keys)
                parts.append(f"{what}: {', '.join(names)}")
        return printable(f"{self.source}: {', '.join((*parts, *self.notes))}")


def resampled_tokens(
    state: Mapping[str, torch.Tensor], model: nn.Module, size: tuple[int, int] | None
) -> dict[str, torch.Tensor]:
    """Resample position embeddings of tokens, ``1 P+N C``, to the grid of a model.

    Their shape does not tell the grid that they are of: 6 tokens are 3x2 patches or 2x3.

    Args:
        state: Weights.
        model: Receives the weights.
        size: Height and width in pixels of the images that they were trained for; None if unknown.

    Returns:
        ``pos_embed``; empty if the size is unknown or not that of the embeddings.
    """
    old, own = state.get("pos_embed"), getattr(model, "pos_embed", None)
    patch, embed = state.get("patch_embed.proj.weight"), getattr(model, "patch_embed", None)
    target = getattr(model, "grid_size", None) or getattr(embed, "grid_size", None)
    if size is None or target is None or patch is None or patch.ndim != 4:
        return {}
    if any(tokens is None or tokens.ndim != 3 for tokens in (old, own)):
        return {}
    grid = tuple(side // step for side, step in zip(size, patch.shape[-2:], strict=True))
    prefix = old.shape[1] - math.prod(grid)
    if prefix < 0 or prefix != own.shape[1] - math.prod(target):
        return {}
    if grid == tuple(target):
        return {"pos_embed": old}
    return {"pos_embed": resample_abs_pos_embed(old, target, grid, prefix)}


def to_own_names(
    state: Mapping[str, torch.Tensor], model: nn.Module, size: tuple[int, int] | None = None
) -> dict[str, torch.Tensor]:
    """Convert weights from any layout that the model's file knows to the model's own.

    Args:
        state, model, size: See :func:`resampled_tokens`.
    """
    own = model.state_dict()
    tokens = resampled_tokens(state, model, size)  # filters would take their grid for a square
    state = {key: value for key, value in state.items() if key not in tokens}
    # what has the right keys and shapes needs no filter (timm's may rename on suspicion)
    if {k: v.shape for k, v in (state | tokens).items()} == {k: v.shape for k, v in own.items()}:
        return state | tokens
    modules = (importlib.import_module(cls.__module__) for cls in type(model).__mro__)
    converts = (getattr(module, "checkpoint_filter_fn", None) for module in modules)
    convert = next(filter(None, converts), lambda state, model: state)
    return dict(convert(state, model)) | tokens


def summed_channels(state: Mapping[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the first convolution's weights of RGB images for a model of grey ones.

    They are summed over the channels, so that the model computes the same of grey images as the
    RGB model of three equal channels. The result is empty for other weights and models.
    """
    own = model.state_dict()
    names = (getattr(model, "pretrained_cfg", None) or {}).get("first_conv") or ()
    keys = [f"{name}.weight" for name in ([names] if isinstance(names, str) else names)]
    return {
        key: adapt_input_conv(1, state[key])
        for key in keys
        if key in own and key in state and state[key].ndim == 4
        if (own[key].shape[1], state[key].shape[1]) == (1, 3)
    }


def load_weights(
    model: nn.Module,
    checkpoint: Mapping[str, Any],
    source: str,
    ema: bool = False,
    new_head: bool = False,
    allow_missing: Callable[[str], bool] = lambda key: False,
    allow_unexpected: Callable[[str], bool] = lambda key: False,
    other_classes: bool = False,
    prefix: str = "",
) -> LoadReport:
    """Load the weights of a checkpoint that has been read; see :func:`load_checkpoint`.

    Args:
        model, ema, new_head: See :func:`load_checkpoint`.
        checkpoint: Content of the file.
        source: Name of the file, for messages.
        allow_missing: Return True for a key of the model that the checkpoint may lack.
        allow_unexpected: Return True for a key of the checkpoint that the model may lack.
        other_classes: With ``new_head``, skip a classifier of the same shape, too.
        prefix: Load only the weights below it.
    """
    own = model.state_dict()
    state, others, prefix = state_dict_of(checkpoint, source, ema, own, prefix)
    ignored = [k for k in state if k.rpartition(".")[2] in COMPUTED_KEYS and k not in own]
    state = {key: value for key, value in state.items() if key not in ignored}
    settings = settings_of(checkpoint, source)
    try:
        summed = summed_channels(state, model)
        converted = to_own_names(state | summed, model, trained_size(checkpoint))
        summed |= summed_channels(converted, model)  # of other names
        converted |= summed
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as e:
        # shapes of any kind make conversions raise errors of any kind
        raise CheckpointError(f"{source} does not fit the model: {e or type(e).__name__}") from e
    if "mindspore" in checkpoint:
        converted = fill_missing_bias_tables(converted, own)
    unexpected = [key for key in converted if key not in own and allow_unexpected(key)]
    converted = {key: value for key, value in converted.items() if key not in unexpected}
    # counters that other frameworks do not keep, and no function depends on
    converted = {k: own[k] for k in own if k.endswith(".num_batches_tracked")} | converted
    missing = _unfit_head(model, converted, own, other_classes) if new_head else []
    missing += [key for key in own if key not in converted and allow_missing(key)]
    for key in missing:
        converted[key] = own[key]
    _check_fit(converted, own, source)
    model.load_state_dict(converted)
    resampled = (
        key
        for key, value in converted.items()
        if key in state and key not in summed
        if value.shape != state[key].shape or (key == "pos_embed" and value is not state[key])
    )
    return LoadReport(
        source=source,
        loaded=tuple(key for key in own if key not in missing),
        renamed=tuple(key for key in state if key not in own and key not in unexpected),
        resampled=tuple(key for key in resampled if key not in missing),
        ignored=(*ignored, *others),
        missing=tuple(missing),
        unexpected=tuple(unexpected),
        notes=(
            *(f"{key}: 3 channels summed to 1" for key in summed),
            *_apply(model, prefix, *settings),
        ),
    )


def load_checkpoint(
    model: nn.Module, path: str | Path, ema: bool = False, new_head: bool = False
) -> LoadReport:
    """Load a checkpoint file into ``model``, strictly.

    Layouts that the model's file knows are converted (for Visformer the original's and
    timm's); position embeddings and biases are resampled to the model's size. If the checkpoint
    names the exponent of the query/key pre-scale or the GELU of its training, the model uses them.

    Args:
        model: Receives the weights.
        path: File in any format of :func:`models.read_checkpoint`.
        ema: Load the moving average instead of the raw weights.
        new_head: Keep the initial classifier where the number of classes differs.

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
    """Keys of the classifier that the state lacks, has in another shape or for other classes."""
    names = (getattr(model, "pretrained_cfg", None) or {}).get("classifier") or ()
    heads = tuple(f"{name}." for name in ([names] if isinstance(names, str) else names))
    return [
        key
        for key in own
        if heads and key.startswith(heads)
        if other_classes or key not in state or state[key].shape != own[key].shape
    ]


def _apply(model: nn.Module, prefix: str, exponent: float | None, gelu: str) -> Iterator[str]:
    """Give the model the settings that the weights were trained with; yield what was changed."""
    if prefix:
        yield f"prefix {prefix} removed"
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
    unexpected = [key for key in state if key not in own]
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
            ("unexpected", unexpected),
            ("of another shape", shapes),
            ("of another type", kinds),
        )
        if keys
    ]
    if parts:
        raise CheckpointError(f"{source} does not fit the model: {'; '.join(parts)}")


def _kind(tensor: torch.Tensor) -> tuple[bool, bool]:
    """Properties that a copy must keep; float32 may become bfloat16."""
    return tensor.is_floating_point(), tensor.is_complex()
