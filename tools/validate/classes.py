"""Matching the classes of a test set to the outputs of a model, and class names."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache

from timm.data import ImageNetInfo

from models.errors import nearest
from pipeline.images import DataError
from pipeline.sources.listing import some_of
from tools.cli import shortened, shown

RULES = ("auto", "position", "wnid", "number")
NUM_IMAGENET = 1000
NAME_WIDTH = 24  # of a class in pictures
NUMBER, WNID = re.compile("[0-9]+"), re.compile("n[0-9]{8}")


@dataclass(frozen=True)
class ClassMap:
    """Outputs of a model for the classes of a test set."""

    rule: str  # how they were matched: name, wnid, number or position
    outputs: tuple[int, ...]  # index of the output of each class of the test set, C
    names: tuple[str, ...]  # class names of the test set, C
    num_outputs: int  # of the model

    @property
    def is_subset(self) -> bool:
        """The model has classes that the test set does not have."""
        return len(self.outputs) < self.num_outputs

    @property
    def columns(self) -> list[int]:
        """The outputs of the test set's classes, ascending."""
        return sorted(self.outputs)

    @property
    def column_names(self) -> list[str]:
        """Class name of each column."""
        return [name for _, name in sorted(zip(self.outputs, self.names, strict=True))]

    def __str__(self) -> str:
        part = f"{len(self.outputs)} of {self.num_outputs}" if self.is_subset else "all"
        return f"{part} classes, by {self.rule}"


@cache
def imagenet_names() -> dict[str, str]:
    """Return the names of ImageNet's 1000 classes by wnid, in the order of a model's outputs."""
    info = ImageNetInfo("imagenet-1k")
    return dict(zip(info.label_names(), info.label_descriptions(), strict=True))


@cache
def imagenet_wnids() -> tuple[str, ...]:
    """Return the wnids of ImageNet's 1000 classes in the order of a model's outputs."""
    return tuple(imagenet_names())


def readable(name: str) -> str:
    """Return the name of an ImageNet wnid; any other name unchanged."""
    return imagenet_names().get(name, name)


def synonyms(name: str) -> list[str]:
    """Return the comma-separated synonyms in an ImageNet name; any other name unchanged."""
    text = readable(name)
    return text.split(", ") if text in imagenet_names().values() else [text]


def labels(names: Sequence[str], numbers: Iterable[int], width: int = NAME_WIDTH) -> list[str]:
    """Return class names of at most ``width`` characters, with numbers where two are equal."""
    texts = [shortened(shown(synonyms(name)[0]), width) for name in names]
    count = Counter(texts)
    return [
        text if count[text] == 1 else f"{text} ({number})"
        for text, number in zip(texts, numbers, strict=True)
    ]


def match_classes(
    names: Sequence[str],
    num_outputs: int,
    known: Sequence[str] | None = None,
    rule: str = "auto",
    title: str = "the test set",
    source: str = "the model",
) -> ClassMap:
    """Return the output of each class of a test set.

    ``auto`` matches by the model's class names. If it has none, or ImageNet's wnids, names that are
    ImageNet's wnids or indices of outputs are taken as such; but as many indices as the outputs of
    a model other than ImageNet's, and all other names, match by position, as in training.

    Args:
        names: Class names of the test set, in its order.
        num_outputs, known: Number of outputs of the model, and their class names.
        rule: One of ``RULES``.
        title, source: Names of the test set and the model in messages.

    Raises:
        DataError: A class has no output, or two classes have the same.
    """
    if rule == "auto":
        rule = choose_rule(names, num_outputs, known)
    if rule == "position":
        if len(names) != num_outputs:
            raise DataError(
                f"{source} has {num_outputs} classes, {title} has {len(names)}, and their names "
                f"({some_of(names, 3)}) match no outputs"
            )
        return ClassMap(rule, tuple(range(num_outputs)), tuple(names), num_outputs)
    if rule == "wnid":
        if num_outputs != NUM_IMAGENET:
            raise DataError(
                f"{source} has {num_outputs} classes: wnids need a model of ImageNet's 1000 classes"
            )
        known = imagenet_wnids()
    elif rule == "number":
        known = [str(index) for index in range(num_outputs)]
    places = {name: index for index, name in enumerate(known)}
    outputs: dict[int, str] = {}
    for name in names:
        key = name.lstrip("0") or "0" if rule == "number" else name
        if key not in places:
            near = nearest(name, known) or known[:3]
            raise DataError(
                f"{title}: class {name!r} is not one of the {len(known)} of {source}, such as "
                f"{', '.join(near)} (--classes position takes them in order)"
            )
        output = places[key]
        if output in outputs:
            raise DataError(f"{title}: {outputs[output]!r} and {name!r} are both class {output}")
        outputs[output] = name
    return ClassMap(rule, tuple(outputs), tuple(names), num_outputs)


def choose_rule(names: Sequence[str], num_outputs: int, known: Sequence[str] | None) -> str:
    """Return the rule of ``auto``; see :func:`match_classes`."""
    if known is not None and (set(names) <= set(known) or tuple(known) != imagenet_wnids()):
        return "name"
    if num_outputs == NUM_IMAGENET and any(map(WNID.fullmatch, names)):
        return "wnid"
    as_trained = len(names) == num_outputs != NUM_IMAGENET
    return "number" if all(map(NUMBER.fullmatch, names)) and not as_trained else "position"


def find_class(asked: str, names: Sequence[str]) -> int:
    """Return the class of a name, else an index, else a readable name, else one of its synonyms.

    Raises:
        DataError: There is no such class, or there are several.
    """
    word, number = asked.lower(), asked.lstrip("0") or asked[-1:]
    passes = (
        lambda index, name: name == asked,
        lambda index, name: str(index) == number,
        lambda index, name: word in (name.lower(), readable(name).lower()),
        lambda index, name: word in map(str.lower, synonyms(name)),
    )
    for is_meant in passes:
        found = [index for index, name in enumerate(names) if is_meant(index, name)]
        if len(found) > 1:
            several = some_of([f"{index} ({readable(names[index])})" for index in found])
            raise DataError(f"--class {asked} is {several}: give a number")
        if found:
            return found[0]
    if NUMBER.fullmatch(asked):
        raise DataError(f"--class {asked[:20]} must be from 0 to {len(names) - 1}")
    known = dict.fromkeys(one.lower() for name in names for one in (name, *synonyms(name)))
    near = nearest(word, known, cutoff=0.5) or list(known)[:3]
    raise DataError(
        f"unknown --class {asked!r}; choose from {', '.join(near)}, ... or 0 to {len(names) - 1}"
    )
