"""Tables: CSV files and aligned columns of text."""

import csv
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tools.cli import shown
from training.files import write_atomically

FORMULAS = ("=", "+", "-", "@", "\t", "\r")


def write_csv(
    path: str | Path, heads: Sequence[str], rows: Iterable[Sequence[Any] | Mapping[str, Any]]
) -> None:
    """Write a CSV file atomically; cells of None are empty.

    Rows have cells in the order of ``heads``, or by column name, where other names are ignored.

    Raises:
        OutputError: The file cannot be written; a previous file is unchanged.
    """
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(heads)
    for row in rows:
        cells = [row.get(head) for head in heads] if isinstance(row, Mapping) else row
        writer.writerow(map(_without_formula, cells))
    data = text.getvalue().encode("utf-8", "surrogateescape")
    write_atomically(Path(path), lambda file: file.write(data))


def _without_formula(cell: Any) -> Any:
    """Return a cell that spreadsheets show as text: names from files may begin like a formula."""
    is_formula = isinstance(cell, str) and cell.startswith(FORMULAS) and not _is_number(cell)
    return f"'{cell}" if is_formula else cell


def csv_output(
    path: Path | None, heads: Sequence[str], rows: Sequence[Sequence[Any] | Mapping[str, Any]]
) -> list[tuple[Path, Callable[[Path], None]]]:
    """Return the CSV file for :func:`tools.cli.finish`, none without a path or rows."""
    return [(path, partial(write_csv, heads=heads, rows=rows))] if path and rows else []


def aligned(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table with aligned columns, text to the left and numbers to the right."""
    lines = [[*map(shown, line)] for line in (heads, *rows)]
    columns = list(zip(*lines, strict=True))
    aligns = [str.rjust if all(map(_is_number, cells[1:])) else str.ljust for cells in columns]
    widths = [max(map(len, cells)) for cells in columns]
    return "\n".join(
        "  ".join(
            align(text, width) for align, text, width in zip(aligns, line, widths, strict=True)
        ).rstrip()
        for line in lines
    )


def _is_number(text: str) -> bool:
    try:
        float(text or 0)
    except ValueError:
        return False
    return True


def result_table(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, tuple[str, int]]) -> str:
    """Return an aligned table of rows, without empty columns and without ``corrupt`` files of none.

    ``columns`` maps the keys of rows to their headings and decimals.
    """
    keys = [key for key in columns if any(row.get(key) not in (None, "") for row in rows)]
    if not any(row.get("corrupt") for row in rows):
        keys.remove("corrupt")

    def cell(value: object, decimals: int) -> str:
        text = "" if value is None else str(value)
        return f"{value:.{decimals}f}" if isinstance(value, float) else text

    cells = [[cell(row.get(key), columns[key][1]) for key in keys] for row in rows]
    return aligned([columns[key][0] for key in keys], cells)


def markdown(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    lines = ["| " + " | ".join(line) + " |" for line in (heads, *rows)]
    return "\n".join([lines[0], "|---" * len(heads) + "|", *lines[1:]])
