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


def nms(
    boxes: torch.Tensor, scores: torch.Tensor, iou_threshold: float, offset: int = 0
) -> torch.Tensor:
    """Greedy non-maximum suppression.

    Args:
        boxes: ``N 4``, corners ``x1 y1 x2 y2`` in pixels.
        scores: ``N``.
        iou_threshold: Boxes that overlap a kept one by more are removed.
        offset: 1 if corners are pixels of the box: a width is ``x2 - x1 + offset``.

    Returns:
        Indices of the boxes kept, by descending score.
    """
    if offset:
        boxes = boxes + boxes.new_tensor([0, 0, offset, offset])
    return torchvision.ops.nms(boxes, scores, iou_threshold)


def _check_mode(pool_mode: int) -> None:
    if pool_mode != AVERAGE:
        _refuse("roi_align with pool_mode='max'")


def _wide(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """Return half-precision tensors as float32.

    torchvision's kernels do not have bfloat16, and add up float16 in half precision.
    """
    return [x.to(torch.promote_types(x.dtype, torch.float32)) for x in tensors]


def roi_align_forward(
    input: torch.Tensor,
    rois: torch.Tensor,
    output: torch.Tensor,
    argmax_y: torch.Tensor,
    argmax_x: torch.Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """RoIAlign (Mask R-CNN, arXiv 1703.06870, section 3), average of the samples in each bin.

    Args:
        input: Features ``B C H W``.
        rois: ``N 5``, index of the image and corners in pixels of the image.
        output: ``N C h w``, overwritten.
        argmax_y, argmax_x: Of the maximum mode, untouched.
        aligned_height, aligned_width: h and w.
        spatial_scale: Feature pixels per image pixel.
        sampling_ratio: Samples per side of a bin, 0 for as many as it has pixels.
        pool_mode: 1, the average.
        aligned: Shift by half a pixel, so that pixel centres lie at whole numbers.

    Raises:
        MissingOperatorError: The mode is another.
    """
    _check_mode(pool_mode)
    size = (aligned_height, aligned_width)
    output.copy_(
        torchvision.ops.roi_align(*_wide(input, rois), size, spatial_scale, sampling_ratio, aligned)
    )


def roi_align_backward(
    grad_output: torch.Tensor,
    rois: torch.Tensor,
    argmax_y: torch.Tensor,
    argmax_x: torch.Tensor,
    grad_input: torch.Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Gradient of :func:`roi_align_forward` with respect to the features.

    Args:
        grad_output: ``N C h w``.
        grad_input: ``B C H W``, overwritten.
        rois, argmax_y, argmax_x, aligned_height, aligned_width, spatial_scale, sampling_ratio,
            pool_mode, aligned: See there.

    Raises:
        MissingOperatorError: The mode is another.
    """
    _check_mode(pool_mode)
    grad_input.copy_(
        torch.ops.torchvision._roi_align_backward(
            *_wide(grad_output, rois),
            spatial_scale,
            aligned_height,
            aligned_width,
            *grad_input.shape,
            sampling_ratio,
            aligned,
        )
    )


def _refuse(name: str) -> NoReturn:
    raise MissingOperatorError(
        f"torchvision does not have {name}, and this mmcv has no compiled operators; the top of "
        f"object_detection/mmcv_ops.py says how to compile them"
    )


class Operators(ModuleType):
    """A module with torchvision's operators; every other one raises when it is called.

    Its existence is enough to import ``mmcv.ops``.
    """

    nms = staticmethod(nms)
    roi_align_forward = staticmethod(roi_align_forward)
    roi_align_backward = staticmethod(roi_align_backward)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("__"):
            raise AttributeError(name)

        def missing(*args: Any, **kwargs: Any) -> NoReturn:
            _refuse(name)

        return missing


def install() -> bool:
    """Replace ``mmcv._ext``, unless it is compiled; return True if the replacement is in place.

    Call it before anything imports ``mmcv.ops``. mmcv itself is not imported.
    """
    if NAME in sys.modules:
        return isinstance(sys.modules[NAME], Operators)
    mmcv = importlib.util.find_spec("mmcv")
    if mmcv is None or mmcv.submodule_search_locations is None:
        return False
    if importlib.machinery.PathFinder.find_spec(NAME, mmcv.submodule_search_locations):
        return False
    module = Operators(NAME)
    module.__spec__ = importlib.machinery.ModuleSpec(NAME, None)
    sys.modules[NAME] = module
    return True
