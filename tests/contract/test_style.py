"""Imports form a DAG of rooms, and importing prints nothing."""

import ast
import sys
from graphlib import TopologicalSorter

import pytest
from conftest import ROOT, run_python

from tools import rooms
from tools.rooms import files, room_of

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


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_keep_to_the_rooms(path):
    room, used = room_of(path), rooms.imported(path)
    for node in rooms.import_statements(path):
        assert all(alias.name != "*" for alias in node.names), "star import"
        if isinstance(node, ast.ImportFrom):
            is_own = node.level > 0 or node.module.split(".")[0] == room
            assert (node.level > 0) == (is_own and room in RELATIVE)
    assert used & {*ALLOWED, "tests"} <= ALLOWED[room] | {room}
    if room == "models":
        assert used - MODELS_USE <= set(sys.stdlib_module_names)


def test_rooms_stand_on_five_floors_without_a_circle():
    used = rooms.used_rooms()
    floors = {}
    for room in TopologicalSorter(used).static_order():  # raises CycleError
        floors[room] = 1 + max((floors[below] for below in used[room]), default=0)
    assert floors.keys() == {*ALLOWED} and max(floors.values()) <= 5


def test_the_page_of_the_house_is_true():
    """``python -m tools.rooms`` writes it."""
    assert rooms.flowchart() in rooms.PAGE.read_text()
    assert "training --> engine" in rooms.flowchart()


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
