"""Imports form a DAG of rooms, and importing prints nothing."""

import ast
import sys
from graphlib import TopologicalSorter

import pytest
from conftest import ROOT, run_python

GROUND = {"models", "samplers", "utils"}
FLOORS = GROUND | {"pipeline", "engine", "datasets", "training"}
ALLOWED = {  # rooms that a room may import from, itself apart
    "main": FLOORS,
    "tools": FLOORS,
    "object_detection": FLOORS,
    "training": FLOORS - {"training"},
    "datasets": {"models", "pipeline", "samplers", "utils"},
    "engine": {"utils"},
    "pipeline": GROUND,
    "hubconf": {"models"},
    "models": set(),
    "samplers": set(),
    "utils": set(),
}
RELATIVE = {"models", "pipeline"}  # their files import each other so, as they have two names
MODELS_USE = {"torch", "timm", "safetensors", "huggingface_hub", "models"}


def files():
    rooms = [ROOT / f"{name}.py" for name in ALLOWED] + [ROOT / name for name in ALLOWED]
    return sorted(
        path for room in rooms for path in ([room] if room.is_file() else room.rglob("*.py"))
    )


def imports(path):
    room = room_of(path)
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name.split(".")[0] for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert all(alias.name != "*" for alias in node.names), f"{path}: star import"
            names = [room] if node.level else [node.module.split(".")[0]]
            assert (node.level > 0) == (names == [room] and room in RELATIVE), f"{path}: {names}"
        yield from names


def room_of(path):
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_keep_to_the_rooms(path):
    room = room_of(path)
    used = set(imports(path))
    assert used & {*ALLOWED, "tests"} <= ALLOWED[room] | {room}
    if room == "models":
        assert used - MODELS_USE <= set(sys.stdlib_module_names)


def test_rooms_stand_on_five_floors_without_a_circle():
    used = {room: set() for room in ALLOWED}
    for path in files():
        used[room_of(path)] |= set(imports(path)) & {*ALLOWED} - {room_of(path)}
    floors = {}
    for room in TopologicalSorter(used).static_order():  # raises CycleError
        floors[room] = 1 + max((floors[below] for below in used[room]), default=0)
    assert floors.keys() == used.keys() and max(floors.values()) <= 5


def test_every_room_was_looked_at():
    assert {"main.py", "visformer.py", "attention.py", "demo.py"} <= {p.name for p in files()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "most"),
    [("models", 200), ("engine", 20), ("datasets, samplers, main", 200), ("object_detection", 200)],
)
def test_importing_is_silent_and_loads_few_modules(module, most):
    ours = f"[name for name in sys.modules if name.partition('.')[0] in {set(ALLOWED)}]"
    done = run_python("-c", f"import {module}, sys; print(len({ours}))")
    assert (done.returncode, done.stderr) == (0, "")
    assert 1 <= int(done.stdout) <= most
