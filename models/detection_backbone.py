"""The registered models as detection backbones: feature pyramids of images of any size.

One object serves mmdet and torchvision. It wraps the classifier's own stages; what differs in
detection are options of the classifier: windows instead of global attention, no position
embeddings, windows that shift regardless of the map's size, as in the original's backbone.
"""

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d, trunc_normal_
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from models.checkpoint.apply import COMPUTED_KEYS, LoadReport, load_weights, to_own_names
from models.checkpoint.read import read_checkpoint
from models.errors import ModelError
from models.factory import build_model
from models.freezing import freeze_stages, is_frozen
from models.layers import set_recompute_activations
from models.visformer import Stage, Visformer

NATIVE_SIZE = 224
NORMS = {"BN": nn.BatchNorm2d, "LN": LayerNorm2d, "none": nn.Identity}
# what makes a classifier take images of any size; each model is given what it knows of these
ANY_SIZE = {"strict_img_size": False, "dynamic_img_size": True}
LEVEL = re.compile(r"norm\d+\.")


class FeaturePyramid(nn.Module):
    """Four maps of strides s/4, s/2, s and 2s out of one of stride s.

    Exploring Plain Vision Transformer Backbones (ViTDet, arXiv 2203.16527), section 3; the
    projections to the detector's width are left to its own pyramid.

    Args:
        dim: Channels of the map, a multiple of 4.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.dims = (dim // 4, dim // 2, dim, dim)
        self.scale0 = nn.Sequential(
            nn.ConvTranspose2d(dim, dim // 2, 2, stride=2),
            LayerNorm2d(dim // 2),
            nn.GELU(),
            nn.ConvTranspose2d(dim // 2, dim // 4, 2, stride=2),
        )
        self.scale1 = nn.ConvTranspose2d(dim, dim // 2, 2, stride=2)
        self.scale2 = nn.Identity()
        self.scale3 = nn.MaxPool2d(2, ceil_mode=True)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        """``B C H W`` to ``B C/4 4H 4W``, ``B C/2 2H 2W``, ``B C H W`` and ``B C H/2 W/2``."""
        return [getattr(self, f"scale{level}")(x) for level in range(len(self.dims))]


class Backbone(nn.Module):
    """A classifier's stages as a feature pyramid.

    A net whose feature maps are all of one stride (ViT, ConViT) gives its last map, from which
    :class:`FeaturePyramid` makes four levels; images are padded at the right and bottom to whole
    patches.

    Args:
        net: A model with timm's ``forward_intermediates`` and ``feature_info``. Its classifier
            and what no output needs are removed.
        out_indices: Levels to return, counted as in ``net.feature_info`` (or in the pyramid);
            the last four if not given.
        frozen_stages: Parameters that do not learn, and layers that stay in evaluation mode:
            -1 none, 0 those of the stem, k also those of the first k stages.
        norm_eval: Keep the net's BatchNorm in evaluation mode.
        with_cp: Recompute blocks in the backward pass instead of keeping their activations.
        level_norm: Norm of every output level, ``"BN"``, ``"LN"`` or ``"none"``.
        init_cfg: ``{"type": "Pretrained", "checkpoint": FILE}`` to load by :meth:`init_weights`;
            ``"ema": True`` takes the moving average. A ``"prefix"``, as mmengine has it, is found
            without being named.

    Attributes:
        num_features: Channels of the outputs.
        strides: Strides of the outputs.

    Raises:
        ModelError: An argument is out of range, or the net cannot do what is asked.
    """

    def __init__(
        self,
        net: nn.Module,
        out_indices: Sequence[int] | None = None,
        frozen_stages: int = -1,
        norm_eval: bool = False,
        with_cp: bool = False,
        level_norm: str = "none",
        init_cfg: Mapping[str, Any] | None = None,
    ):
        super().__init__()
        self.init_cfg = _checked_init_cfg(init_cfg)
        self.frozen_stages, self.norm_eval = frozen_stages, norm_eval
        info = list(getattr(net, "feature_info", ()))
        if not info or not hasattr(net, "forward_intermediates"):
            raise ModelError(f"{type(net).__name__} gives no feature maps")
        reductions = [level["reduction"] for level in info]
        plain = _is_plain(net)
        if plain:
            self.patch = reductions[-1]
            self.pyramid = FeaturePyramid(info[-1]["num_chs"])
            dims = self.pyramid.dims
            strides = [self.patch * 2**power // 4 for power in range(4)]
        else:
            self.patch, self.pyramid = 1, None
            dims, strides = [level["num_chs"] for level in info], reductions
        self.out_indices = _checked_indices(out_indices, len(dims))
        self.num_features = [dims[index] for index in self.out_indices]
        self.strides = [strides[index] for index in self.out_indices]

        self.net = net
        self.net_indices = (len(info) - 1,) if plain else self.out_indices
        before = set(net.state_dict())
        if hasattr(net, "prune_intermediate_layers"):
            net.prune_intermediate_layers(list(self.net_indices), prune_norm=True, prune_head=True)
        self.pruned = before - set(net.state_dict())
        if with_cp:
            try:
                net.set_grad_checkpointing(True)
            except (AttributeError, AssertionError) as error:
                raise ModelError(f"{type(net).__name__} cannot recompute blocks: {error}") from None
        if level_norm not in NORMS:
            raise ModelError(f"level_norm {level_norm!r} is none of {', '.join(NORMS)}")
        for index, dim in zip(self.out_indices, self.num_features, strict=True):
            norm = NORMS[level_norm]
            self.add_module(f"norm{index}", norm() if norm is nn.Identity else norm(dim))
        set_recompute_activations(net, True)
        if getattr(net, "channels_last", False):
            self.to(memory_format=torch.channels_last)
        self.resting = self._freeze(frozen_stages)
        self.register_load_state_dict_pre_hook(_adopt_names)

    @property
    def qk_scale_factor(self) -> float:
        """Exponent of the query/key pre-scale."""
        return self.net.qk_scale_factor

    @qk_scale_factor.setter
    def qk_scale_factor(self, exponent: float) -> None:
        self.net.qk_scale_factor = exponent

    def _freeze(self, stages: int) -> list[str]:
        """Stop the learning of the stem and the first ``stages``; returns the modules that rest."""
        if stages < 0:
            return []
        freeze_stages(self.net, stages)
        return [name for name, module in self.net.named_modules() if name and is_frozen(module)]

    def train(self, mode: bool = True) -> "Backbone":
        """Set the mode; frozen stages, and with ``norm_eval`` all BatchNorm of the net, rest."""
        super().train(mode)
        if mode:
            for name, module in self.net.named_modules():
                normalises = self.norm_eval and isinstance(module, _BatchNorm)
                if normalises or name in self.resting:
                    module.eval()
        return self

    def init_weights(self) -> LoadReport | None:
        """Load the checkpoint of ``init_cfg``, if there is one; see :func:`load_backbone`."""
        if self.init_cfg is None:
            return None
        return load_backbone(self, self.init_cfg["checkpoint"], ema=self.init_cfg.get("ema", False))

    def fuse(self) -> "Backbone":
        """A copy for inference of the same function; see :class:`models.layers.fuse.Fusible`.

        Raises:
            ModelError: The net has no such form.
        """
        if not hasattr(self.net, "fuse"):
            raise ModelError(f"{type(self.net).__name__} has no inference form")
        fused = copy.deepcopy(self).eval()
        fused.net = fused.net.fuse()
        return fused

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Image ``B 3 H W`` to the maps of ``out_indices``, ``B C H/s W/s`` each."""
        height, width = x.shape[-2:]
        if height % self.patch or width % self.patch:
            x = F.pad(x, (0, -width % self.patch, 0, -height % self.patch))
        if getattr(self.net, "channels_last", False):
            x = x.contiguous(memory_format=torch.channels_last)
        maps = self.net.forward_intermediates(
            x, indices=list(self.net_indices), stop_early=True, intermediates_only=True
        )
        if self.pyramid is not None:
            levels = self.pyramid(maps[-1])
            maps = [levels[index] for index in self.out_indices]
        return tuple(
            getattr(self, f"norm{index}")(x)
            for index, x in zip(self.out_indices, maps, strict=True)
        )


