"""Classes of images from a file of labels: a table with a row for each image."""

import csv
import io
import math
import os
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ..images import DataError
from .base import Files
from .class_names import read_text
from .folder import VALIDATION, check_folder, find_validation, open_image_folder
from .listing import LeftOut, list_images, some_of
from .split import HoldOut

# names of columns, without spaces, dashes and underscores; the first that is there is taken
FILE_COLUMNS = ("file", "filename", "image", "path", "name", "imageid", "id")
LABEL_COLUMNS = ("label", "class", "target", "category")
SPLIT_COLUMN, TRAIN = "split", ("train", "training")
SEVERAL = re.compile(r".*[;|].*|\[.*\]|\{.*\}", re.S)  # a list of labels
NUMBER = re.compile(r"[+-]?\d+(\.\d*)?([eE][+-]?\d+)?|[+-]?\.\d+")
MANY = 20  # classes whose names may be fractions
UNLABELLED, ELSEWHERE = "not in the labels", "of another split"


class Label(NamedTuple):
    """A row of the table."""

    line: int
    file: str
    label: str
    split: str | None  # None without a column of splits


def read_labels(file: Path) -> list[Label]:
    """Read a table of files and labels: UTF-8, or UTF-16 with its byte order mark.

    Columns end in tabs if the file's name ends in ``.tsv``, else in commas or semicolons.

    Raises:
        DataError: It cannot be read, has no rows, other columns or a row with an empty cell or too
            few or too many of them, or its labels are not one class per image; names the line.
    """
    where = f"--labels {file}"
    text = read_text(file, "--labels")
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=_delimiter(file, text), strict=True)
    found: list[Label] = []
    columns: tuple[int, int, int | None] | None = None
    width = 0
    try:
        for row in rows:
            if not any(cell.strip() for cell in row):
                continue
            if columns is None:
                columns, width = _columns(row, f"{where}, line {rows.line_num}"), len(row)
                if columns is not None:
                    continue
                columns = (0, 1, None)
            if len(row) != width:
                raise DataError(
                    f"{where}, line {rows.line_num}: it has {len(row)} columns, not {width}; names"
                    f" with delimiters must be in quotes"
                )
            name, label, split = (None if i is None else row[i].strip() for i in columns)
            if not name or not label:
                raise DataError(f"{where}, line {rows.line_num}: the file or its label is empty")
            found.append(Label(rows.line_num, name, label, split))
    except csv.Error as error:
        raise DataError(f"{where}, line {rows.line_num}: {error}") from error
    if not found:
        raise DataError(f"{where} has no rows of file and label")
    _check_single(found, where)
    return found


def _delimiter(file: Path, text: str) -> str:
    if file.suffix.lower() == ".tsv":
        return "\t"
    first = text.lstrip().partition("\n")[0].rstrip("\r")
    cells = {mark: next(csv.reader([first], delimiter=mark), []) for mark in (",", ";")}
    headers = [mark for mark, row in cells.items() if _has_names(row)]
    pairs = [mark for mark, row in cells.items() if len(row) == 2]
    return next(iter([*headers, *pairs, *(mark for mark in cells if mark in first)]), ",")


def _simple(row: Sequence[str]) -> list[str]:
    return [re.sub(r"[\s_-]", "", cell).lower() for cell in row]


def _has_names(row: Sequence[str]) -> bool:
    names = {*_simple(row)}
    return not names.isdisjoint(FILE_COLUMNS) and not names.isdisjoint(LABEL_COLUMNS)


def _columns(row: Sequence[str], where: str) -> tuple[int, int, int | None] | None:
    """Return the places of file, label and split by a header; None for a row of two cells."""
    names = _simple(row)
    if _has_names(row):
        file, label = (
            next(names.index(name) for name in known if name in names)
            for known in (FILE_COLUMNS, LABEL_COLUMNS)
        )
        return file, label, names.index(SPLIT_COLUMN) if SPLIT_COLUMN in names else None
    if len(row) == 2:
        return None
    raise DataError(
        f"{where}: {some_of(row, 8)} must be two columns, file and label, or a header with one of"
        f" {', '.join(FILE_COLUMNS)} and one of {', '.join(LABEL_COLUMNS)}, separated by commas or"
        f" semicolons (by tabs in a file *.tsv)"
    )


