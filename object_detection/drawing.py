"""Draw objects into images, and images into a contact sheet."""

from collections.abc import Mapping, Sequence

import torch
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor, to_pil_image
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks, make_grid

COLOURS = ("red", "lime", "blue", "yellow", "magenta", "cyan", "orange", "purple")
CELL, COLUMNS = 320, 4  # pixels of an image's longer side in a contact sheet, and images in a row


def drawn_names(names: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return a text to draw for each class: its number if Pillow's font may not have its name.

    Also returns the lines of a legend of those numbers.
    """
    shown = [name if name.isascii() else str(number) for number, name in enumerate(names)]
    pairs = zip(shown, names, strict=True)
    return shown, [f"{number} is {name}" for number, name in pairs if number != name]


def draw(
    image: Image.Image,
    boxes: torch.Tensor,
    labels: Sequence[str],
    masks: torch.Tensor | None = None,
) -> Image.Image:
    """Return an image with objects drawn into it.

    Args:
        image: RGB.
        boxes: ``N 4``, corners x1, y1, x2, y2 in pixels.
        labels: A text for each of them.
        masks: ``N H W`` of bool.
    """
    if not len(boxes):
        return image
    canvas = pil_to_tensor(image)
    colours = [COLOURS[index % len(COLOURS)] for index in range(len(boxes))]
    if masks is not None:
        canvas = draw_segmentation_masks(canvas, masks, alpha=0.4, colors=colours)
    style = {"label_colors": "black", "label_background_colors": colours, "fill_labels": True}
    return to_pil_image(draw_bounding_boxes(canvas, boxes, [*labels], colours, width=2, **style))


def contact_sheet(samples: Sequence[Mapping[str, object]]) -> Image.Image:
    """Return one image of several, each scaled to its cell before its objects are drawn.

    Args:
        samples: Arguments of :func:`draw`.
    """
    cells = []
    for sample in samples:
        image, masks = sample["image"], sample["masks"]
        scale = CELL / max(image.size)
        size = [max(1, round(side * scale)) for side in image.size]
        masks = torch.nn.functional.interpolate(masks[None].float(), size[::-1])[0] > 0.5
        drawn = draw(image.resize(size), sample["boxes"] * scale, sample["labels"], masks)
        right, below = (CELL - side for side in size)
        cells.append(torch.nn.functional.pad(pil_to_tensor(drawn), (0, right, 0, below), value=64))
    return to_pil_image(make_grid(cells, nrow=COLUMNS, pad_value=255))
