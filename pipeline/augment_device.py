"""Augmentation of a batch on its device, bitwise equal to Pillow's."""

from collections import defaultdict

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.augment_ops import ENCODED, Kind


def augment(images: Tensor, operations: Tensor, fill: tuple[int, int, int]) -> Tensor:
    """Apply to each image its operations, in order, without waiting for the device.

    Args:
        images: RGB, uint8 ``B 3 H W`` in any memory format; they are not changed.
        operations: float64 ``B S 8`` on the CPU, see :func:`pipeline.augment_ops.encode`.
        fill: Red, green and blue of pixels from outside an image.

    Returns:
        uint8 ``B 3 H W``, channels last.

    Raises:
        ValueError: The operations are not on the CPU, or have another shape.
    """
    if operations.device.type != "cpu":
        raise ValueError(f"operations must be on the CPU, not on {operations.device}")
    if operations.ndim != 3 or operations.shape[::2] != (len(images), ENCODED):
        raise ValueError(
            f"shape of operations must be [{len(images)}, S, {ENCODED}], not"
            f" {list(operations.shape)}"
        )
    pixels = images.permute(0, 2, 3, 1).clone(memory_format=torch.contiguous_format)  # B H W 3
    values = operations.to(images.device, non_blocking=True)[..., 1:-1]  # B S 6
    colour = torch.tensor(fill, dtype=torch.float64).to(images.device, non_blocking=True)
    for slot, codes in enumerate(operations[..., [0, -1]].unbind(1)):
        for (kind, bicubic), members in _groups(codes).items():
            index = torch.tensor(members).to(images.device, non_blocking=True)
            chosen = pixels.index_select(0, index)
            arguments = values[:, slot].index_select(0, index)  # N 6
            if kind == Kind.AFFINE:
                changed = _affine(chosen, arguments, bicubic, colour)
            else:
                changed = FUNCTIONS[kind](chosen, arguments.float().view(-1, 6, 1, 1))
            pixels.index_copy_(0, index, changed)
    return pixels.permute(0, 3, 1, 2)  # B 3 H W


def _groups(codes: Tensor) -> dict[tuple[Kind, bool], list[int]]:
    """Group samples by kind and filter, given as ``B 2``; NONE is omitted."""
    groups = defaultdict(list)
    for sample, (kind, bicubic) in enumerate(codes.tolist()):
        if kind != Kind.NONE:
            groups[Kind(int(kind)), bool(bicubic)].append(sample)
    return groups


def _affine(pixels: Tensor, values: Tensor, bicubic: bool, colour: Tensor) -> Tensor:
    """Sample images ``N H W 3`` at the positions of the ``values`` ``N 6``, see ``Kind``."""
    _, height, width, _ = pixels.shape
    columns = torch.arange(width, device=pixels.device).double() + 0.5
    rows = torch.arange(height, device=pixels.device).double()[:, None] + 0.5
    a, b, c, d, e, f = values.view(-1, 6, 1, 1).unbind(1)
    x, y = a * columns + b * rows + c, d * columns + e * rows + f  # N H W
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    planes = pixels.permute(0, 3, 1, 2).contiguous()  # N 3 H W: gathers are faster
    value = _sample(planes, x - 0.5, y - 0.5, bicubic).clamp_(0, 255)
    return torch.where(inside[:, None], value, colour[:, None, None]).byte().permute(0, 2, 3, 1)


def _sample(planes: Tensor, x: Tensor, y: Tensor, bicubic: bool) -> Tensor:
    """Interpolate images ``N C H W`` at ``x``, ``y`` (``N H W``, 0 at the first centre).

    As in Pillow, first along the rows, then between them; the outermost pixels are repeated.
    """
    batch, channels, height, width = planes.shape
    left, top = x.floor(), y.floor()
    across, down = (x - left)[:, None], (y - top)[:, None]  # N 1 H W
    combine, taps = (_cubic, (-1, 0, 1, 2)) if bicubic else (_linear, (0, 1))
    columns = [(left + i).clamp_(0, width - 1).long() for i in taps]
    starts = [(top + j).clamp_(0, height - 1).long() * width for j in taps]
    flat = planes.flatten(2)  # N C HW

    def neighbours(start: Tensor, column: Tensor) -> Tensor:
        index = (start + column).view(batch, 1, -1).expand(-1, channels, -1)  # N C HW
        return flat.gather(2, index).view(planes.shape).double()

    rows = [combine(*(neighbours(start, column) for column in columns), across) for start in starts]
    return combine(*rows, down)


