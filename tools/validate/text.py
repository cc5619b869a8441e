"""Names of files and classes as tables and pictures show them."""

from collections import Counter
from collections.abc import Iterable, Sequence

from tools.cli import shown
from tools.validate.classes import synonyms

NAME_WIDTH = 24


def shortened(text: str, width: int) -> str:
    """``text``, or its beginning and an ellipsis, of ``width`` letters at most."""
    return text if len(text) <= width else f"{text[: width - 1]}…"


def labels(names: Sequence[str], numbers: Iterable[int], width: int = NAME_WIDTH) -> list[str]:
    """Short names of classes; with their numbers, where two would read the same.

    Args:
        names, numbers: Of the classes, ``K``.
        width: Letters of a name, at most.
    """
    texts = [shortened(shown(synonyms(name)[0]), width) for name in names]
    count = Counter(texts)
    return [
        text if count[text] == 1 else f"{text} ({number})"
        for text, number in zip(texts, numbers, strict=True)
    ]
