"""NMS and RoIAlign of torchvision where mmcv has no compiled operators.

mmcv's wheels for current PyTorch hold no operators. Mask R-CNN and Cascade Mask R-CNN need two of
them, and torchvision brings both, for CPU and CUDA: :func:`install` puts them where mmcv looks, the
module ``mmcv._ext``. UPerNet needs none.

Other detectors need mmcv's own, which take a compiler and a quarter of an hour: ``pip download
--no-deps --no-build-isolation --no-binary onedl-mmcv onedl-mmcv==2.3.6``, unpack, write
``-std=c++20`` for ``-std=c++17`` in setup.py where PyTorch is 2.14 or newer, and ``pip install
--no-build-isolation .`` there (needs ninja, wheel, packaging and psutil).
"""

import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any, NoReturn

import torch
import torchvision  # first: imported within a trace, its operators could not be registered

from utils import UserError

NAME = "mmcv._ext"
AVERAGE = 1  # mmcv's number of the mode


class MissingOperatorError(UserError, NotImplementedError):
    """An operator of mmcv was called that torchvision does not have."""


def _refuse(name: str) -> NoReturn:
    raise MissingOperatorError(
        f"torchvision does not have {name}, and this mmcv has no compiled operators; the top of "
        f"object_detection/mmcv_ops.py says how to compile them"
    )


def _roi_align(
    maps: torch.Tensor,
    rois: torch.Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> torch.Tensor:
    """RoIAlign (Mask R-CNN, arXiv 1703.06870, section 3): maps ``B C H W`` to ``N C h w``.

    In float32 at least: torchvision's kernels add up float16 in half precision, and do not have
    bfloat16.
    """
    if pool_mode != AVERAGE:
        _refuse("roi_align with pool_mode='max'")
    maps, rois = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (maps, rois))
    size = (aligned_height, aligned_width)
    return torchvision.ops.roi_align(maps, rois, size, spatial_scale, sampling_ratio, aligned)


class Operators(ModuleType):
    """A module with torchvision's operators; every other one raises when it is called."""

    @staticmethod
    def nms(
        boxes: torch.Tensor, scores: torch.Tensor, iou_threshold: float, offset: int = 0
    ) -> torch.Tensor:
        """Return the indices of the boxes ``N 4`` that NMS keeps, by descending score.

        ``offset`` is 1 if corners are pixels of the box: a width is ``x2 - x1 + offset``.
        """
        boxes = boxes + boxes.new_tensor([0, 0, offset, offset])
        return torchvision.ops.nms(boxes, scores, iou_threshold)

    @staticmethod
    def roi_align_forward(
        maps: torch.Tensor, rois: torch.Tensor, output: torch.Tensor, *_: Any, **options: Any
    ) -> None:
        """Write the pooled maps into ``output``."""
        output.copy_(_roi_align(maps, rois, **options))

    @staticmethod
    def roi_align_backward(
        gradient: torch.Tensor,
        rois: torch.Tensor,
        argmax_y: torch.Tensor,
        argmax_x: torch.Tensor,
        output: torch.Tensor,
        **options: Any,
    ) -> None:
        """Write the gradient with respect to the maps into ``output``."""
        with torch.enable_grad():
            maps = torch.zeros_like(output, requires_grad=True)
            pooled = _roi_align(maps, rois, **options)
        output.copy_(torch.autograd.grad(pooled, maps, gradient.to(pooled.dtype))[0])

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **options: _refuse(name)


def install() -> None:
    """Replace ``mmcv._ext``, unless it is compiled.

    Call it before anything imports ``mmcv.ops``. mmcv itself is not imported.
    """
    mmcv = importlib.util.find_spec("mmcv")
    if NAME in sys.modules or mmcv is None or mmcv.submodule_search_locations is None:
        return
    if importlib.machinery.PathFinder.find_spec(NAME, mmcv.submodule_search_locations):
        return
    module = Operators(NAME)
    module.__spec__ = importlib.machinery.ModuleSpec(NAME, None)
    sys.modules[NAME] = module
