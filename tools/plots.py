"""Figures of tools: an empty one, PNG files, and text without formulas."""

import io
import warnings
from pathlib import Path
from typing import Any

from training.files import write_atomically

DPI = 120
# one style for all figures: opaque, so that pages of any background show them
STYLE = {
    "axes.axisbelow": True,
    "axes.grid": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.facecolor": "white",
    "font.size": 10.0,
    "grid.color": "#e4e4e4",
    "legend.frameon": False,
    "savefig.facecolor": "white",
}


def new_figure(width: float, height: float, layout: str | None = "constrained") -> Any:
    """Return an empty ``matplotlib.figure.Figure`` of a size in inches; it needs no display.

    Sets the style of what is drawn into it.
    """
    import matplotlib  # takes a second to import
    from matplotlib.figure import Figure

    matplotlib.rcParams.update(STYLE)
    return Figure(figsize=(width, height), layout=layout)


def as_png(figure: Any, dpi: int, padding: float | None = None) -> bytes:
    """Return a figure as PNG, cut to what is drawn, plus ``padding`` inches, if it has a layout."""
    content = io.BytesIO()
    # a figure without a layout is placed by the pixel: cutting would shift it by parts of one
    margins = "tight" if figure.get_layout_engine() else None
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing", UserWarning)  # drawn as a box
        figure.savefig(content, format="png", dpi=dpi, bbox_inches=margins, pad_inches=padding)
    return content.getvalue()


def save(figure: Any, path: str | Path, dpi: int = DPI, padding: float | None = None) -> None:
    """Write a figure as a PNG file atomically, rendered by :func:`as_png`."""
    data = as_png(figure, dpi, padding)
    write_atomically(Path(path), lambda file: file.write(data))


def plain_text(text: str) -> str:
    """Escape dollar signs, which begin a formula in matplotlib."""
    return text.replace("$", r"\$")
