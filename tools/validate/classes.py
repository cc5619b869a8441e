"""Which output of a network each class of a test set stands for."""

import difflib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from timm.data import ImageNetInfo

from pipeline.images import DataError

RULES = ("auto", "position", "wnid", "number")
NUM_IMAGENET = 1000
EXAMPLE = "n01440764"


@dataclass(frozen=True)
class ClassMap:
    """Outputs of a network that the classes of a set stand for.

    Attributes:
        rule: How they were matched: ``name``, ``wnid``, ``number`` or ``position``.
        outputs: Index of the output of each class of the set, ``C``.
        names: Of the classes of the set, ``C``.
        num_outputs: Of the network.
    """

    rule: str
    outputs: tuple[int, ...]
    names: tuple[str, ...]
    num_outputs: int

    @property
    def is_subset(self) -> bool:
        """Whether the network knows classes that the set has not."""
        return len(self.outputs) < self.num_outputs

    @property
    def order(self) -> list[int]:
        """Classes of the set in the order of their outputs."""
        return sorted(range(len(self.outputs)), key=self.outputs.__getitem__)

    @property
    def columns(self) -> list[int]:
        """The outputs that are compared, ascending."""
        return sorted(self.outputs)

    @property
    def column_names(self) -> list[str]:
        """Name of the class of each column."""
        return [self.names[position] for position in self.order]

    @property
    def column_of_class(self) -> list[int]:
        """Column of each class of the set, ``C``."""
        places = {output: column for column, output in enumerate(self.columns)}
        return [places[output] for output in self.outputs]

    def __str__(self) -> str:
        part = f"{len(self.outputs)} of {self.num_outputs}" if self.is_subset else "all"
        return f"{part} classes, by {self.rule}"


@cache
def imagenet_wnids() -> tuple[str, ...]:
    """The 1000 wnids of ImageNet's classes in the order of a classifier's outputs."""
    return tuple(ImageNetInfo("imagenet-1k").label_names())


@cache
def imagenet_names() -> dict[str, str]:
    """Readable names of ImageNet's 1000 classes by their wnids, in the same order."""
    return dict(
        zip(imagenet_wnids(), ImageNetInfo("imagenet-1k").label_descriptions(), strict=True)
    )


@cache
def _descriptions() -> frozenset[str]:
    return frozenset(imagenet_names().values())


def readable(name: str) -> str:
    """What a wnid of ImageNet stands for; any other name as it is."""
    return imagenet_names().get(name, name)


def synonyms(name: str) -> list[str]:
    """The names in one of ImageNet's, which are divided by commas; any other name as it is."""
    text = readable(name)
    return text.split(", ") if text in _descriptions() else [text]


def match_classes(
    names: Sequence[str],
    num_outputs: int,
    known: Sequence[str] | None = None,
    rule: str = "auto",
    title: str = "the set",
    source: str = "the network",
) -> ClassMap:
    """The output of each class of a set.

    ``auto`` goes by the names that the network has for its classes. Where it has none, or
    ImageNet's wnids, names that are ImageNet's wnids or numbers of outputs are taken for such;
    but numbers that a network other than ImageNet's has as many of as classes, and all else, stand
    for outputs by position, as in training.

    Args:
        names: Of the classes of the set, in its own order.
        num_outputs: Of the network.
        known: Its names of classes.
        rule: One of ``RULES``.
        title, source: What messages call the set and the network.

    Raises:
        DataError: A class has no output, or two have the same; names it.
    """
    if rule == "auto":
        rule = choose_rule(names, num_outputs, known)
    find = {"name": _by_name, "wnid": _by_wnid, "number": _by_number, "position": _by_position}
    outputs = find[rule](names, num_outputs, known, title, source)
    _check_distinct(names, outputs, title)
    return ClassMap(rule, tuple(outputs), tuple(names), num_outputs)


def choose_rule(names: Sequence[str], num_outputs: int, known: Sequence[str] | None) -> str:
    """What ``auto`` stands for; see :func:`match_classes`."""
    if known is not None and (set(names) <= set(known) or tuple(known) != imagenet_wnids()):
        return "name"
    if num_outputs == NUM_IMAGENET and any(_looks_like_wnid(name) for name in names):
        return "wnid"
    as_trained = len(names) == num_outputs != NUM_IMAGENET
    if all(_is_number(name) for name in names) and not as_trained:
        return "number"
    return "position"


