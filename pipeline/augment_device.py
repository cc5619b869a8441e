"""Augmentation of a batch on its device.

Bitwise equal to Pillow's where the images are on the CPU. Elsewhere, affine sampling is in float32:
one value in thousands differs by 1.
"""

from collections.abc import Hashable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from . import augment_host, augment_sampling
from .augment_ops import ENCODED, Kind
from .upload import upload

# Kinds that are tables known on the host, and how many values they take
TABLES = {Kind.INVERT: 0, Kind.SOLARIZE: 1, Kind.SOLARIZE_ADD: 2, Kind.POSTERIZE: 1}
TABLES |= {Kind.BRIGHTNESS: 1}
# Groups of images with the same work, in order. The last is of AFFINE that is not along an axis.
GROUPS = ([Kind.NONE], list(TABLES), [Kind.EQUALIZE], [Kind.AUTO_CONTRAST])
GROUPS += ([Kind.COLOR], [Kind.CONTRAST], [Kind.SHARPNESS], [Kind.AFFINE], [])
NONE, TABLE, EQUALIZE, AUTO_CONTRAST, COLOR, CONTRAST, SHARPNESS, LINES, TURNED = range(9)
GROUP_OF = np.array([next(i for i, group in enumerate(GROUPS) if kind in group) for kind in Kind])
RAMP = np.arange(256, dtype=np.uint8)
SPREAD = np.arange(256.0)[:, None]
# Factors of auto-contrast by the difference of the extremes: of a value, and of the lower extreme
SCALES = np.where(SPREAD > 0, 255 / SPREAD.clip(1), (1.0, 0.0))
GREY = np.int32([(2**15, 0, 0), (19595, 38470, 7471)])  # Pillow's, of 65536: terms and factors


