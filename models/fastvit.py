"""FastViT, "A Fast Hybrid Vision Transformer" (arXiv 2303.14189).

Convolutions mix tokens on the large feature maps, convolutions or attention on the smallest. For
training, a convolution has several branches; :meth:`FastViT.reparameterize` folds them into one.
Weights use timm's key layout; the original's (``network.0.0.token_mixer.mixer.rbr_skip.weight``)
converts by :func:`checkpoint_filter_fn`.
"""

import re
from collections.abc import Sequence
from itertools import chain

import torch
from timm.layers import ClassifierHead, trunc_normal_
from timm.models import generate_default_cfgs
from timm.models._features import feature_take_indices as take_indices
from torch import nn

from .base import StagedModel
from .factory import build_registered, register_model
from .layers import drop_path_rates
from .layers.fastvit import ConvFfn, FastViTStage, Stage, convolutional_stem
from .layers.reparam import LargeKernelConv, ReparamConv, reparameterize

__all__ = ["FastViT", "Stage"]

MIXERS = ("repmixer", "attention")


def _check_stages(stages: Sequence[Stage], cls_ratio: float) -> None:
    for index, stage in enumerate(stages):
        if stage.mixer not in MIXERS:
            raise ValueError(f"mixer {stage.mixer!r} of stage {index} must be one of {MIXERS}")
        before = stages[max(index - 1, 0)].dim
        if stage.dim % before:
            raise ValueError(
                f"dim {stage.dim} of stage {index} must be a multiple of the previous dim {before}"
            )
    if int(stages[-1].dim * cls_ratio) % stages[-1].dim or cls_ratio <= 0:
        raise ValueError(f"cls_ratio {cls_ratio} must be a positive whole number")


