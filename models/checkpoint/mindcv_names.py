"""Names of MindCV's weights -> names of the original PyTorch implementations; no reading."""

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
# names without a dot that a net has; others (epoch_num, learning_rate, ...) are the trainer's
NET = re.compile(r"pos_embed\d*|cls_token|.*\..*")
PROJECTION = re.compile(r"(.+\.attn\.)([qkv])\.(weight|bias)")  # ConViT's separate ones
BIAS_TABLE = "relative_position_bias_table"


def _rename(name: str) -> str:
    for pattern, replacement in RENAMES:
        name = re.sub(pattern, replacement, name)
    return name


def _copies(state: Mapping[str, torch.Tensor]) -> set[str]:
    """First components under which every name is another name of ``state`` with that in front.

    One alone says nothing: Visformer has ``norm.gamma`` and ``patch_embed1.norm.gamma``.
    """
    parts = [name.partition(".") for name in state if "." in name]
    of_net = {first for first, _, rest in parts if rest not in state}
    return {first for first, _, _ in parts} - of_net


def _join_projections(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """q, k, v of ConViT's blocks -> ``qk`` and ``v`` of gated ones, ``qkv`` of the others."""
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
            raise ValueError(f"{name} is there without {', '.join(missing)}")
        if part == "q":
            try:
                joined[f"{block}{parts}.{last}"] = torch.cat([weights[s] for s in sources])
            except (RuntimeError, TypeError) as error:
                raise ValueError(f"{', '.join(sources)} cannot be joined: {error}") from error
    return joined


def to_original_names(
    state: Mapping[str, torch.Tensor], ema: bool = False
) -> tuple[dict[str, torch.Tensor], tuple[str, ...]]:
    """Weights under MindCV's names -> weights under the original PyTorch names.

    For Visformer, VisformerV2, ConViT and ViT of MindCV, of version 0.2.2 for ViT too. Norms of
    Visformer get timm's names, without the original's wrapper ``bn``. A training checkpoint also
    holds the trainer's counters, and copies of the net's parameters with one more component in
    front: moments of the optimizer (``adam_m.head.weight``), and the moving average (``ema.``).

    MindCV's GELU is the tanh approximation, and its VisformerV2 was built with the exponent -0.5
    of the query/key pre-scale: neither is in the weights.

    Args:
        state: What :func:`models.checkpoint.mindspore.read_mindspore` returns.
        ema: Take the moving average instead of the raw weights.

    Returns:
        The weights, and the names in ``state`` that were left out.

    Raises:
        ValueError: There is no moving average, two names become one, or a query, key or value
            projection lacks its companions or does not fit them.
    """
    copies = {*_copies(state), EMA.rstrip(".")}
    chosen = {n: n for n in state if NET.fullmatch(n) and n.partition(".")[0] not in copies}
    if ema:
        chosen = {name: name.removeprefix(EMA) for name in state if name.startswith(EMA)}
        if not chosen:
            raise ValueError(f"there is no moving average: no name begins with {EMA!r}")
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
    """Add zero tables of relative position bias to weights of a net that has none.

    MindCV's VisformerV2 attends globally without that bias: zero tables make the same function
    where windows cover the map. Weights that hold any table come back as they are, so that a
    missing one stays an error.

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
