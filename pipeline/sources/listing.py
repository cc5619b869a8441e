"""Files of a folder: which are images, and what is passed over, by reason."""

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from itertools import islice
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from ..images import IMAGE_FORMATS, DataError, open_regular

PREFIX = 16  # bytes of a file by which Pillow recognises its format
BINARY = re.compile(rb"[\0-\x08\x0e-\x1f]")  # bytes that no text has
SHOWN = 20  # names of each reason that are kept
HIDDEN, SYSTEM, OTHER = "hidden", "left by the system", "not images"
STRAY, WRITTEN = "images in no class folder", "pictures written before"
# names, in lower case, that macOS, Windows, Linux, Synology, QNAP and Python leave in folders
SYSTEM_NAMES = {
    *("__macosx", "icon\r", "network trash folder", "temporary items"),
    *("$recycle.bin", "system volume information", "thumbs.db", "ehthumbs.db"),
    *("desktop.ini", "lost+found", "__pycache__", "@eadir", "#recycle", "#snapshot"),
    *("@tmp", "@recycle", "@recently-snapshot"),
}


class LeftOut:
    """Files and folders that a listing passes over.

    Attributes:
        counts: Number by reason. A folder counts once, whatever it holds.
        names: First paths by reason, relative to the folder that was listed.
    """

    def __init__(self, folder: str | Path = ""):
        self.counts: Counter[str] = Counter()
        self.names: dict[str, list[str]] = {}
        self._folder = str(folder)

    def add(self, reason: str, path: str) -> None:
        """Count a file or folder."""
        self.counts[reason] += 1
        names = self.names.setdefault(reason, [])
        if len(names) < SHOWN:
            names.append(os.path.relpath(path, self._folder or None))

    def update(self, other: "LeftOut") -> None:
        """Add what another listing passed over."""
        self.counts.update(other.counts)
        for reason, names in other.names.items():
            self.names[reason] = (self.names.get(reason, []) + names)[:SHOWN]

    def __str__(self) -> str:
        return ", ".join(f"{count:,} {reason}" for reason, count in sorted(self.counts.items()))

    def note(self) -> str:
        """Return the end of a line that has counted the rest; empty if nothing is left out."""
        return f"; left out: {self}" if self.counts else ""


class Listing(NamedTuple):
    """Images of a folder, and what is not among them."""

    paths: list[str]
    left_out: LeftOut

    def __str__(self) -> str:
        return f"{len(self.paths):,} images{self.left_out.note()}"


class Row(NamedTuple):
    """A folder that is walked, and the images directly in it, sorted by name."""

    top: str  # name of the folder within the listed one that has it; empty for the listed one
    place: str
    images: list[str]


@cache
def image_suffixes() -> frozenset[str]:
    """Return the suffixes of the formats that are decoded, in lower case, with their dots."""
    known = Image.registered_extensions()
    return frozenset(suffix for suffix, name in known.items() if name in IMAGE_FORMATS)


def format_of(prefix: bytes) -> str | None:
    """Return the name of the format that a file begins as, from its first bytes, if any."""
    Image.init()
    accepts = ((name, Image.OPEN[name][1]) for name in IMAGE_FORMATS if name in Image.OPEN)
    # a text, instead of True, says that this build of Pillow lacks the decoder
    return next((name for name, accept in accepts if accept is None or accept(prefix)), None)


def suffix_of(name: str, data: bytes) -> str:
    """Return the suffix of an image: that of its name if it is one of images, else its format's.

    Args:
        name: Name of its file.
        data: Its content.
    """
    suffix = os.path.splitext(name)[1].lower()
    if suffix in image_suffixes():
        return suffix
    kind = format_of(data[:PREFIX])
    known = [end for end, name in Image.registered_extensions().items() if name == kind]
    usual = f".{kind.lower()}" if kind else ".image"
    return usual if usual in known or not known else known[0]


def is_image(path: str) -> bool:
    """Return True if a file has a suffix of images, or begins as an image.

    Raises:
        DataError: The file has another suffix, and cannot be read.
    """
    if os.path.splitext(path)[1].lower() in image_suffixes():
        return True
    if not os.path.isfile(path):  # a broken link, a pipe
        return False
    try:
        with open(open_regular(path), "rb", buffering=0) as file:
            prefix = file.read(PREFIX)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    if format_of(prefix) is None:
        return False
    # a text may begin as formats with short marks do, such as "BM" and "P1"
    return bool(BINARY.search(prefix)) or _has_header(path)


def _has_header(path: str) -> bool:
    try:
        with Image.open(path, formats=IMAGE_FORMATS):
            return True
    except Exception:  # on other files the readers raise errors of any kind
        return False


def list_images(folder: str | Path, *, recursive: bool = True) -> Listing:
    """Return the paths of the images of a folder, sorted by folder, then by name.

    Args:
        folder: Folder of the images; links to folders are followed.
        recursive: List the folders within it, too.

    Raises:
        DataError: A folder cannot be read, or a link leads to a folder above it.
    """
    left_out = LeftOut(folder)
    rows = sorted(walk(folder, left_out, recursive), key=lambda row: row.place)
    return Listing([path for row in rows for path in row.images], left_out)