class FastViT(StagedModel):
    """FastViT classifier and backbone, for images of any size.

    Args:
        stages: Description of the stages, each a :class:`Stage` or the sequence of its values, as
            JSON has it.
        in_chans: Channels of the image.
        num_classes: Number of classes; 0 for no classifier, the output is then the pooled
            features.
        global_pool: timm's name of the pooling before the classifier.
        cls_ratio: Channels of the last convolution, in multiples of the last stage's.
        stem_stride: Stride of the stem, 4, 2 or 1; fewer for images of few pixels.
        qk_scale_factor: Exponent of the query/key pre-scale (see
            :class:`models.layers.Attention2d`); without effect where no stage has attention.
        layer_scale_init_value: Initial scale of the residual branches, 0 or ``None`` for
            none.
        drop_rate, proj_drop_rate, attn_drop_rate: Dropout before the classifier, after
            projections, of attention weights.
        drop_path_rate: Stochastic depth of the last block, growing linearly from 0.
        norm_layer: Norm before attention.
        patch_act: Activation within patch embeddings (see :class:`LargeKernelConv`).
        stem_scale: Give convolutions of the stem a 1x1 branch in training.
        inference_mode: Build the reparameterised form, for weights that are reparameterised.
        overparameterize: If False, stem, patch embeddings and final convolution have one branch
            each in training (the ablation of section 3.2.2).

    Raises:
        ValueError: The channels of stages do not fit, or a mixer is unknown.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        cls_ratio: float = 2.0,
        stem_stride: int = 4,
        qk_scale_factor: float = -0.25,
        layer_scale_init_value: float | None = 1e-5,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        norm_layer: type[nn.Module] = nn.BatchNorm2d,
        patch_act: bool = False,
        stem_scale: bool = True,
        inference_mode: bool = False,
        overparameterize: bool = True,
    ):
        super().__init__()
        stages = tuple(Stage(*stage) for stage in stages)
        _check_stages(stages, cls_ratio)
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.qk_scale_factor = qk_scale_factor
        attention = {"qk_scale_factor": qk_scale_factor, "attn_drop": attn_drop_rate}
        attention["norm_layer"] = norm_layer
        common = {"proj_drop": proj_drop_rate, "layer_scale_init_value": layer_scale_init_value}
        fused = {"inference_mode": inference_mode}
        self.stem = convolutional_stem(
            in_chans, stages[0].dim, stem_stride, use_scale=stem_scale, **fused
        )
        self.feature_info = []
        built, dim = [], None
        all_rates = drop_path_rates(drop_path_rate, [stage.depth for stage in stages])
        for index, (stage, rates) in enumerate(zip(stages, all_rates, strict=True)):
            built.append(FastViTStage(stage, dim, rates, attention, common, patch_act, **fused))
            dim = stage.dim
            self.feature_info.append(
                {"num_chs": dim, "reduction": stem_stride * 2**index, "module": f"stages.{index}"}
            )
        self.stages = nn.Sequential(*built)
        self.num_features = int(dim * cls_ratio)
        self.final_conv = ReparamConv(
            dim, self.num_features, 3, groups=dim, use_se=True, inference_mode=inference_mode
        )
        self.head = ClassifierHead(self.num_features, num_classes, global_pool, drop_rate)
        self.head_hidden_size = self.num_features * self.head.global_pool.feat_mult()
        if not (overparameterize or inference_mode):
            outside_blocks = (self.stem, self.final_conv, *(s.downsample for s in self.stages))
            for module in chain.from_iterable(part.modules() for part in outside_blocks):
                if isinstance(module, ReparamConv | LargeKernelConv):
                    module.drop_extra_branches_()
        self.init_weights()

    def init_weights(self) -> None:
        """Normal of std 0.02 in linear and feed-forward layers; PyTorch's in the rest."""
        self.apply(self.init_layer)

    @staticmethod
    def init_layer(module: nn.Module) -> None:
        """Normal of std 0.02 of linear and feed-forward layers."""
        if isinstance(module, ConvFfn):
            layers = [module.conv.conv, module.fc1, module.fc2]
        else:
            layers = [module] if isinstance(module, nn.Linear) else []
        for layer in layers:
            trunc_normal_(layer.weight, std=0.02)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)

    def reparameterize(self) -> "FastViT":
        """Fold the train-time branches into one convolution each, in place; return the model.

        The function in evaluation does not change. A second call does nothing.
        """
        reparameterize(self)
        return self

    def fuse_(self) -> None:
        """Reparameterise (see :class:`Fusible`)."""
        self.reparameterize()

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict:
        """Groups of parameters in the order of depth, for layer-wise learning-rate decay."""
        blocks = [
            (r"^stages\.(\d+)\.(?:downsample|pos_emb)", (-1,)),
            (r"^stages\.(\d+)\.blocks\.(\d+)", None),
        ]
        return {
            "stem": r"^stem",
            "blocks": r"^stages\.(\d+)" if coarse else blocks,
            "final_conv": r"^final_conv",
        }

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute blocks in the backward pass instead of keeping their activations."""
        for stage in self.stages:
            stage.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The linear classifier."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a new one (by none if ``num_classes`` is 0)."""
        self.num_classes = num_classes
        if global_pool is None:
            global_pool = self.head.global_pool.pool_type
        head = ClassifierHead(self.num_features, num_classes, global_pool, self.head.drop.p)
        self.head = self.initialised(head)
        self.head_hidden_size = self.num_features * head.global_pool.feat_mult()

    def forward_stem(self, x: torch.Tensor) -> torch.Tensor:
        """Image ``B 3 H W`` to ``B C H/s W/s`` by the stem of stride s."""
        return self.stem(x)

    def forward_stage(self, x: torch.Tensor, index: int) -> torch.Tensor:
        """``B C H W -> B D H/2 W/2`` (``B C H W`` for the first stage)."""
        return self.stages[index](x)

    def forward_last(self, x: torch.Tensor) -> torch.Tensor:
        """The last stage's feature map ``B C H W`` to ``B num_features H W``."""
        return self.final_conv(x)

    def prune_intermediate_layers(
        self,
        indices: int | Sequence[int] = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> list[int]:
        """Remove all layers that the given feature maps do not need; return their indices.

        The final convolution is removed with the head or the last stage: it is a part of the
        classifier.
        """
        wanted, last = take_indices(len(self.stages), indices)
        if prune_norm or prune_head or last + 1 < len(self.stages):
            self.final_conv = nn.Identity()
            self.num_features = self.feature_info[last]["num_chs"]
            self.reset_classifier(0, "")
        self.stages = self.stages[: last + 1]
        return wanted

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Feature map ``B D H W`` to logits ``B num_classes``, or to pooled features ``B D``."""
        return self.head(x, pre_logits=pre_logits)


RENAMED = (
    (r"^patch_embed\.", "stem."),
    (r"^conv_exp\.", "final_conv."),
    (r"^head\.(?=weight|bias)", "head.fc."),
    (r"\brbr_conv\b", "conv_kxk"),
    (r"\brbr_scale\b", "conv_scale"),
    (r"\brbr_skip\b", "identity"),
    (r"\blkb_origin\b", "large_conv"),
    (r"\blkb_reparam\b", "reparam_conv"),
    (r"\bconvffn\b", "mlp"),
    (r"\bse\.reduce\b", "se.fc1"),
    (r"\bse\.expand\b", "se.fc2"),
    (r"\bpe\.", "pos_enc."),
    (r"\b(layer_scale(?:_[12])?)$", r"\1.gamma"),
)


# of the image encoder in weights of MobileCLIP and of open_clip
ENCODERS = ("image_encoder.model.", "module.visual.trunk.", "visual.trunk.")


def checkpoint_filter_fn(
    state_dict: dict[str, torch.Tensor], model: FastViT
) -> dict[str, torch.Tensor]:
    """Convert weights in the layout of the original or of timm to the layout of ``model``.

    The original numbers patch embeddings, position encodings and the blocks of each stage in one
    sequence, ``network``. MobileCLIP's image encoder is taken out of weights of both encoders, its
    projection without a bias. Reparameterised weights fit only a reparameterised model.
    """
    prefix = next((p for p in ENCODERS if any(key.startswith(p) for key in state_dict)), "")
    if prefix:
        state_dict = {
            key.removeprefix(prefix): value
            for key, value in state_dict.items()
            if key.startswith(prefix)
        }
    places = []
    for index, stage in enumerate(model.stages):
        parts = {"downsample": stage.downsample, "pos_emb": stage.pos_emb, "blocks": stage.blocks}
        places += [
            f"stages.{index}.{name}"
            for name, part in parts.items()
            if not isinstance(part, nn.Identity)
        ]
    converted = {}
    for key, value in state_dict.items():
        if key == "head.proj":
            converted["head.fc.bias"] = value.new_zeros(value.shape[1])
            key, value = "head.fc.weight", value.T
        if found := re.match(r"network\.(\d+)\b", key):
            number = int(found[1])
            if number < len(places):
                key = places[number] + key[found.end() :]
        for pattern, name in RENAMED:
            key = re.sub(pattern, name, key)
        converted[key] = value
    return converted


def create_fastvit(name: str, pretrained: bool, **kwargs) -> FastViT:
    """Build the network of a registered name; ``kwargs`` are those of :class:`FastViT`."""
    indices = tuple(range(min(len(kwargs["stages"]), 4)))  # timm's, also of the five of MCi3
    return build_registered(FastViT, name, pretrained, checkpoint_filter_fn, indices, **kwargs)


def _cfg(**kwargs) -> dict:
    return {
        "input_size": (3, 256, 256),
        "pool_size": (8, 8),
        "crop_pct": 0.9,
        "first_conv": ("stem.0.conv_kxk.0.conv", "stem.0.conv_scale.conv"),
        "classifier": "head.fc",
        "license": "fastvit-license",
        "hf_hub_id": "timm/",
        **kwargs,
    }


default_cfgs = generate_default_cfgs(
    {
        f"fastvit_{size}.{tag}": _cfg(crop_pct=0.95 if size == "ma36" else 0.9)
        for tag in ("apple_in1k", "apple_dist_in1k")
        for size in ("t8", "t12", "s12", "sa12", "sa24", "sa36", "ma36")
    }
)


def doubling(
    depths: Sequence[int], dim: int, mlp_ratio: float = 4.0, attention: bool = False
) -> dict:
    """Stages of ``dim`` channels, doubled from stage to stage.

    With ``attention``, the last stage has a position encoding and attention.
    """
    stages = [Stage(depth, dim * 2**i, mlp_ratio) for i, depth in enumerate(depths)]
    if attention:
        stages[-1] = Stage(depths[-1], stages[-1].dim, mlp_ratio, "attention", True)
    return {"stages": tuple(stages)}


@register_model
def fastvit_t8(pretrained: bool = False, **kwargs) -> FastViT:
    """FastViT-T8: 4.0 M parameters (3.6 in the paper), 0.7 GMACs, 75.6 % on ImageNet."""
    return create_fastvit("fastvit_t8", pretrained, **doubling((2, 2, 4, 2), 48, 3.0) | kwargs)


@register_model
def fastvit_t12(pretrained: bool = False, **kwargs) -> FastViT:
    """FastViT-T12: 7.6 M parameters (6.8 in the paper), 1.4 GMACs, 79.1 % on ImageNet."""
    return create_fastvit("fastvit_t12", pretrained, **doubling((2, 2, 6, 2), 64, 3.0) | kwargs)


@register_model
def fastvit_s12(pretrained: bool = False, **kwargs) -> FastViT:
    """FastViT-S12: 9.5 M parameters (8.8 in the paper), 1.8 GMACs, 79.8 % on ImageNet."""
    return create_fastvit("fastvit_s12", pretrained, **doubling((2, 2, 6, 2), 64) | kwargs)


@register_model
def fastvit_sa12(pretrained: bool = False, **kwargs) -> FastViT:
    """FastViT-SA12: 11.6 M parameters (10.9 in the paper), 1.9 GMACs, 80.6 % on ImageNet."""
    defaults = doubling((2, 2, 6, 2), 64, attention=True)
    return create_fastvit("fastvit_sa12", pretrained, **defaults | kwargs)


@register_model
def fastvit_sa24(pretrained: bool = False, **kwargs) -> FastViT:
    """FastViT-SA24: 21.6 M parameters (20.6 in the paper), 3.8 GMACs, 82.6 % on ImageNet."""
    defaults = doubling((4, 4, 12, 4), 64, attention=True)
    return create_fastvit("fastvit_sa24", pretrained, **defaults | kwargs)


@register_model
def fastvit_sa36(pretrained: bool = False, **kwargs) -> FastViT:
    """FastViT-SA36: 31.5 M parameters (30.4 in the paper), 5.6 GMACs, 83.6 % on ImageNet."""
    defaults = doubling((6, 6, 18, 6), 64, attention=True)
    return create_fastvit("fastvit_sa36", pretrained, **defaults | kwargs)


@register_model
def fastvit_ma36(pretrained: bool = False, **kwargs) -> FastViT:
    """FastViT-MA36: 44.1 M parameters (42.7 in the paper), 7.9 GMACs, 83.9 % on ImageNet."""
    defaults = doubling((6, 6, 18, 6), 76, attention=True)
    return create_fastvit("fastvit_ma36", pretrained, **defaults | kwargs)
