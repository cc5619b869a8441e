"""Figures of tools: an empty one, PNG files, and text without formulas."""

import io
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from training.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 120


def new_figure(width: float, height: float, layout: str | None = "constrained") -> "Figure":
    """Return an empty figure of a size in inches; it needs no display."""
    from matplotlib.figure import Figure  # takes a second to import

    return Figure(figsize=(width, height), layout=layout)


def as_png(figure: "Figure", dpi: int, padding: float | None = None) -> bytes:
    """Return a figure as PNG, cut to what is drawn if it has a layout.

    Args:
        figure: Figure to render.
        dpi: Pixels per inch.
        padding: Inches around what is drawn; matplotlib's default if None.
    """
    content = io.BytesIO()
    # a figure without a layout is placed by the pixel: cutting would shift it by parts of one
    margins = "tight" if figure.get_layout_engine() else None
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing", UserWarning)  # drawn as a box
        figure.savefig(content, format="png", dpi=dpi, bbox_inches=margins, pad_inches=padding)
    return content.getvalue()


def save(figure: "Figure", path: str | Path, dpi: int = DPI) -> None:
    """Write a figure as a PNG file atomically.

    Raises:
        OutputError: The file cannot be written.
    """
    data = as_png(figure, dpi)
    write_atomically(Path(path), lambda file: file.write(data))


def plain_text(text: str) -> str:
    """Escape dollar signs, which begin a formula in matplotlib."""
    return text.replace("$", r"\$")
