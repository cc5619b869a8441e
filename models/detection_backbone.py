"""Detection backbones: registered models as feature pyramids, for images of any size.

The same class serves mmdet and torchvision. It wraps the stages of the classifier. Detection
differs only in options of the classifier: windows instead of global attention, no position
embeddings, and windows that shift whatever the size of the feature map, as in the original.
"""

import copy
import re
from collections.abc import Mapping, Sequence
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d, trunc_normal_
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from .checkpoint.apply import COMPUTED_KEYS, LoadReport, load_weights, to_own_names
from .errors import ModelError
from .factory import build_model, is_own
from .freezing import freeze_stages, is_frozen
from .layers import set_recompute_activations
from .layers.fuse import fused
from .load import read_weights
from .visformer import Stage, Visformer

NATIVE_SIZE = 224
NORMS = {"BN": nn.BatchNorm2d, "LN": LayerNorm2d, "none": nn.Identity}
# options that let a classifier accept images of any size; a model gets those that it has
ANY_SIZE = {"strict_img_size": False, "dynamic_img_size": True}
LEVEL = re.compile(r"norm\d+\.")


class FeaturePyramid(nn.Module):
    """Four feature maps of strides s/4, s/2, s and 2s from one of stride s.

    Exploring Plain Vision Transformer Backbones (ViTDet, arXiv 2203.16527), section 3, without
    the projections to the detector's width: the detector's neck has its own.

    Args:
        dim: Channels of the feature map, a multiple of 4.
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
    """Stages of a classifier as a feature pyramid.

    If all feature maps of the model have one stride (ViT, ConViT), :class:`FeaturePyramid` makes
    four levels of the last one, and images are padded at the right and bottom to whole patches.

    Args:
        net: Model with timm's ``forward_intermediates`` and ``feature_info``. Its classifier and
            all layers that no output needs are removed.
        out_indices: Levels to return, indices into ``net.feature_info`` (or into the pyramid);
            default: the last four.
        frozen_stages: Number of stages to freeze: -1 for none, 0 for the stem alone, k for the
            stem and the first k stages. Frozen parameters get no gradient, and frozen layers
            stay in evaluation mode.
        norm_eval: Keep the BatchNorm layers of ``net`` in evaluation mode.
        with_cp: Recompute blocks in the backward pass instead of keeping their activations.
        level_norm: Norm of every output level, ``"BN"``, ``"LN"`` or ``"none"``.
        init_cfg: ``{"type": "Pretrained", "checkpoint": FILE}``, the weights that
            :meth:`init_weights` loads; ``"ema": True`` selects the moving average,
            ``"prefix": "backbone."`` the weights below this prefix. Without, it is detected.

    Attributes:
        num_features: Channels of the outputs.
        strides: Strides of the outputs.

    Raises:
        ModelError: An argument is out of range, or the model does not support it.
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
            raise ModelError(
                f"{type(net).__name__} does not return feature maps: a backbone needs timm's "
                f"feature_info and forward_intermediates"
            )
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
                raise ModelError(
                    f"{type(net).__name__} does not support with_cp=True: {error}"
                ) from None
        if level_norm not in NORMS:
            raise ModelError(f"level_norm {level_norm!r} must be one of {', '.join(NORMS)}")
        for index, dim in zip(self.out_indices, self.num_features, strict=True):
            norm = NORMS[level_norm]
            self.add_module(f"norm{index}", norm() if norm is nn.Identity else norm(dim))
        set_recompute_activations(net, True)
        if getattr(net, "channels_last", False):
            self.to(memory_format=torch.channels_last)
        self.frozen = self._freeze(frozen_stages)
        self.register_load_state_dict_pre_hook(_adopt_names)

    @property
    def qk_scale_factor(self) -> float:
        """Exponent of the query/key pre-scale."""
        return self.net.qk_scale_factor

    @qk_scale_factor.setter
    def qk_scale_factor(self, exponent: float) -> None:
        self.net.qk_scale_factor = exponent

    def _freeze(self, stages: int) -> list[str]:
        """Freeze the stem and the first ``stages``; return the names of the frozen modules."""
        if stages < 0:
            return []
        freeze_stages(self.net, stages)
        return [name for name, module in self.net.named_modules() if name and is_frozen(module)]

    def train(self, mode: bool = True) -> "Backbone":
        """Set the mode, but keep frozen stages, and with ``norm_eval`` BatchNorm, in evaluation."""
        super().train(mode)
        if mode:
            for name, module in self.net.named_modules():
                fixed_norm = self.norm_eval and isinstance(module, _BatchNorm)
                if fixed_norm or name in self.frozen:
                    module.eval()
        return self

    def init_weights(self) -> LoadReport | None:
        """Load the checkpoint of ``init_cfg``, if given; see :func:`load_backbone`."""
        if self.init_cfg is None:
            return None
        given = {key: value for key, value in self.init_cfg.items() if key in ("ema", "prefix")}
        return load_backbone(self, self.init_cfg["checkpoint"], **given)

    def fuse(self) -> "Backbone":
        """Return a fused copy for inference; see :class:`models.layers.fuse.Fusible`.

        Raises:
            ModelError: The model cannot be fused.
        """
        copied = copy.deepcopy(self).eval()
        copied.net = fused(self.net, type(self.net).__name__)
        return copied

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Image ``B 3 H W`` to the feature maps of ``out_indices``, ``B C H/s W/s`` each."""
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
    """Return True if a model has several feature maps, all of one stride."""
    reductions = [level["reduction"] for level in net.feature_info]
    return len(reductions) > 1 and len(set(reductions)) == 1


def _checked_indices(out_indices: Sequence[int] | None, count: int) -> tuple[int, ...]:
    if out_indices is None:
        return tuple(range(max(count - 4, 0), count))
    indices = tuple(out_indices)
    if not indices or any(index not in range(count) for index in indices):
        raise ModelError(f"out_indices {indices} must be a selection of {tuple(range(count))}")
    if list(indices) != sorted(set(indices)):
        raise ModelError(
            f"out_indices {indices} must be in ascending order: {tuple(sorted(set(indices)))}"
        )
    return indices


def _checked_init_cfg(init_cfg: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if init_cfg is None:
        return None
    init_cfg = dict(init_cfg)
    known = {"type", "checkpoint", "ema", "prefix"}
    if (
        init_cfg.get("type") != "Pretrained"
        or "checkpoint" not in init_cfg
        or set(init_cfg) - known
        or not isinstance(init_cfg.get("prefix"), str | None)
    ):
        raise ModelError(
            f"init_cfg {init_cfg} must be dict(type='Pretrained', checkpoint=FILE), optionally "
            f"with ema=True for the moving average and prefix='backbone.' for a part of the file"
        )
    return init_cfg


def _adopt_names(
    backbone: Backbone, state_dict: dict[str, torch.Tensor], prefix: str, *_: object
) -> None:
    """Convert the original's names when the state_dict of a whole detector is loaded."""
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
    """Convert weights of a classifier or a detector, in any known layout, to ``backbone``'s.

    Keys of a detector's backbone have the prefix ``backbone.``; its other keys are not changed.
    In the original, norms of levels (``norm0.bn.weight``) are at the same level as the stages.
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


def load_backbone(
    backbone: Backbone, path: str, ema: bool = False, prefix: str | None = None
) -> LoadReport:
    """Load the weights of a classifier or of a detector into a backbone.

    Weights of a classifier that the backbone does not have (head, final norm, position
    embeddings) are ignored. Norms of levels, and relative position biases of windows that
    replace global attention, keep their initial values. The report lists both.

    Args:
        backbone: Receives the weights.
        path: Any source of :func:`models.load_model`: a file, an address, ``hf-hub:ORG/NAME``,
            ``local-dir:FOLDER``, or a model name for timm's weights.
        ema: Load the moving average instead of the raw weights.
        prefix: Load only the weights below it, with or without its last dot.

    Raises:
        CheckpointError: The file cannot be read, or does not have the backbone's weights.
    """

    def allow_unexpected(key: str) -> bool:
        name = key.removeprefix("net.")
        if name == key:
            return True  # other parts of a detector, or norms of levels that are not returned
        return name in backbone.pruned or name.startswith("pos_embed")

    def allow_missing(key: str) -> bool:
        return not key.startswith("net.") or key.endswith("relative_position_bias_table")

    checkpoint = read_weights(str(path))
    return load_weights(
        backbone,
        checkpoint,
        str(path),
        ema,
        allow_missing=allow_missing,
        allow_unexpected=allow_unexpected,
        prefix=prefix or "",
    )


class VisionBackbone(Backbone):
    """Any model that timm can build, as a backbone.

    Visformer's global attention is too expensive on large feature maps. Windows replace it, each
    as large as the feature map of an image of 224 pixels, and position embeddings are left out,
    as in the original detector. Other models resample theirs in every forward.

    Args:
        model: Registered name.
        out_indices, frozen_stages, norm_eval, with_cp, init_cfg: See :class:`Backbone`.
        drop_path_rate: Stochastic depth.
        level_norm: See :class:`Backbone`; default: ``"LN"`` for models of one stride, ``"BN"``
            for other models of this repository, ``"none"`` for the rest.
        model_kwargs: Further arguments of the model, such as ``{"use_pos_embed": True}`` to
            keep Visformer's position embeddings.

    Raises:
        ModelError: The name or an argument is unknown.
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
            ours = "BN" if is_own(type(net)) else "none"
            level_norm = "LN" if _is_plain(net) else ours
        super().__init__(net, out_indices, frozen_stages, norm_eval, with_cp, level_norm, init_cfg)