def augment(
    images: Tensor, operations: Tensor, fill: tuple[int, int, int], exact: bool | None = None
) -> Tensor:
    """Apply to each image its operations, in order, without waiting for the device.

    Args:
        images: RGB, uint8 ``B 3 H W`` in any memory format; they are not changed.
        operations: float64 ``B S 8`` on the CPU, see :func:`pipeline.augment_ops.encode`.
        fill: Red, green and blue of pixels from outside an image.
        exact: Let Pillow do affine sampling, image by image, for which they must be on the CPU.
            None: if they are.

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
    exact = images.device.type == "cpu" if exact is None else exact
    slots = [_Slot(rows, *images.shape[2:], exact) for rows in operations.numpy().swapaxes(0, 1)]
    slots = [slot for slot in slots if slot.count(TABLE, TURNED)]
    arrays: dict[Hashable, np.ndarray] = {"fill": np.uint8(fill), "grey": GREY}
    places = np.arange(len(images))  # of each image in the order of the slot before
    for number, slot in enumerate(slots):
        arrays[number, "order"] = places[slot.order]
        arrays |= {(number, name): array for name, array in slot.arrays.items()}
        places = slot.order.argsort()
    moved = upload(arrays | {"places": places}, images.device)
    pixels = images.permute(0, 2, 3, 1)
    for number, slot in enumerate(slots):
        pixels = pixels.index_select(0, moved[number, "order"])  # B H W 3
        own = {name: moved[number, name] for name in slot.arrays}
        slot.apply(pixels, own | {"fill": moved["fill"], "grey": moved["grey"]})
    return pixels.index_select(0, moved["places"]).permute(0, 3, 1, 2)  # B 3 H W


class _Slot:
    """An operation of each image of a batch, which is sorted by group.

    Args:
        rows: float64 ``B 8``.
        height, width: Of the images.
        exact: See :func:`augment`.

    Attributes:
        order: int64 ``B``, the images by group.
        arrays: What :meth:`apply` needs on the device.
    """

    def __init__(self, rows: np.ndarray, height: int, width: int, exact: bool):
        kinds, values = rows[:, 0].astype(int), rows[:, 1:-1]
        is_turned = (kinds == Kind.AFFINE) & ~augment_sampling.is_along_axis(values)
        groups = GROUP_OF[kinds] + is_turned
        self.order = groups.argsort(kind="stable")
        self.starts = groups[self.order].searchsorted(range(TURNED + 2)).tolist()
        self.rows, self.exact = rows[self.order], exact
        self.arrays: dict[str, np.ndarray] = {}
        if self.count(TABLE, AUTO_CONTRAST):
            self._plan_tables()
        if self.count(COLOR, SHARPNESS):
            factors = self.rows[self._of(COLOR, SHARPNESS), 1]
            self.arrays["factors"] = factors.astype(np.float32)[:, None, None, None]
        if self.count(LINES, TURNED) and not exact:
            rows = self.rows[self._of(LINES, TURNED)]
            self.arrays |= augment_sampling.plan(
                rows[:, 1:-1], rows[:, -1] > 0, self.count(LINES), height, width
            )

    def _of(self, first: int, last: int | None = None) -> slice:
        """Return where the images of a group are, or of those from it to another."""
        return slice(self.starts[first], self.starts[(first if last is None else last) + 1])

    def count(self, first: int, last: int | None = None) -> int:
        """Return how many images are in a group, or in those from it to another."""
        where = self._of(first, last)
        return where.stop - where.start

    def _plan_tables(self) -> None:
        count, channels = self.count(TABLE, AUTO_CONTRAST), np.arange(3)
        tables = np.zeros((count, 3, 256), np.uint8)
        for table, (kind, *values) in zip(tables, self.rows[self._of(TABLE)], strict=False):
            kind = Kind(int(kind))
            table[...] = augment_host.FUNCTIONS[kind](RAMP, *values[: TABLES[kind]])
        rows = 3 * np.arange(count)[:, None, None, None] + channels  # N 1 1 3
        self.arrays |= {"tables": tables, "rows_of_tables": (256 * rows).astype(np.int32)}
        if equalized := self.count(EQUALIZE):
            self.arrays |= {"bins": 257 * rows[:equalized] + 1, "one": np.ones((), int)}
        if self.count(AUTO_CONTRAST):
            self.arrays["scales"] = SCALES
        self.arrays["ramp"] = np.arange(256)

    def apply(self, pixels: Tensor, arrays: dict[str, Tensor]) -> None:
        """Change the images ``B H W 3``, in the order of this slot."""
        if self.count(TABLE, AUTO_CONTRAST):
            tables, first = arrays["tables"], self.starts[TABLE]
            for group, fill in ((EQUALIZE, _equalize), (AUTO_CONTRAST, _auto_contrast)):
                if self.count(group):
                    where = self._of(group)
                    fill(pixels[where], arrays, tables[where.start - first : where.stop - first])
            chosen = pixels[self._of(TABLE, AUTO_CONTRAST)]
            index = (chosen + arrays["rows_of_tables"]).view(-1)
            torch.index_select(tables.view(-1), 0, index, out=chosen.view(-1))
        if self.count(COLOR, SHARPNESS):
            self._enhance(pixels[self._of(COLOR, SHARPNESS)], arrays)
        if self.count(LINES, TURNED):
            chosen = pixels[self._of(LINES, TURNED)]
            if self.exact:
                self._transform(chosen.numpy(), arrays["fill"].tolist())
            else:
                augment_sampling.sample(chosen, arrays["fill"], arrays)

    def _enhance(self, pixels: Tensor, arrays: dict[str, Tensor]) -> None:
        """Blend images with their degenerate ones."""
        degenerate = pixels.short()
        colored = self.count(COLOR)
        if greyed := self.count(COLOR, CONTRAST):
            levels = grey(pixels[:greyed], arrays["grey"])  # N H W 1
            degenerate[:colored] = levels[:colored]
            area = pixels.shape[1] * pixels.shape[2]
            if greyed > colored:
                total = levels[colored:].sum((1, 2, 3), keepdim=True)
                degenerate[colored:greyed] = (total + area // 2) // area  # mean, rounded
        if greyed < len(pixels):
            _smooth(degenerate[greyed:])
        value = (pixels - degenerate) * arrays["factors"]  # addcmul would round once only
        pixels.copy_(value.add_(degenerate).clamp_(0, 255))

    def _transform(self, pixels: np.ndarray, fill: list[int]) -> None:
        rows = self.rows[self._of(LINES, TURNED)].tolist()
        for image, (_, *values, bicubic) in zip(pixels, rows, strict=True):
            image[...] = augment_host.exact_affine(image, values, bool(bicubic), tuple(fill))


def grey(pixels: Tensor, sums: Tensor | None = None) -> Tensor:
    """Convert pixels ``... 3`` to Pillow's grey, int32 ``... 1``; ``sums`` is ``GREY`` there."""
    terms, factors = torch.from_numpy(GREY).to(pixels.device) if sums is None else sums
    return torch.addcmul(terms, pixels, factors).sum(-1, keepdim=True, dtype=torch.int32) >> 16


