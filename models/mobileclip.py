"""The image encoders of MobileCLIP (arXiv 2311.17049) and MobileCLIP2: FastViT's blocks."""

from collections.abc import Sequence
from functools import partial

from timm.layers import LayerNorm2d
from timm.models import fastvit as timm_fastvit

from .factory import register_model
from .fastvit import FastViT, create_fastvit, doubling

default_cfgs = {
    name: timm_fastvit.default_cfgs[name] for name in (f"fastvit_mci{i}" for i in range(5))
}


def _mci(depths: Sequence[int], dim: int) -> dict:
    """MobileCLIP's small image encoders."""
    stages = doubling(depths, dim, 3.0, attention=True)["stages"]
    embedded = tuple(stage._replace(patch_se=True) for stage in stages[2:])
    return {"stages": stages[:2] + embedded, "patch_act": True}


def _mci_large(depths: Sequence[int], dim: int) -> dict:
    """MobileCLIP2's large image encoders: five stages, the last two with attention."""
    stages = doubling(depths, dim, 4.0)["stages"]
    attention = {"mixer": "attention", "position_encoding": True}
    stages = stages[:3] + tuple(stage._replace(**attention) for stage in stages[3:])
    norm = partial(LayerNorm2d, eps=1e-5)
    return {"stages": stages, "patch_act": True, "norm_layer": norm, "stem_scale": False}


@register_model
def fastvit_mci0(pretrained: bool = False, **kwargs) -> FastViT:
    """MCi0, the image encoder of MobileCLIP-S0 (arXiv 2311.17049): 512 embeddings for classes."""
    return create_fastvit("fastvit_mci0", pretrained, **_mci((2, 6, 10, 2), 64) | kwargs)


@register_model
def fastvit_mci1(pretrained: bool = False, **kwargs) -> FastViT:
    """MCi1, the image encoder of MobileCLIP-S1."""
    return create_fastvit("fastvit_mci1", pretrained, **_mci((4, 12, 20, 4), 64) | kwargs)


@register_model
def fastvit_mci2(pretrained: bool = False, **kwargs) -> FastViT:
    """MCi2, the image encoder of MobileCLIP-S2."""
    return create_fastvit("fastvit_mci2", pretrained, **_mci((4, 12, 24, 4), 80) | kwargs)


@register_model
def fastvit_mci3(pretrained: bool = False, **kwargs) -> FastViT:
    """MCi3, the image encoder of MobileCLIP2-S3: 768 embeddings for classes."""
    defaults = _mci_large((2, 12, 24, 4, 2), 96)
    return create_fastvit("fastvit_mci3", pretrained, **defaults | kwargs)


@register_model
def fastvit_mci4(pretrained: bool = False, **kwargs) -> FastViT:
    """MCi4, the image encoder of MobileCLIP2-S4."""
    defaults = _mci_large((2, 12, 24, 4, 4), 128)
    return create_fastvit("fastvit_mci4", pretrained, **defaults | kwargs)
