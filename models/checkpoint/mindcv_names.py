"""Convert names of MindCV's weights to those of the original PyTorch implementations."""

import re
from collections.abc import Mapping

import torch

__all__ = ["fill_missing_bias_tables", "to_original_names"]

EMA = "ema."  # in front of the moving average

# applied in order to every name; first those of MindCV 0.2.2's ViT
RENAMES = (
    (r"^backbone\.pos_embedding$", "pos_embed"),
    (r"^backbone\.patch_embedding\.conv\.", "patch_embed.proj."),
    (r"^backbone\.transformer\.layers\.(\d+)\.0\.cell\.0\.", r"blocks.\1.norm1."),
    (r"^backbone\.transformer\.layers\.(\d+)\.0\.cell\.1\.qkv\.", r"blocks.\1.attn.qkv."),
    (r"^backbone\.transformer\.layers\.(\d+)\.0\.cell\.1\.out\.", r"blocks.\1.attn.proj."),
    (r"^backbone\.transformer\.layers\.(\d+)\.1\.cell\.0\.", r"blocks.\1.norm2."),
    (r"^backbone\.transformer\.layers\.(\d+)\.1\.cell\.1\.dense([12])\.", r"blocks.\1.mlp.fc\2."),
    (r"^head\.classifier\.", "head."),
    (r"^backbone\.", ""),
    # ConViT
    (r"^classifier\.", "head."),
    # every norm
    (r"\.gamma$", ".weight"),
    (r"\.beta$", ".bias"),
    (r"\.moving_mean$", ".running_mean"),
    (r"\.moving_variance$", ".running_var"),
)
# a model's names; others without a dot (epoch_num, learning_rate, ...) are the trainer's
MODEL = re.compile(r"pos_embed\d*|cls_token|.*\..*")
PROJECTION = re.compile(r"(.+\.attn\.)([qkv])\.(weight|bias)")  # ConViT's separate ones
BIAS_TABLE = "relative_position_bias_table"


def _rename(name: str) -> str:
    for pattern, replacement in RENAMES:
        name = re.sub(pattern, replacement, name)
    return name


def _copies(state: Mapping[str, torch.Tensor]) -> set[str]:
    """Return the first components that only prefix other names of ``state``.

    A single such name says nothing: Visformer has ``norm.gamma`` and ``patch_embed1.norm.gamma``.
    """
    parts = [name.partition(".") for name in state if "." in name]
    of_model = {first for first, _, rest in parts if rest not in state}
    return {first for first, _, _ in parts} - of_model


def _join_projections(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Join q, k, v of ConViT's blocks: ``qk`` and ``v`` in gated ones, ``qkv`` in the others."""
    joined = {}
    for name, value in weights.items():
        match = PROJECTION.fullmatch(name)
        block, part, last = match.groups() if match else ("", "", "")
        parts = "qk" if f"{block}gating_param" in weights else "qkv"
        if part not in parts or not part:
            joined[name] = value
            continue
        sources = [f"{block}{p}.{last}" for p in parts]
        missing = [source for source in sources if source not in weights]
        if missing:
            raise ValueError(f"{name} lacks its companion {', '.join(missing)}")
        if part == "q":
            try:
                joined[f"{block}{parts}.{last}"] = torch.cat([weights[s] for s in sources])
            except (RuntimeError, TypeError) as error:
                raise ValueError(f"{', '.join(sources)} cannot be joined: {error}") from error
    return joined


def to_original_names(
    state: Mapping[str, torch.Tensor], ema: bool = False
) -> tuple[dict[str, torch.Tensor], tuple[str, ...]]:
    """Convert weights under MindCV's names to the original PyTorch names.

    For Visformer, VisformerV2, ConViT and ViT of MindCV, of version 0.2.2 for ViT too. Norms of
    Visformer get timm's names, without the original's wrapper ``bn``. A training checkpoint also
    holds the trainer's counters, and copies of the model's parameters with one more component in
    front: moments of the optimizer (``adam_m.head.weight``), and the moving average (``ema.``).

    MindCV's GELU is the tanh approximation, and its VisformerV2 was built with the exponent -0.5
    of the query/key pre-scale: neither is in the weights.

    Args:
        state: Result of :func:`models.checkpoint.mindspore.read_mindspore`.
        ema: Return the moving average instead of the raw weights.

    Returns:
        The weights, and the ignored names of ``state``.

    Raises:
        ValueError: There is no moving average, two names become one, or a query, key or value
            projection lacks its companions or does not fit them.
    """
    copies = {*_copies(state), EMA.rstrip(".")}
    chosen = {n: n for n in state if MODEL.fullmatch(n) and n.partition(".")[0] not in copies}
    if ema:
        chosen = {name: name.removeprefix(EMA) for name in state if name.startswith(EMA)}
        if not chosen:
            raise ValueError(f"it has no moving average: no name begins with {EMA!r}")
    weights = {}
    for name, own in chosen.items():
        target = _rename(own)
        if target in weights:
            raise ValueError(f"{name} and another parameter are both called {target}")
        weights[target] = state[name]
    return _join_projections(weights), tuple(name for name in state if name not in chosen)


def fill_missing_bias_tables(
    state: Mapping[str, torch.Tensor], own: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Add zero tables of relative position bias to weights without any.

    MindCV's VisformerV2 attends globally without that bias: zero tables are equivalent where
    windows cover the map. Weights that hold any table are unchanged, so that a missing one stays
    an error.

    Args:
        state: Weights under the original names.
        own: The model's state dict, for names, shapes and dtypes.
    """
    if any(name.endswith(BIAS_TABLE) for name in state):
        return dict(state)
    tables = {
        name: torch.zeros(value.shape, dtype=value.dtype)
        for name, value in own.items()
        if name.endswith(BIAS_TABLE)
    }
    return {**state, **tables}
