"""Imports form a DAG of rooms, and importing prints nothing."""

import ast

import pytest
from conftest import ROOT, run_python

GROUND = {"models", "samplers", "utils"}
FLOORS = GROUND | {"pipeline", "engine", "datasets", "training"}
ALLOWED = {  # rooms that a room may import from, itself apart
    "main": FLOORS,
    "tools": FLOORS,
    "object_detection": FLOORS,
    "training": FLOORS - {"training"},
    "datasets": {"pipeline", "samplers", "utils"},
    "engine": {"utils"},
    "pipeline": {"samplers", "utils"},
    "hubconf": {"models"},
    "models": set(),
    "samplers": set(),
    "utils": set(),
}
MODELS_USE = {"torch", "timm", "einops", "safetensors", "models"}


def files():
    rooms = [ROOT / f"{name}.py" for name in ALLOWED] + [ROOT / name for name in ALLOWED]
    return sorted(
        path for room in rooms for path in ([room] if room.is_file() else room.rglob("*.py"))
    )


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert all(alias.name != "*" for alias in node.names), f"{path}: star import"
            yield node.module.split(".")[0]


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_keep_to_the_rooms(path):
    room = path.relative_to(ROOT).parts[0].removesuffix(".py")
    used = set(imports(path))
    assert used & {*ALLOWED, "tests"} <= ALLOWED[room] | {room}
    if room == "models":
        import sys

        assert used - MODELS_USE <= set(sys.stdlib_module_names)


def test_every_room_was_looked_at():
    assert {"main.py", "visformer.py", "attention.py", "demo.py"} <= {p.name for p in files()}


@pytest.mark.parametrize(
    "module", ["models", "engine, datasets, samplers, utils, main", "object_detection"]
)
def test_importing_is_silent(module):
    done = run_python("-c", f"import {module}")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