def _detection_options(model: str) -> dict[str, Any]:
    """Return the keyword arguments of a classifier for detection, used where it has them."""
    if not timm.is_model(model) or timm.model_entrypoint(model).__module__ != Visformer.__module__:
        return ANY_SIZE
    with torch.device("meta"):
        net = timm.create_model(model)
    stages = tuple(
        stage._replace(window=NATIVE_SIZE // level["reduction"])
        if stage.num_heads and stage.window is None
        else stage
        for stage, level in zip(net.stages, net.feature_info, strict=True)
    )
    return ANY_SIZE | {"stages": stages, "use_pos_embed": False, "clamp_shift": False}


class SwinVisformer(Backbone):
    """Visformer with windows, with the keyword names of the original detector.

    Danczs/Visformer, ObjectDetection. Windows have sides of 56, 28, 14 and 7 positions and shift
    in every second block. If stages 0 and 1 have attention (``attn_stage="1111"``), their shifted
    windows are masked too, unlike in the original.

    Args:
        init_channels: Channels of the stem.
        num_classes, pool: Ignored: a backbone does not have a classifier.
        embed_dim: Channels of stage 2; the stages have 1/4, 1/2, 1 and 2 times as many.
        depth: Blocks of the four stages.
        num_heads: Heads of each of the four stages, or one number for all.
        mlp_ratio: Hidden channels, in multiples of the stage's, of feed-forward parts without a
            3x3 convolution; those with one have 2, or 5/6 if ``group`` is 1.
        qkv_bias: Learn a bias for queries, keys and values.
        qk_scale: Exponent of the query/key pre-scale, -0.25 if ``None``.
        drop_rate, attn_drop_rate, drop_path_rate: Dropout of projections and of attention
            weights, and stochastic depth.
        norm_layer: ``"BN"`` or ``"LN"``, in blocks and at the levels.
        attn_stage, spatial_conv: One digit per stage: 1 for attention, or for a 3x3 convolution.
        group: Groups of the 3x3 convolutions.
        conv_init: He initialisation of convolutions; otherwise normal of std 0.02.
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
                raise ModelError(f"{name} {value} must have four numbers, one per stage")
        for name, value in (("attn_stage", attn_stage), ("spatial_conv", spatial_conv)):
            if not re.fullmatch("[01]{4}", value):
                raise ModelError(f"{name} {value!r} must have four digits, 0 or 1, one per stage")
        if norm_layer not in ("BN", "LN"):
            raise ModelError(f"norm_layer {norm_layer!r} must be one of 'BN', 'LN'")
        stages = []
        for index in range(4):
            dim = embed_dim * 2**index // 4
            spatial, attends = spatial_conv[index] == "1", attn_stage[index] == "1"
            share = min(2**index / 4, 1)  # of the stage's channels, for all heads together
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