def _smooth(wide: Tensor) -> None:
    """Smooth int16 ``N H W 3`` except for the border: the rounded mean with weights of 1 and 5."""
    rows = wide[:, :-2] + wide[:, 1:-1] + wide[:, 2:]
    total = rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:]
    inner = wide[:, 1:-1, 1:-1]
    torch.floor_divide(total.add_(inner, alpha=4).add_(6), 13, out=inner)


def _equalize(pixels: Tensor, arrays: dict[str, Tensor], tables: Tensor) -> None:
    """Fill the tables ``N 3 256`` that equalize images ``N H W 3``."""
    index = (pixels + arrays["bins"]).view(-1)
    counts = torch.zeros(len(pixels) * 3 * 257, dtype=torch.long, device=pixels.device)
    counts.scatter_add_(0, index, arrays["one"].expand_as(index))
    below = counts.view(-1, 3, 257).cumsum(2)  # of the values below, and at the end of all
    area = pixels.shape[1] * pixels.shape[2]
    step = (below % area).amax(2, keepdim=True) // 255  # also 0 if there is only one value
    levels = ((step // 2 + below[..., :-1]) // step.clamp(min=1)).clamp_(max=255)
    tables.copy_(torch.where(step > 0, levels, arrays["ramp"]))


def _auto_contrast(pixels: Tensor, arrays: dict[str, Tensor], tables: Tensor) -> None:
    """Fill the tables ``N 3 256`` that stretch the contrast of images ``N H W 3``."""
    low, high = (extreme.view(-1) for extreme in pixels.flatten(1, 2).aminmax(dim=1))  # 3N
    scale, shift = arrays["scales"].index_select(0, (high - low).int()).unbind(1)
    levels = arrays["ramp"] * scale[:, None] - (low * shift)[:, None]
    tables.copy_(levels.clamp_(0, 255).view_as(tables))


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
    images: Tensor,
    boxes: Tensor,
    mode: str,
    generator: torch.Generator | None = None,
    singly: bool | None = None,
) -> Tensor:
    """Erase boxes of normalised images, as timm's RandomErasing does.

    Args:
        images: float ``B C H W``; they are changed.
        boxes: int64 ``B K 4`` on the CPU: top, left, height and width in pixels, zeros for none.
        mode: ``pixel`` for standard normal noise, ``rand`` for one such colour a box, ``const``
            for zeros.
        generator: Source of the noise, on the device of the images.
        singly: Box after box, which takes the least arithmetic and the most kernels; None for the
            CPU alone. The noise depends on it.

    Returns:
        The images.

    Raises:
        ValueError: The mode is unknown, or the boxes are not on the CPU.
    """
    if mode not in ("pixel", "rand", "const"):
        raise ValueError(f"erasing mode must be one of pixel, rand, const, not {mode!r}")
    if boxes.device.type != "cpu":
        raise ValueError(f"boxes must be on the CPU, not on {boxes.device}")
    if images.device.type == "cpu" if singly is None else singly:
        _erase_singly(images, boxes, mode, generator)
    elif boxes.any():
        _erase_together(images.permute(0, 2, 3, 1), boxes.numpy(), mode, generator)
    return images


def _erase_singly(
    images: Tensor, boxes: Tensor, mode: str, generator: torch.Generator | None
) -> None:
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


def _erase_together(
    images: Tensor, boxes: np.ndarray, mode: str, generator: torch.Generator | None
) -> None:
    """Erase boxes of images ``B H W C``; the noise is as large as all images that have one."""
    _, height, width, channels = images.shape
    arrays: dict[Hashable, np.ndarray] = {}
    for slot, drawn in enumerate(boxes.swapaxes(0, 1)):  # later boxes lie over earlier ones
        members = drawn[:, 2].nonzero()[0]
        top, left, tall, wide = drawn[members].T[..., None]
        rows, columns = np.arange(height) - top, np.arange(width) - left  # E H and E W
        arrays[slot, "members"] = members
        arrays[slot, "rows"] = ((rows >= 0) & (rows < tall))[:, :, None, None]
        arrays[slot, "columns"] = ((columns >= 0) & (columns < wide))[:, None, :, None]
    moved = upload(arrays, images.device)
    for slot in range(boxes.shape[1]):
        members = moved[slot, "members"]
        size = (len(members), height, width, channels)
        if mode != "pixel":
            size = (len(members), 1, 1, channels)
        noise = images.new_zeros(size) if mode == "const" else images.new_empty(size)
        if mode != "const":
            noise.normal_(generator=generator)
        inside = moved[slot, "rows"] & moved[slot, "columns"]
        erased = torch.where(inside, noise, images.index_select(0, members))
        images.index_copy_(0, members, erased)