def _linear(a: Tensor, b: Tensor, t: Tensor) -> Tensor:
    return a + (b - a) * t


def _cubic(a: Tensor, b: Tensor, c: Tensor, d: Tensor, t: Tensor) -> Tensor:
    """Cubic convolution with slope -1; the order of operations decides the last bit."""
    p, q = b - a, d - c
    return b + t * (c - a + t * (t * (p + q) - (p + q + p)))


def _blend(degenerate: Tensor | float, pixels: Tensor, factor: Tensor) -> Tensor:
    """Return ``degenerate + factor (pixels - degenerate)``, clipped and rounded down."""
    return ((pixels - degenerate) * factor + degenerate).clamp_(0, 255).byte()


def grey(pixels: Tensor) -> Tensor:
    """Convert pixels ``... 3`` to Pillow's grey, int32 ``... 1``."""
    red, green, blue = pixels.int().split(1, dim=-1)
    return (19595 * red + 38470 * green + 7471 * blue + 2**15) >> 16


def _look_up(tables: Tensor, pixels: Tensor) -> Tensor:
    """Look up pixels ``N H W 3`` in tables ``N 3 256``; returns uint8."""
    index = pixels.flatten(1, 2).transpose(1, 2).long()  # N 3 HW
    return tables.byte().gather(2, index).transpose(1, 2).view_as(pixels)


def _auto_contrast(pixels: Tensor, _: Tensor) -> Tensor:
    low, high = (extreme(pixels, (1, 2))[..., None] for extreme in (torch.amin, torch.amax))
    low, spread = low.double(), (high - low).double()  # N 3 1
    ramp = torch.arange(256, device=pixels.device)
    scale = torch.full_like(spread, 255) / spread.clamp(min=1)  # 255 / x rounds otherwise
    tables = (ramp * scale + -low * scale).trunc().clamp_(0, 255)
    return _look_up(torch.where(spread > 0, tables, ramp), pixels)