def _check_single(rows: Sequence[Label], where: str) -> None:
    """Raise DataError unless every label is a class."""
    for row in rows:
        if SEVERAL.fullmatch(row.label):
            raise DataError(
                f"{where}, line {row.line}: {row.label!r} is several labels; images have one class"
                f" each"
            )
    names = {row.label for row in rows}
    if not all(map(NUMBER.fullmatch, names)):
        return
    fractions = any(math.modf(float(name))[0] for name in names)
    if fractions and (len(names) > MANY or 2 * len(names) > len(rows)):
        raise DataError(
            f"{where}: {len(names):,} different numbers, such as {rows[0].label}, are not classes;"
            f" images have one class each"
        )


def sort_classes(names: set[str]) -> list[str]:
    """Return class names in order, by value if all are numbers."""
    if all(map(NUMBER.fullmatch, names)):
        return sorted(names, key=lambda name: (float(name), name))
    return sorted(names)


def _within(name: str, root: Path, where: str) -> str:
    """Return the path of a file within the folder of the dataset.

    Raises:
        DataError: It leads out of the folder.
    """
    tries = [os.path.normpath(name)]
    if os.path.isabs(name):
        tries = [
            os.path.relpath(name, at) for at in (os.path.abspath(root), os.path.realpath(root))
        ]
    for path in tries:
        if path.split(os.sep)[0] != os.pardir:
            return path.replace(os.sep, "/")
    raise DataError(f"{where}: {name} leads out of {root} (--data-path)")


class Finder:
    """Images of a folder by the names that a table has for them.

    Args:
        names: Path of each image within the folder, with slashes.
    """

    def __init__(self, names: Sequence[str]):
        self._names = names
        self._exact = {name: index for index, name in enumerate(names)}
        self._others: dict[str, list[int]] = {}
        for index, name in enumerate(names):
            same = unicodedata.normalize("NFC", name)
            for key in {same, os.path.splitext(same)[0]}:
                self._others.setdefault(key, []).append(index)

    def find(self, name: str, where: str) -> int | None:
        """Return the index of an image by its path, which may lack the suffix.

        Raises:
            DataError: Several images differ in their suffixes alone.
        """
        if name in self._exact:
            return self._exact[name]
        found = self._others.get(unicodedata.normalize("NFC", name), [])
        if len(found) > 1:
            several = some_of([self._names[index] for index in found])
            raise DataError(f"{where}: {name} may be {several}: give the suffix, too")
        return found[0] if found else None


def split_of(rows: Sequence[Label], root: Path, where: str) -> list[str] | None:
    """Return the split of each row, ``train``, ``val`` or empty; None if there are not both.

    The column ``split`` says so, or else all paths do by their first folder.

    Raises:
        DataError: The column has another word, or a path leads out of ``root``.
    """
    if rows[0].split is not None:
        words = [row.split.lower() for row in rows]
        for row, word in zip(rows, words, strict=True):
            if word not in (*TRAIN, *VALIDATION):
                known = ", ".join((*TRAIN, *VALIDATION))
                raise DataError(f"{where}, line {row.line}: split {word!r} must be one of {known}")
    else:
        paths = [_within(row.file, root, f"{where}, line {row.line}") for row in rows]
        words = [path.partition("/")[0] if "/" in path else "" for path in paths]
    present = {*words}
    val = next((name for name in VALIDATION if name in present), None)
    if val is None or present.isdisjoint(TRAIN) or not present <= {*TRAIN, *VALIDATION}:
        return None
    return ["train" if word in TRAIN else "val" if word == val else "" for word in words]


