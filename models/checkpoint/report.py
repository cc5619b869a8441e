"""What loading a checkpoint comes to."""

import re
from dataclasses import dataclass

from models.errors import printable


@dataclass(frozen=True)
class LoadReport:
    """What :func:`load_checkpoint` did.

    Attributes:
        source: The file.
        loaded: Keys of the model that were filled.
        renamed: Keys of the checkpoint that have another name in the model.
        resampled: Keys of the model whose value was resampled to the model's size.
        ignored: Keys of the checkpoint that the model computes itself.
        left: Keys of the model that keep their initial value.
        dropped: Keys of the checkpoint that the model has no use for.
        notes: What else the checkpoint says about the model, and was applied.
    """

    source: str
    loaded: tuple[str, ...]
    renamed: tuple[str, ...] = ()
    resampled: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    left: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        parts = [f"{len(self.loaded)} tensors loaded"]
        for what in ("renamed", "resampled", "ignored"):
            if keys := getattr(self, what):
                parts.append(f"{len(keys)} {what}")
        for what, keys in (("left at their initial value", self.left), ("dropped", self.dropped)):
            if keys:
                names = dict.fromkeys(re.sub(r"(\.\d+\..*|\.[^.]*)$", "", key) for key in keys)
                parts.append(f"{what}: {', '.join(names)}")
        return printable(f"{self.source}: {', '.join((*parts, *self.notes))}")
