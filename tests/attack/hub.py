"""``config.json`` of the Hub's folders."""

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.attack.case import FINE, REFUSED, Case
from tests.attack.metadata import BREAK, ESCAPE, LARGE, RTL
from tests.attack.programs import readers
from tests.attack.valid import World

VALUES: dict[str, tuple[Any, str]] = {  # a key of the config: its value, and what is named
    "architecture number": (("architecture", 7), "config.json"),
    "architecture list": (("architecture", ["vit_b_32_224"]), "config.json"),
    "architecture none such": (("architecture", "nonesuch_9"), "nonesuch_9"),
    "architecture with ESC": (("architecture", ESCAPE), "[2J"),
    "architecture of two lines": (("architecture", BREAK), "error: b"),
    "architecture right to left": (("architecture", RTL), "abc"),
    "architecture address": (("architecture", "hf-hub:timm/x"), "hf-hub:timm/x"),
    "pretrained_cfg list": (("pretrained_cfg", [1]), "config.json"),
    "pretrained_cfg text": (("pretrained_cfg", "x"), "config.json"),
    "model_args list": (("model_args", [1]), "model_args"),
    "model_args text": (("model_args", "depth"), "model_args"),
    "model_args url": (
        ("model_args", {"pretrained_cfg": {"url": "http://x.invalid"}}),
        "pretrained",
    ),
    "model_args file": (("model_args", {"checkpoint_path": "/etc/passwd"}), "checkpoint_path"),
    "model_args cache": (("model_args", {"cache_dir": "/tmp/attacked"}), "cache_dir"),
    "model_args huge": (("model_args", {"depth": 10**5}), "hub"),
    "model_args deep": (("model_args", {"depth": [[[[[[1]]]]]]}), "depth"),
    "model_args unknown": (("model_args", {ESCAPE: 1}), "[2J"),
    "num_classes text": (("num_classes", "2"), "num_classes"),
    "num_classes huge": (("num_classes", LARGE), "num_classes"),
    "num_classes other": (("num_classes", 7), "7"),
    "num_classes list": (("num_classes", [2]), "num_classes"),
    "label_names number": (("label_names", 3), "classes"),
    "label_names numbers": (("label_names", [1, 2]), "classes"),
    "label_names too many": (("label_names", ["a"] * 10**5), "100000"),
    "label_names odd dict": (("label_names", {"x": "cat", "y": "dog"}), "classes"),
    "gelu number": (("gelu", 3), "gelu"),
    "gelu unknown": (("gelu", "exact"), "gelu"),
}
IMAGES = {
    "input_size": [0, [3, -1, 32], "32", [3, 10**9, 10**9], {}],
    "mean": ["x", [0.5], [1e999, 0, 0], 10**400],
    "std": [[0, 0, 0]],
    "crop_pct": ["x", -1, 10**400, []],
    "interpolation": ["nonesuch", 7, ESCAPE],
    "crop_mode": ["nonesuch", []],
}
TEXTS = {
    "empty": b"",
    "not JSON": b"{'architecture': 1}",
    "NUL": b"\0" * 100,
    "no UTF-8": b"\xff\xfe\xfd",
    "deep": b"[" * 10**6,
    "deep objects": b'{"a":' * 10**5,
    "number": b"7",
    "list": b"[]",
    "null": b"null",
    "long number": b'{"architecture": ' + b"9" * 5000 + b"}",
    "surrogate": b'{"architecture": "\\ud800x"}',
    "20 MB": b'{"a": "' + b"x" * (20 << 20) + b'"}',
}


def with_config(write: Callable[[Path, World], object]) -> Callable[[Path, World], None]:
    """Return a function that writes a folder of the valid weights and another config."""

    def make(folder: Path, world: World) -> None:
        place = folder / "hub"
        shutil.copytree(world.folder / "hub", place)
        (place / "config.json").unlink()
        write(place / "config.json", world)

    return make


def of_values(key: str, value: Any) -> Callable[[Path, World], None]:
    return with_config(
        lambda path, world: path.write_text(json.dumps(world.config(**{key: value})))
    )


def of_images(key: str, value: Any) -> Callable[[Path, World], None]:
    def write(path: Path, world: World) -> None:
        config = world.config()
        config["pretrained_cfg"][key] = value
        path.write_text(json.dumps(config))

    return with_config(write)


def of_bytes(data: bytes) -> Callable[[Path, World], None]:
    return with_config(lambda path, world: path.write_bytes(data))


def loop(path: Path, world: World) -> None:
    path.symlink_to(path)


def sparse(path: Path, world: World) -> None:
    with path.open("wb") as file:
        file.truncate(1 << 40)


KINDS: dict[str, Callable[[Path, World], object]] = {
    "a folder": lambda path, world: path.mkdir(),
    "a pipe": lambda path, world: os.mkfifo(path),
    "a loop": loop,
    "sparse": sparse,
    "missing": lambda path, world: None,
}


def with_weights(write: Callable[[Path], object]) -> Callable[[Path, World], None]:
    def make(folder: Path, world: World) -> None:
        place = folder / "hub"
        place.mkdir()
        shutil.copy(world.folder / "hub" / "config.json", place)
        write(place / "model.safetensors")

    return make


WEIGHTS: dict[str, Callable[[Path], object]] = {
    "weights missing": lambda path: None,
    "weights empty": lambda path: path.touch(),
    "weights a pipe": lambda path: os.mkfifo(path),
    "weights a loop": lambda path: path.symlink_to(path),
    "weights cut": lambda path: path.write_bytes(b"\x10\0\0\0\0\0\0\0{"),
}


def cases(rng: random.Random) -> list[Case]:
    """Return the cases of this class."""
    makes = [(name, of_values(*value), named) for name, (value, named) in VALUES.items()]
    for key, values in IMAGES.items():
        makes += [(f"{key} {i}", of_images(key, value), key) for i, value in enumerate(values)]
    makes += [(name, of_bytes(data), ("config.json", "ud800x")) for name, data in TEXTS.items()]
    makes += [(name, with_config(write), "hub") for name, write in KINDS.items()]
    makes += [(name, with_weights(write), "hub") for name, write in WEIGHTS.items()]
    found, start = [], rng.randrange(10**6)
    for i, (name, make, named) in enumerate(makes):
        source = ("@hub", "local-dir:@hub")[(start + i) % 2]
        programs = [*readers(source), ("load_model", [source])]
        programs = [(name, words) for name, words in programs if name != "torch.hub"]
        program, words = programs[(start + i) % len(programs)]
        found.append(Case("hub", name, program, words, make, named, REFUSED))
    fine = of_values("labels", {ESCAPE: BREAK, "license": RTL})
    found.append(Case("hub", "odd unused values", "load_model", ["@hub"], fine, outcome=FINE))
    return found
