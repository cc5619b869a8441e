"""Hostile files end soon, with one line that names them."""

import resource
from functools import partial

import pytest
from hostile import checkpoints, images, recipes, tars
from loading import refused

from models import CheckpointError
from models.checkpoint.read import read_checkpoint
from pipeline.crop import is_readable, read_header
from pipeline.images import CorruptImageError, DataError, load_image
from pipeline.sources.shard_index import MAX_INDEX, parse_index
from pipeline.sources.shards import open_shards
from training.parser import Parser
from training.recipes import recipe_argv
from utils import UserError

SECONDS = 10  # of a processor that others use as well; alone, it takes 5 at most


def shards(path):
    return open_shards(str(path), True)


def recipe(path):
    return recipe_argv(Parser(), str(path))


CASES = [
    (load_image, CorruptImageError, images),
    (shards, DataError, tars),
    (read_checkpoint, CheckpointError, checkpoints),
    (recipe, UserError, recipes),
]
FILES = [
    pytest.param(read, kind, data, value, id=name)
    for read, kind, make in CASES
    for name, data, value in make()
]


def cpu_seconds():
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


@pytest.mark.parametrize(("read", "kind", "data", "value"), FILES)
def test_hostile_files_end_soon(tmp_path, request, read, kind, data, value):
    path = tmp_path / request.node.callspec.id
    path.write_bytes(data)
    start = cpu_seconds()
    message = refused(partial(read, path), path, value, kind=kind)
    assert cpu_seconds() - start < SECONDS
    assert "\n" not in message


def test_scans_are_refused_by_all_readers():
    data = next(data for name, data, _ in images() if name == "scans.jpg")
    assert not is_readable(read_header(data), data)


@pytest.mark.parametrize("text", [b"[" * 10**5, b" " * (MAX_INDEX + 1), b"9" * 10**4])
def test_indices_are_bounded(text):
    refused(partial(parse_index, text, "train.json"), "train.json", kind=DataError)