def _match(rows: Sequence[Label], root: Path, names: Sequence[str], where: str) -> list[int]:
    """Return the index of the image of each row.

    Raises:
        DataError: There is none, there are several, or two rows of an image differ.
    """
    finder, found, missing = Finder(names), [], []
    first: dict[int, Label] = {}
    for row in rows:
        place = f"{where}, line {row.line}"
        options = dict.fromkeys((row.file, row.file.replace("\\", "/")))  # of Windows
        paths = [_within(name, root, place) for name in options]
        index = next((i for path in paths if (i := finder.find(path, place)) is not None), None)
        if index is None:
            missing.append(row)
            continue
        found.append(index)
        other = first.setdefault(index, row)
        if (other.label, other.split) != (row.label, row.split):
            raise DataError(
                f"{where}: {row.file} is {other.label} on line {other.line} and {row.label} on"
                f" line {row.line}"
            )
    if missing:
        row = missing[0]
        hint = "; a header has one of the names in docs/DATA.md" if row.line == 1 else ""
        raise DataError(
            f"{where}: {len(missing):,} of {len(rows):,} files are not images of {root}, the first"
            f" on line {row.line}: {row.file}{hint}"
        )
    return found


def open_labels(
    root: Path,
    is_train: bool,
    file: Path,
    held_out: HoldOut | None = None,
    whole: bool = False,
) -> Files:
    """Open the images of a folder, at any depth, that a table of labels names.

    Args:
        root: Folder of the dataset.
        is_train: Open the training split (else validation).
        file: Table; see :func:`read_labels`.
        held_out: Divides the images, unless the table does.
        whole: Open all images of a table that does not divide them.

    Raises:
        DataError: The table cannot be used, does not fit the images, or nothing divides them.
    """
    check_folder(root)
    rows, where = read_labels(file), f"--labels {file}"
    parts = split_of(rows, root, where)
    if parts is not None and held_out is not None:
        raise DataError(f"{held_out}: {where} has training and validation files: leave it out")
    if parts is None and held_out is None and not whole:
        raise DataError(
            f"{where} does not divide its {len(rows):,} files, by a column split or by paths that"
            f" begin with train/ and val/: give --val-split 0.2, or --k-folds 5 --fold 0"
        )
    paths, left_out = list_images(root)
    images = Files(paths, [0] * len(paths), [""], root)
    indices = _match(rows, root, images.names(), where)
    chosen = _chosen(rows, indices, parts, is_train)
    named = {*indices}
    for index, path in enumerate(paths):
        if index not in named:
            left_out.add(UNLABELLED, path)
    classes = sort_classes({*chosen.values()})
    source = _source(paths, chosen, classes, root, left_out)
    if again := len(rows) - len(named):
        source.notices += (f"{where} has {again:,} files again, with the same label",)
    if parts is None:
        return source if held_out is None else held_out.part(source, is_train)
    for split, index in zip(parts, indices, strict=True):
        if not split:
            left_out.add(ELSEWHERE, paths[index])
    if is_train:
        return source
    trained = sort_classes({*_chosen(rows, indices, parts, True).values()})
    return source.in_classes(trained, f"the validation set of {where}")


def _chosen(
    rows: Sequence[Label], indices: Sequence[int], parts: Sequence[str] | None, is_train: bool
) -> dict[int, str]:
    """Return the label of each image of a split, in the order of the images."""
    wanted = "train" if is_train else "val"
    pairs = zip(rows, indices, parts or [wanted] * len(rows), strict=True)
    return dict(sorted((index, row.label) for row, index, part in pairs if part == wanted))


def _source(
    paths: Sequence[str],
    labels: dict[int, str],
    classes: Sequence[str],
    root: Path,
    left_out: LeftOut,
) -> Files:
    numbers = {name: number for number, name in enumerate(classes)}
    targets = [numbers[label] for label in labels.values()]
    source = Files([paths[index] for index in labels], targets, classes, root)
    source.left_out = left_out
    return source


def open_images(
    root: Path, is_train: bool, held_out: HoldOut | None = None, labels: str | Path | None = None
) -> Files:
    """Open an image folder, whose classes are folders or, with ``labels``, those of a table.

    See :func:`pipeline.sources.folder.open_image_folder` and :func:`open_labels`.
    """
    if labels is None:
        return open_image_folder(root, is_train, held_out=held_out)
    return open_labels(root, is_train, Path(labels), held_out)


def has_validation(root: Path, labels: str | Path | None) -> bool:
    """Return True if a folder, or the table of its labels, has a validation set.

    Raises:
        DataError: The table cannot be used.
    """
    if labels is None:
        return find_validation(root)[0] is not None
    return split_of(read_labels(Path(labels)), root, f"--labels {labels}") is not None
