"""Layers that the model families share: one implementation of each."""

from .attention import (
    Attention2d,
    SelfAttention,
    attention,
    attention_weights,
    set_fused_attention,
    set_gelu,
    set_qk_scale_factor,
)
from .block import Block2d
from .checkpointing import checkpoint_blocks, set_recompute_activations
from .drop_path import DropPath, add_branch, drop_path_rates
from .mlp import Mlp2d
from .position import (
    resample_bias_table,
    resample_position_map,
    resample_tokens,
)
from .window import WindowAttention2d

__all__ = [
    "Attention2d",
    "Block2d",
    "DropPath",
    "Mlp2d",
    "SelfAttention",
    "WindowAttention2d",
    "add_branch",
    "attention",
    "attention_weights",
    "checkpoint_blocks",
    "drop_path_rates",
    "resample_bias_table",
    "resample_position_map",
    "resample_tokens",
    "set_fused_attention",
    "set_gelu",
    "set_qk_scale_factor",
    "set_recompute_activations",
]
