"""Draw which room of the repository imports which, into ``docs/ARCHITECTURE.md``.

``python -m tools.rooms`` reads the import statements and replaces the page's Mermaid flowchart. An
arrow that follows from others is left out.
"""

import ast
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

from tools import cli
from tools.pages import write_between
from training.parser import Parser

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "ARCHITECTURE.md"
ROOMS = ("main", "tools", "object_detection", "training", "datasets", "engine", "pipeline")
ROOMS += ("hubconf", "models", "samplers", "utils")


def files() -> list[Path]:
    """Return the Python files of all rooms."""
    rooms = [path for room in ROOMS for path in (ROOT / f"{room}.py", ROOT / room)]
    return sorted(
        path for room in rooms for path in ([room] if room.is_file() else room.rglob("*.py"))
    )


def room_of(path: Path) -> str:
    """Return the room of a file: its folder or module at the top."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def import_statements(path: Path) -> Iterator[ast.Import | ast.ImportFrom]:
    """Yield the import statements of a file, wherever they are."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node


def imported(path: Path) -> set[str]:
    """Return the packages at the top, ours and others, that a file imports from."""
    names = set()
    for node in import_statements(path):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        else:
            names.add(room_of(path) if node.level else node.module.split(".")[0])
    return names


def used_rooms() -> dict[str, set[str]]:
    """Return the other rooms that each room imports from."""
    used = {room: set() for room in ROOMS}
    for path in files():
        used[room_of(path)] |= imported(path) & {*ROOMS} - {room_of(path)}
    return used


def flowchart() -> str:
    """Return the rooms as a flowchart in Mermaid, without arrows that follow from others.

    Raises:
        CycleError: Rooms import each other.
    """
    used, reached = used_rooms(), {}
    for room in TopologicalSorter(used).static_order():
        reached[room] = used[room].union(*(reached[below] for below in used[room]))
    lines = ["flowchart TD"]
    for room in ROOMS:
        indirect = set().union(*(reached[below] for below in used[room]))
        lines += [f"    {room} --> {below}" for below in ROOMS if below in used[room] - indirect]
    return "\n".join(["```mermaid", *lines, "```"])


@cli.program
def main(argv: list[str]) -> None:
    """Write the flowchart into the page."""
    Parser("tools.rooms", description=__doc__.splitlines()[0]).parse_args(argv)
    write_between(PAGE, "rooms", flowchart())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