def list_folders(folder: str | Path) -> list[str]:
    """Return the sorted names of the folders in a folder; links to folders count.

    Raises:
        DataError: The folder cannot be read.
    """
    return [entry.name for entry in _entries(str(folder), LeftOut(folder)) if _is_folder(entry)]


def find_images(places: Sequence[str | Path], ending: str) -> Listing:
    """Return files, and the images directly in folders, sorted by name; each file once.

    Args:
        places: Files and folders.
        ending: Of pictures that the program writes next to its images; passed over in folders.

    Raises:
        DataError: A folder has no images, or cannot be read.
    """
    found: dict[str, str] = {}
    left_out = LeftOut()
    for place in map(str, places):
        paths = [place]
        if os.path.isdir(place):
            listing = list_images(place, recursive=False)
            paths = [path for path in listing.paths if not path.endswith(ending)]
            for path in listing.paths:
                if path.endswith(ending):
                    listing.left_out.add(WRITTEN, path)
            left_out.update(listing.left_out)
            _check_any(place, paths, listing.left_out)
        for path in paths:
            found.setdefault(os.path.realpath(path), path)
    return Listing(list(found.values()), left_out)


def _check_any(folder: str, paths: Sequence[str], left_out: LeftOut) -> None:
    """Raise DataError if a folder has no images."""
    if paths:
        return
    if inside := list_folders(folder):
        first = os.path.join(folder, inside[0])
        raise DataError(f"folder {folder} has only subfolders: give one of them, such as {first}")
    raise DataError(f"folder {folder} has no images ({kinds()}){left_out.note()}")


def kinds() -> str:
    """Return the suffixes of images for messages."""
    return ", ".join(sorted(image_suffixes()))


def walk(folder: str | Path, left_out: LeftOut, recursive: bool = True) -> Iterator[Row]:
    """Yield the rows of a folder and, if ``recursive``, of all within it, in any order.

    Args:
        folder: Folder to walk; links to folders are followed.
        left_out: Counts what is passed over.
        recursive: Walk the folders within it, too.

    Raises:
        DataError: A folder cannot be read, or a link leads to a folder above it.
    """
    pending = [("", str(folder), (os.path.realpath(folder),))]
    known = image_suffixes()
    while pending:
        top, place, above = pending.pop()
        images, inside = [], []
        for entry in _entries(place, left_out):
            if _is_folder(entry):
                if recursive:
                    inside.append((top or entry.name, entry.path, _route(entry, above)))
            elif f".{entry.name.rpartition('.')[2].lower()}" in known or is_image(entry.path):
                images.append(entry.path)
            else:
                left_out.add(OTHER, entry.path)
        yield Row(top, place, images)
        pending += reversed(inside)


def named_images(folder: str | Path, most: int) -> Iterator[tuple[str, str]]:
    """Yield the files with suffixes of images, without opening any: their top folder, their path.

    Links to folders are not followed. The top folder is empty for files directly in ``folder``.

    Args:
        folder: Folder to walk.
        most: Number of folders to walk.
    """
    for place, inside, names in islice(os.walk(folder), most):
        inside[:] = sorted(name for name in inside if not _unwanted(name))
        top = os.path.relpath(place, folder).partition(os.sep)[0] if place != str(folder) else ""
        for name in names:
            if os.path.splitext(name)[1].lower() in image_suffixes() and not _unwanted(name):
                yield top, os.path.join(place, name)


def _entries(folder: str, left_out: LeftOut) -> list[os.DirEntry]:
    """Return the entries of a folder by name, without those that are passed over by their names."""
    try:
        with os.scandir(folder) as found:
            entries = sorted(found, key=attrgetter("name"))
    except OSError as error:
        raise DataError(f"cannot read folder {folder}: {error.strerror}") from error
    kept = []
    for entry in entries:
        if reason := _unwanted(entry.name):
            left_out.add(reason, entry.path)
        else:
            kept.append(entry)
    return kept


def _unwanted(name: str) -> str | None:
    """Return the reason to pass over a file or folder by its name, if there is one."""
    return HIDDEN if name[0] == "." else SYSTEM if name.lower() in SYSTEM_NAMES else None


def keep_images(paths: Iterable[str], left_out: LeftOut) -> list[str]:
    """Return the images of a listing by others, as torchvision's; count the rest."""
    kept = []
    for path in paths:
        if reason := _unwanted(os.path.basename(path)) or (None if is_image(path) else OTHER):
            left_out.add(reason, path)
        else:
            kept.append(path)
    return kept


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _route(entry: os.DirEntry, above: tuple[str, ...]) -> tuple[str, ...]:
    """Return the real paths that a folder is reached by: where links were left, and its own.

    Raises:
        DataError: It is a link to one of the folders on the way.
    """
    if not entry.is_symlink():
        return (*above[:-1], os.path.join(above[-1], entry.name))
    target = os.path.realpath(entry.path)
    if any(os.path.commonpath([target, place]) == target for place in above):
        raise DataError(
            f"link {entry.path} leads to {target}, a folder above it: its images would be listed"
            " again and again; remove the link"
        )
    return (*above, target)


def some_of(names: Sequence[str], count: int = 5) -> str:
    """Return the first names for a message."""
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "")
