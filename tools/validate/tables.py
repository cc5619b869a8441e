"""Results as aligned tables and CSV files."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tools.tables import aligned, write_csv
from tools.validate import corruptions
from tools.validate.classes import readable
from tools.validate.counts import class_scores

COLUMNS = {  # of a row: heading, digits after the point
    "number": ("#", 0),
    "checkpoint": ("checkpoint", 0),
    "weights": ("weights", 0),
    "size": ("size", 0),
    "top1": ("top-1", 3),
    "top5": ("top-5", 3),
    "nll": ("NLL", 3),
    "ece": ("ECE", 3),
    "confidence": ("confidence", 3),
    "images": ("images", 0),
    "corrupt": ("corrupt", 0),
    "real_top1": ("ReaL top-1", 3),
    "real_top5": ("ReaL top-5", 3),
    "real_images": ("ReaL images", 0),
    "network_rate": ("network images/s", 1),
    "rate": ("images/s", 1),
}
CORRUPTION_COLUMNS = {
    "corruption": ("corruption", 0),
    **{f"severity_{number}": (str(number), 2) for number in corruptions.SEVERITIES},
    "error": ("mean error", 2),
    "relative": ("of AlexNet's", 1),
    "corrupt": ("corrupt", 0),
}
ALWAYS = ("corrupt",)  # in CSV files, whether or not there are any


def cell(value: object, digits: int) -> str:
    """A value as a table shows it."""
    if value is None:
        return ""
    return f"{value:.{digits}f}" if isinstance(value, float) else str(value)


def table(
    rows: Sequence[Mapping[str, Any]], columns: Mapping[str, tuple[str, int]] = COLUMNS
) -> str:
    """The table of all rows, without columns that have nothing to say.

    Args:
        rows: Values by the keys of columns.
        columns: Heading of each, and digits after the point.
    """
    keys = [key for key in columns if any(row.get(key) not in (None, "") for row in rows)]
    if not any(row.get("corrupt") for row in rows):
        keys.remove("corrupt")
    heads = [columns[key][0] for key in keys]
    return aligned(heads, [[cell(row.get(key), columns[key][1]) for key in keys] for row in rows])


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write all rows as a CSV file, in full precision."""
    keys = [
        key for key in COLUMNS if key in ALWAYS or any(row.get(key) is not None for row in rows)
    ]
    write_csv(path, keys, [[row.get(key) for key in keys] for row in rows])


def write_classes(path: Path, row: Mapping[str, Any]) -> None:
    """Write what a row's confusion matrix says of each class as a CSV file."""
    matched = row["matched"]
    names = matched.column_names
    scores = class_scores(row["confusion"])
    heads = ("class", "folder", "name", "images", "recall", "precision")
    heads += ("wrong_class", "wrong", "wrong_images")
    lines = [
        (
            *(output, name, readable(name), score.images, score.recall, score.precision),
            None if score.wrong is None else matched.columns[score.wrong],
            None if score.wrong is None else readable(names[score.wrong]),
            score.wrong_images,
        )
        for output, name, score in zip(matched.columns, names, scores, strict=True)
    ]
    write_csv(path, heads, lines)


def corruption_rows(
    measured: Sequence[corruptions.Corruption], is_whole: bool
) -> list[dict[str, Any]]:
    """A row for each corruption, and if all were measured, one of their means."""
    rows = [
        {"corruption": one.name}
        | {f"severity_{number}": error for number, error in enumerate(one.errors, start=1)}
        | {"error": one.mean, "relative": one.relative, "corrupt": one.corrupt}
        for one in measured
    ]
    if is_whole:
        means = {"error": corruptions.mean_error(measured), "relative": corruptions.mce(measured)}
        corrupt = sum(one.corrupt for one in measured)
        rows.append({"corruption": "mean", **means, "corrupt": corrupt})
    return rows


def corruption_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table of a network's rows, and the mCE if there is one."""
    mce = rows[-1]["relative"] if rows[-1]["corruption"] == "mean" else None
    text = table(rows, CORRUPTION_COLUMNS)
    return text if mce is None else f"{text}\nmCE {mce:.1f}"


def write_corruptions(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write the errors of all networks under corruptions as a CSV file."""
    keys = ("checkpoint", "weights", "size", *CORRUPTION_COLUMNS)
    write_csv(path, keys, [[row.get(key) for key in keys] for row in rows])