def _equalize(pixels: Tensor, _: Tensor) -> Tensor:
    batch = len(pixels)
    first = 256 * torch.arange(3 * batch, device=pixels.device).view(batch, 1, 1, 3)
    counts = torch.zeros(batch * 3 * 256, dtype=torch.long, device=pixels.device)
    index = (first + pixels).flatten()
    counts = counts.scatter_add_(0, index, torch.ones_like(index)).view(batch, 3, 256)
    ramp = torch.arange(256, device=pixels.device)
    brightest = (ramp * (counts > 0)).amax(2, keepdim=True)
    total = counts.sum(2, keepdim=True)
    step = (total - counts.gather(2, brightest)) // 255  # also 0 if there is only one value
    below = counts.cumsum(2) - counts
    tables = ((step // 2 + below) // step.clamp(min=1)).clamp_(max=255)
    return _look_up(torch.where(step > 0, tables, ramp), pixels)


def _solarize(pixels: Tensor, values: Tensor) -> Tensor:
    return torch.where(pixels < values[:, :1], pixels, 255 - pixels)


def _solarize_add(pixels: Tensor, values: Tensor) -> Tensor:
    addend, threshold = values[:, :1], values[:, 1:2]
    return torch.where(pixels < threshold, (pixels + addend).clamp_(max=255).byte(), pixels)


def _posterize(pixels: Tensor, values: Tensor) -> Tensor:
    return pixels & (256 - 2 ** (8 - values[:, :1])).byte()


def _color(pixels: Tensor, values: Tensor) -> Tensor:
    return _blend(grey(pixels), pixels, values[:, :1])


def _contrast(pixels: Tensor, values: Tensor) -> Tensor:
    mean = grey(pixels).double().mean((1, 2, 3), keepdim=True)
    return _blend((mean + 0.5).floor().float(), pixels, values[:, :1])


def _brightness(pixels: Tensor, values: Tensor) -> Tensor:
    return _blend(0, pixels, values[:, :1])


def _sharpness(pixels: Tensor, values: Tensor) -> Tensor:
    wide = pixels.short()
    rows = wide[:, :-2] + wide[:, 1:-1] + wide[:, 2:]
    inner = wide[:, 1:-1, 1:-1]
    total = rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:] + 4 * inner
    sharp = pixels.clone()
    smooth = (2 * total + 13) // 26  # total / 13, rounded; the border stays
    sharp[:, 1:-1, 1:-1] = _blend(smooth, inner, values[:, :1])
    return sharp


FUNCTIONS = {
    Kind.AUTO_CONTRAST: _auto_contrast,
    Kind.EQUALIZE: _equalize,
    Kind.INVERT: lambda pixels, _: 255 - pixels,
    Kind.SOLARIZE: _solarize,
    Kind.SOLARIZE_ADD: _solarize_add,
    Kind.POSTERIZE: _posterize,
    Kind.COLOR: _color,
    Kind.CONTRAST: _contrast,
    Kind.BRIGHTNESS: _brightness,
    Kind.SHARPNESS: _sharpness,
}


def crop_padded(images: Tensor, offsets: Tensor, padding: int) -> Tensor:
    """Crop each image to its own size after padding it with black, as RandomCrop does.

    Args:
        images: uint8 ``B 3 H W``.
        offsets: int64 ``B 2``: top and left of the crop in the padded image, 0 to 2 x padding.
        padding: Pixels added on each side.

    Returns:
        ``B 3 H W``, channels last.
    """
    batch, _, height, width = images.shape
    padded = F.pad(images, [padding] * 4)
    offsets = offsets.to(images.device, non_blocking=True)
    rows = offsets[:, :1] + torch.arange(height, device=images.device)  # B H
    columns = offsets[:, 1:] + torch.arange(width, device=images.device)  # B W
    sample = torch.arange(batch, device=images.device)[:, None, None]
    crops = padded[sample, :, rows[:, :, None], columns[:, None, :]]  # B H W 3
    return crops.permute(0, 3, 1, 2)  # B 3 H W


def flip(images: Tensor, mask: Tensor, dim: int = 3) -> Tensor:
    """Flip the images ``B 3 H W`` for which ``mask`` ``B`` is true, 3: horizontally."""
    mask = mask.to(images.device, non_blocking=True)
    return torch.where(mask[:, None, None, None], images.flip(dim), images)


def erase(
    images: Tensor, boxes: Tensor, mode: str, generator: torch.Generator | None = None
) -> Tensor:
    """Erase boxes of normalised images, as timm's RandomErasing does.

    Args:
        images: float ``B C H W``; they are changed.
        boxes: int64 ``B K 4`` on the CPU: top, left, height and width in pixels, zeros for none.
        mode: ``pixel`` for standard normal noise, ``rand`` for one such colour a box, ``const``
            for zeros.
        generator: Source of the noise, on the device of the images.

    Returns:
        The images.

    Raises:
        ValueError: The mode is unknown, or the boxes are not on the CPU.
    """
    if mode not in ("pixel", "rand", "const"):
        raise ValueError(f"erasing mode must be one of pixel, rand, const, not {mode!r}")
    if boxes.device.type != "cpu":
        raise ValueError(f"boxes must be on the CPU, not on {boxes.device}")
    for image, drawn in zip(images, boxes.tolist(), strict=True):
        for top, left, height, width in drawn:
            if not height:
                continue
            box = image[:, top : top + height, left : left + width]
            if mode == "pixel":
                noise = image.new_empty(height, width, len(image)).normal_(generator=generator)
                box.copy_(noise.permute(2, 0, 1))  # faster than in place, where it is not dense
            elif mode == "rand":
                box.copy_(image.new_empty(len(image), 1, 1).normal_(generator=generator))
            else:
                box.zero_()
    return images