def _looks_like_wnid(name: str) -> bool:
    return re.fullmatch(r"n\d{8}", name) is not None


def _is_number(name: str) -> bool:
    return name.isascii() and name.isdigit()


def _by_name(
    names: Sequence[str], num_outputs: int, known: Sequence[str], title: str, source: str
) -> list[int]:
    places = {name: index for index, name in enumerate(known)}
    for name in names:
        if name not in places:
            near = difflib.get_close_matches(name, known, n=3) or list(known[:3])
            raise DataError(
                f"{title}: class {name!r} is not among the {len(known)} of {source}, such as "
                f"{', '.join(near)} (--classes position takes them in order)"
            )
    return [places[name] for name in names]


def _by_wnid(
    names: Sequence[str], num_outputs: int, known: object, title: str, source: str
) -> list[int]:
    if num_outputs != NUM_IMAGENET:
        raise DataError(
            f"{source} knows {num_outputs} classes: wnids are matched for ImageNet's 1000 alone"
        )
    places = {wnid: index for index, wnid in enumerate(imagenet_wnids())}
    for name in names:
        if name not in places:
            raise DataError(
                f"{title}: class {name!r} is no wnid of ImageNet's 1000 classes, such as {EXAMPLE}"
            )
    return [places[name] for name in names]


def _by_number(
    names: Sequence[str], num_outputs: int, known: object, title: str, source: str
) -> list[int]:
    for name in names:
        if not _is_number(name):
            raise DataError(f"{title}: class {name!r} is no number, such as 0 or 17")
        if int(name) >= num_outputs:
            raise DataError(
                f"{title}: there is no class {name} in {source}, which has 0 to {num_outputs - 1}"
            )
    return [int(name) for name in names]


def _by_position(
    names: Sequence[str], num_outputs: int, known: object, title: str, source: str
) -> list[int]:
    if len(names) != num_outputs:
        raise DataError(
            f"{source} knows {num_outputs} classes, {title} has {len(names)}, whose names "
            f"({', '.join(names[:3])}{', ...' if len(names) > 3 else ''}) do not tell which"
        )
    return list(range(num_outputs))


def _check_distinct(names: Sequence[str], outputs: Sequence[int], title: str) -> None:
    seen: dict[int, str] = {}
    for name, output in zip(names, outputs, strict=True):
        if output in seen:
            raise DataError(f"{title}: {seen[output]!r} and {name!r} are the same class {output}")
        seen[output] = name


def read_names(file: Path) -> list[str]:
    """Names of classes, one in a line of a file.

    Raises:
        DataError: It cannot be read, or a line has no name.
    """
    try:
        text = file.read_text(encoding="utf-8-sig")  # editors on Windows begin files with a mark
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read --classes {file}: {error}") from error
    names = text.removesuffix("\n").split("\n")
    for number, name in enumerate(names, start=1):
        if not name.strip():
            raise DataError(f"--classes {file}: line {number} is empty, and should name a class")
    return names


def find_class(asked: str, names: Sequence[str]) -> int:
    """The class of a name, else an index, else a readable name, else one of its synonyms.

    Raises:
        DataError: There is none, or several; names them, or the range, or the nearest names.
    """
    word, number = asked.lower(), asked.lstrip("0") or asked[-1:]
    passes: tuple[Callable[[int, str], bool], ...] = (
        lambda index, name: name == asked,
        lambda index, name: str(index) == number,
        lambda index, name: word in (name.lower(), readable(name).lower()),
        lambda index, name: word in map(str.lower, synonyms(name)),
    )
    for is_meant in passes:
        found = [index for index, name in enumerate(names) if is_meant(index, name)]
        if len(found) > 1:
            several = ", ".join(f"{index} ({readable(names[index])})" for index in found[:5])
            more = ", ..." if len(found) > 5 else ""
            raise DataError(f"--class {asked} is {several}{more}: give a number")
        if found:
            return found[0]
    if _is_number(asked):
        raise DataError(f"--class {asked[:20]} is beyond the classes, 0 to {len(names) - 1}")
    known = dict.fromkeys(one.lower() for name in names for one in (name, *synonyms(name)))
    near = difflib.get_close_matches(word, known, n=3, cutoff=0.5) or list(known)[:3]
    raise DataError(
        f"there is no --class {asked!r}; such as {', '.join(near)}, or 0 to {len(names) - 1}"
    )