def _is_plain(net: nn.Module) -> bool:
    """Whether all feature maps of a net are of one stride."""
    reductions = [level["reduction"] for level in net.feature_info]
    return len(reductions) > 1 and len(set(reductions)) == 1


def _checked_indices(out_indices: Sequence[int] | None, count: int) -> tuple[int, ...]:
    if out_indices is None:
        return tuple(range(max(count - 4, 0), count))
    indices = tuple(out_indices)
    if not indices or any(index not in range(count) for index in indices):
        raise ModelError(f"out_indices {indices} must be some of {tuple(range(count))}")
    if list(indices) != sorted(set(indices)):
        raise ModelError(f"out_indices {indices} must ascend")
    return indices


def _checked_init_cfg(init_cfg: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if init_cfg is None:
        return None
    init_cfg = dict(init_cfg)
    known = {"type", "checkpoint", "ema"}
    if (
        init_cfg.get("type") != "Pretrained"
        or "checkpoint" not in init_cfg
        or set(init_cfg) - known
    ):
        raise ModelError(
            f"init_cfg {init_cfg} must be dict(type='Pretrained', checkpoint=FILE), with ema=True "
            f"for the moving average"
        )
    return init_cfg


def _adopt_names(
    backbone: Backbone, state_dict: dict[str, torch.Tensor], prefix: str, *_: object
) -> None:
    """Let ``load_state_dict`` of the whole detector take the original's names as well."""
    state = {key: value for key, value in state_dict.items() if key.startswith(prefix)}
    own = {key.removeprefix(prefix): value for key, value in state.items()}
    if own and not any(key.startswith("net.") for key in own):
        for key in state:
            del state_dict[key]
        converted = checkpoint_filter_fn(own, backbone)
        state_dict.update({prefix + key: value for key, value in converted.items()})


def checkpoint_filter_fn(
    state_dict: dict[str, torch.Tensor], backbone: Backbone
) -> dict[str, torch.Tensor]:
    """Weights of a classifier or of a detector, in any known layout -> those of ``backbone``.

    A detector's backbone has the prefix ``backbone.``; the rest of it keeps its names. In the
    original's, norms of levels (``norm0.bn.weight``) lie beside those of the net.
    """
    others = {}
    if any(key.startswith("backbone.") for key in state_dict):
        others = {k: v for k, v in state_dict.items() if not k.startswith("backbone.")}
        state_dict = {
            key.removeprefix("backbone."): value
            for key, value in state_dict.items()
            if key not in others
        }
    if any(key.startswith("net.") for key in state_dict):
        return others | state_dict
    levels = {k: v for k, v in state_dict.items() if LEVEL.match(k)}
    net = {
        key: value
        for key, value in state_dict.items()
        if key not in levels and key.rpartition(".")[2] not in COMPUTED_KEYS
    }
    net = {f"net.{key}": value for key, value in to_own_names(net, backbone.net).items()}
    return others | net | {key.replace(".bn.", "."): value for key, value in levels.items()}


def load_backbone(backbone: Backbone, path: str, ema: bool = False) -> LoadReport:
    """Load the weights of a classifier or of a detector into a backbone.

    Of a classifier, what a backbone has not (head, last norm, position embeddings if they are
    left out) is dropped; norms of levels, and biases of windows that take the place of global
    attention, keep their initial values. All of that is reported.

    Args:
        backbone: Receives the weights.
        path: File or address, in any form that :func:`models.read_checkpoint` takes.
        ema: Take the moving average instead of the raw weights.

    Raises:
        CheckpointError: The file cannot be read, or the backbone's weights are not in it.
    """

    def allow_unexpected(key: str) -> bool:
        name = key.removeprefix("net.")
        if name == key:
            return True  # of a detector's other parts, or of levels that are not returned
        return name in backbone.pruned or name.startswith("pos_embed")

    def allow_missing(key: str) -> bool:
        return not key.startswith("net.") or key.endswith("relative_position_bias_table")

    checkpoint = read_checkpoint(path)
    return load_weights(
        backbone,
        checkpoint,
        str(path),
        ema,
        allow_missing=allow_missing,
        allow_unexpected=allow_unexpected,
    )


class VisionBackbone(Backbone):
    """Any model that timm knows, as a backbone.

    Global attention of Visformer, too dear on large maps, is replaced by windows as large as the
    map of an image of 224 pixels, and its position embeddings are left out, as in the original
    detector. Those of other nets are resampled in every forward.

    Args:
        model: Registered name.
        out_indices, frozen_stages, norm_eval, with_cp, init_cfg: See :class:`Backbone`.
        drop_path_rate: Stochastic depth.
        level_norm: See :class:`Backbone`; if not given, ``"LN"`` for nets of one stride,
            ``"BN"`` for this repository's other nets, and none for the rest.
        model_kwargs: Further arguments of the model, such as ``{"use_pos_embed": True}``, by
            which Visformer keeps its position embeddings.

    Raises:
        ModelError: The name is unknown, or an argument is.
    """

    def __init__(
        self,
        model: str,
        out_indices: Sequence[int] | None = None,
        frozen_stages: int = -1,
        norm_eval: bool = False,
        with_cp: bool = False,
        drop_path_rate: float = 0.0,
        level_norm: str | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        init_cfg: Mapping[str, Any] | None = None,
    ):
        required = dict(model_kwargs or {})
        if drop_path_rate:
            required["drop_path_rate"] = drop_path_rate
        net, _ = build_model(model, required, _detection_options(model))
        if level_norm is None:
            ours = "BN" if type(net).__module__.startswith("models.") else "none"
            level_norm = "LN" if _is_plain(net) else ours
        super().__init__(net, out_indices, frozen_stages, norm_eval, with_cp, level_norm, init_cfg)


def _detection_options(model: str) -> dict[str, Any]:
    """Keyword arguments that make a detection backbone of a classifier, if it knows them."""
    if not timm.is_model(model) or timm.model_entrypoint(model).__module__ != Visformer.__module__:
        return ANY_SIZE
    with torch.device("meta"):
        net = timm.create_model(model)
    stages = tuple(
        replace(stage, window=NATIVE_SIZE // level["reduction"])
        if stage.num_heads and stage.window is None
        else stage
        for stage, level in zip(net.stages, net.feature_info, strict=True)
    )
    return ANY_SIZE | {"stages": stages, "use_pos_embed": False, "clamp_shift": False}


class SwinVisformer(Backbone):
    """Visformer with windows, by the keyword names of the original's detector.

    Danczs/Visformer, ObjectDetection. Windows cover 56, 28, 14 and 7 positions a side and shift
    in every second block. Where stages 0 and 1 attend (``attn_stage="1111"``), shifted windows
    are masked there too, which the original left out.

    Args:
        init_channels: Channels of the stem.
        num_classes, pool: Without effect, as there is no classifier.
        embed_dim: Channels of stage 2; the stages have 1/4, 1/2, 1 and 2 times as many.
        depth: Blocks of the four stages.
        num_heads: Heads of the four stages, or of each.
        mlp_ratio: Hidden channels in multiples of the stage's, where the feed-forward part has
            no 3x3 convolution; otherwise 2, or 5/6 if ``group`` is 1.
        qkv_bias: Learn a bias for queries, keys and values.
        qk_scale: Exponent of the query/key pre-scale, -0.25 if ``None``.
        drop_rate, attn_drop_rate, drop_path_rate: Dropout of projections, of attention weights,
            stochastic depth.
        norm_layer: ``"BN"`` or ``"LN"``, in blocks and at the levels.
        attn_stage, spatial_conv: One digit per stage: 1 where it attends, or has a 3x3
            convolution.
        group: Groups of that convolution.
        conv_init: He initialisation of convolutions; otherwise normal of deviation 0.02.
        out_indices, frozen_stages, norm_eval, init_cfg: See :class:`Backbone`.
        use_checkpoint: Recompute blocks in the backward pass.

    Raises:
        ModelError: An argument is out of range.
    """

    def __init__(
        self,
        init_channels: int = 32,
        num_classes: int = 1000,
        embed_dim: int = 384,
        depth: Sequence[int] = (0, 7, 4, 4),
        num_heads: int | Sequence[int] = 6,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        qk_scale: float | None = None,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        norm_layer: str = "BN",
        attn_stage: str = "1111",
        spatial_conv: str = "1111",
        group: int = 8,
        pool: bool = True,
        conv_init: bool = False,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        frozen_stages: int = -1,
        norm_eval: bool = False,
        use_checkpoint: bool = False,
        init_cfg: Mapping[str, Any] | None = None,
    ):
        heads = [num_heads] * 4 if isinstance(num_heads, int) else list(num_heads)
        for name, value in (("depth", depth), ("num_heads", heads)):
            if len(value) != 4:
                raise ModelError(f"{name} {value} must be four numbers, one per stage")
        for name, value in (("attn_stage", attn_stage), ("spatial_conv", spatial_conv)):
            if not re.fullmatch("[01]{4}", value):
                raise ModelError(f"{name} {value!r} must be four digits, 0 or 1, one per stage")
        if norm_layer not in ("BN", "LN"):
            raise ModelError(f"norm_layer {norm_layer!r} must be 'BN' or 'LN'")
        stages = []
        for index in range(4):
            dim = embed_dim * 2**index // 4
            spatial, attends = spatial_conv[index] == "1", attn_stage[index] == "1"
            share = min(2**index / 4, 1)  # of the width, that the heads have
            stages.append(
                Stage(
                    depth[index],
                    dim,
                    num_heads=heads[index] if attends else None,
                    head_dim=int(dim // heads[index] * share) if attends else None,
                    window=NATIVE_SIZE // 2 ** (index + 2) if attends else None,
                    mlp_ratio=(2.0 if group > 1 else 5 / 6) if spatial else mlp_ratio,
                    spatial_groups=group if spatial else None,
                )
            )
        net = Visformer(
            stages,
            init_channels,
            use_pos_embed=False,
            clamp_shift=False,
            strict_img_size=False,
            qk_scale_factor=-0.25 if qk_scale is None else qk_scale,
            qkv_bias=qkv_bias,
            proj_drop_rate=drop_rate,
            attn_drop_rate=attn_drop_rate,
            drop_path_rate=drop_path_rate,
            norm_layer=NORMS[norm_layer],
        )
        if not conv_init:
            for module in net.modules():
                if isinstance(module, nn.Conv2d):
                    trunc_normal_(module.weight, std=0.02)
        super().__init__(
            net, out_indices, frozen_stages, norm_eval, use_checkpoint, norm_layer, init_cfg
        )
