"""Metadata of checkpoints: values of wrong types, sizes, depths and names."""

import random
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from tests.attack.case import FINE, REFUSED, Case
from tests.attack.programs import TRAIN, readers
from tests.attack.valid import World

ESCAPE, BREAK, RTL, SURROGATE = "\x1b[2J", "a\nerror: b", "\u202eabc", "a\udcffb"


def nested(depth: int) -> list:
    """Return a list within a list, so often."""
    value: list = []
    for _ in range(depth):
        value = [value]
    return value


def tensor(*shape: int) -> torch.Tensor:
    return torch.zeros(shape)


LARGE = 1 << 70
# changes of the content, and what the error must name, which every reader must refuse
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "model_name number": ({"model_name": 7}, "model_name"),
    "model_name list": ({"model_name": ["vit_b_32_224"]}, "model_name"),
    "model_name dict": ({"model_name": {}}, "model_name"),
    "model_name tensor": ({"model_name": tensor(2)}, "model_name"),
    "model_name none such": ({"model_name": "nonesuch_9"}, "nonesuch_9"),
    "model_name with ESC": ({"model_name": ESCAPE}, "[2J"),
    "model_name of two lines": ({"model_name": BREAK}, "error: b"),
    "model_name right to left": ({"model_name": RTL}, "abc"),
    "model_name long": ({"model_name": "v" * 10**6}, "vvvv"),
    "model_name address": ({"model_name": "hf-hub:timm/vit_tiny"}, "hf-hub:timm/vit_tiny"),
    "model_name folder": ({"model_name": "local-dir:/etc"}, "local-dir:/etc"),
    "model_name path": ({"model_name": "../../etc/passwd"}, "passwd"),
    "model_name with tag": ({"model_name": "vit_b_32_224.nonesuch"}, "nonesuch"),
    "model_kwargs list": ({"model_kwargs": [1]}, "model_kwargs"),
    "model_kwargs text": ({"model_kwargs": "depth=2"}, "model_kwargs"),
    "model_kwargs tensor": ({"model_kwargs": tensor(1)}, "model_kwargs"),
    "classes number": ({"classes": 2}, "classes"),
    "classes text": ({"classes": "catdog"}, "classes"),
    "classes dict": ({"classes": {"cat": 0, "dog": 1}}, "classes"),
    "classes numbers": ({"classes": [0, 1]}, "classes"),
    "classes too many": ({"classes": ["a"] * 10**5}, "100000"),
    "classes tensor": ({"classes": tensor(2)}, "classes"),
    "classes nested": ({"classes": nested(500)}, "classes"),
    "data_config list": ({"data_config": [3, 32, 32]}, "data_config"),
    "data_config text": ({"data_config": "32"}, "data_config"),
    "data_config tensor": ({"data_config": tensor(3)}, "data_config"),
    "gelu number": ({"gelu": 1}, "gelu"),
    "gelu unknown": ({"gelu": "exact"}, "gelu"),
    "gelu list": ({"gelu": ["tanh"]}, "gelu"),
    "gelu tensor": ({"gelu": tensor(1)}, "gelu"),
    "gelu with ESC": ({"gelu": ESCAPE}, "gelu"),
    "model list": ({"model": [1]}, "model"),
    "model empty": ({"model": {}}, "model"),
    "model text": ({"model": "weights", "model_ema": None}, "model"),
    "model scalar": ({"model": {"head.weight": tensor()}}, ""),
    "model of number keys": ({"model": {7: tensor(2)}}, "7"),
    "model of tuple keys": ({"model": {("a", 1): tensor(2)}}, "tuple"),
    "model of odd keys": ({"model": {ESCAPE: tensor(2), BREAK: tensor(1)}}, ""),
    "model expanded": ({"model": {"head.weight": tensor(1).expand(10**9)}}, "few"),
    "model complex": ({"model": {"head.weight": torch.zeros(2, 32, dtype=torch.complex64)}}, ""),
}
KWARGS: dict[str, tuple[dict[Any, Any], str]] = {
    "pretrained": ({"pretrained": True}, "pretrained"),
    "pretrained_cfg": ({"pretrained_cfg": {"url": "http://example.com/x.pth"}}, "pretrained_cfg"),
    "pretrained_cfg_overlay": ({"pretrained_cfg_overlay": {"file": "/etc/passwd"}}, "pretrained"),
    "pretrained_strict": ({"pretrained_strict": False}, "pretrained"),
    "checkpoint_path": ({"checkpoint_path": "/etc/passwd"}, "checkpoint_path"),
    "cache_dir": ({"cache_dir": "/tmp/attacked"}, "cache_dir"),
    "scriptable": ({"scriptable": True}, "scriptable"),
    "features_only": ({"features_only": True}, "features_only"),
    "unknown": ({"nonesuch": 1}, "nonesuch"),
    "number key": ({3: 1}, "3"),
    "tuple key": ({(1, 2): 1}, "tuple"),
    "key with ESC": ({ESCAPE: 1}, "[2J"),
    "key of two lines": ({BREAK: 1}, "error: b"),
    "tensor": ({"depth": tensor(1)}, "depth"),
    "dict": ({"depth": {"a": 1}}, "depth"),
    "nested": ({"depth": nested(900)}, "depth"),
    "long list": ({"depth": [1] * 10**5}, "depth"),
    "long text": ({"norm_layer": "x" * 10**6}, "norm_layer"),
    "depth text": ({"depth": "2"}, ""),
    "depth huge": ({"depth": 10**5}, ""),
    "depth beyond 64 bits": ({"depth": LARGE}, "depth"),
    "depth negative": ({"depth": -3}, ""),
    "depth none": ({"depth": [None]}, ""),
    "embed_dim 0": ({"embed_dim": 0}, ""),
    "embed_dim huge": ({"embed_dim": 10**5}, ""),
    "embed_dim nan": ({"embed_dim": float("nan")}, ""),
    "num_heads 0": ({"num_heads": 0}, ""),
    "num_heads 3": ({"num_heads": 3}, ""),
    "patch_size 0": ({"patch_size": 0}, ""),
    "patch_size negative": ({"patch_size": -32}, ""),
    "in_chans": ({"in_chans": 5}, ""),
    "num_classes text": ({"num_classes": "2"}, "num_classes"),
    "num_classes bool": ({"num_classes": True}, "num_classes"),
    "num_classes huge": ({"num_classes": LARGE}, "num_classes"),
    "num_classes negative": ({"num_classes": -1}, "num_classes"),
    "qk_scale_factor text": ({"qk_scale_factor": "x"}, "qk_scale_factor"),
    "qk_scale_factor nan": ({"qk_scale_factor": float("nan")}, "qk_scale_factor"),
    "qk_scale_factor huge": ({"qk_scale_factor": 1e300}, "qk_scale_factor"),
    "act_layer": ({"act_layer": "os.system"}, ""),
}
IMAGES: dict[str, Any] = {
    "input_size": [0, -1, 10**9, "32", 32.0, (3, 2, 1, 0), tensor(2), {}, True],
    "mean": [0.5, [0.5], [0.5] * 4, ["a"] * 3, [float("nan")] * 3, tensor(3), 10**400],
    "std": [[0.0] * 3, [-1.0] * 3, [float("inf")] * 3, "0.5"],
    "crop_pct": [0, -1.0, 1e300, float("nan"), "1", [1.0], None, tensor(1), 10**400],
    "interpolation": ["nonesuch", 3, ESCAPE, ["bicubic"], "random"],
    "crop_mode": ["nonesuch", 3, ["center"]],
}
# values that no reader needs, so all go on without
IGNORED: dict[str, dict[str, Any]] = {
    "args number": {"args": 7},
    "args list": {"args": nested(500)},
    "args of odd names": {"args": {ESCAPE: BREAK, 7: SURROGATE}},
    "args Namespace": {"args": Namespace(**{RTL: ESCAPE, "lr": "x"})},
    "unknown keys": {"nonesuch": nested(900), ESCAPE: BREAK, "state": b"\0"},
    "args deep": {"args": {"lr_noise": nested(900), "epochs": {"a": ESCAPE}}},
    "classes with ESC": {"classes": [ESCAPE, "dog"]},
    "classes of two lines": {"classes": [BREAK, RTL]},
}


def saver(changes: dict[str, Any]) -> Callable[[Path, World], None]:
    """Return a function that writes the valid checkpoint with these changes."""
    return lambda folder, world: save(world.changed(**changes), folder)


def save(content: Any, folder: Path) -> None:
    """Write a checkpoint, however deep."""
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(10**5)
    torch.save(content, folder / "x.pth")
    sys.setrecursionlimit(before)


def of_kwargs(changes: dict[Any, Any]) -> Callable[[Path, World], None]:
    def make(folder: Path, world: World) -> None:
        kwargs = world.content["model_kwargs"] | changes
        save(world.changed(model_kwargs=kwargs), folder)

    return make


def of_images(changes: dict[str, Any]) -> Callable[[Path, World], None]:
    def make(folder: Path, world: World) -> None:
        config = world.content["data_config"] | changes
        torch.save(world.changed(data_config=config), folder / "x.pth")

    return make


def of_timm(changes: dict[str, Any]) -> Callable[[Path, World], None]:
    """Return a function that writes a checkpoint of timm's training script."""

    def make(folder: Path, world: World) -> None:
        content = {"arch": "vit_b_32_224", "state_dict": world.content["model"], "epoch": 1}
        torch.save(content | changes, folder / "x.pth")

    return make


def through_programs(
    rng: random.Random, makes: list[tuple[str, Any, str]], outcome: str = REFUSED
) -> Iterator[Case]:
    """Yield each input for the library, and for one program; other seeds choose others."""
    start = rng.randrange(10**6)
    for i, (name, make, named) in enumerate(makes):
        programs = [*readers("@x.pth"), ("load_model", ["@x.pth"])]
        program, words = programs[(start + i) % (len(programs) - 1)]
        for reader, line in ((program, words), programs[-1]):
            named = (named, "x.pth") if reader == "torch.hub" else named  # which knows the model
            yield Case("metadata", name, reader, line, make, named, outcome)


def cases(rng: random.Random) -> Iterator[Case] | list[Case]:
    """Return the cases of this class."""
    makes = [(name, saver(changes), named) for name, (changes, named) in WRONG.items()]
    makes += [
        (f"model_kwargs {name}", of_kwargs(changes), named)
        for name, (changes, named) in KWARGS.items()
    ]
    for key, values in IMAGES.items():
        makes += [
            (f"data_config {key} {i}", of_images({key: value}), key)
            for i, value in enumerate(values)
        ]
        arguments = {key: values[0]} if key != "input_size" else {"img_size": values[2]}
        makes.append((f"arch, args {key}", of_timm({"args": arguments}), "x.pth"))
    for name, value in (("number", 7), ("list", [1]), ("none such", "nonesuch_9"), ("ESC", ESCAPE)):
        makes.append((f"arch {name}", of_timm({"arch": value}), "x.pth"))
    found = list(through_programs(rng, makes))
    fine = [(name, saver(changes), "") for name, changes in IGNORED.items()]
    return found + list(through_programs(rng, fine, FINE)) + resumed()


STEP = "step"
# state of the training, which --resume must refuse
STATES: dict[str, tuple[dict[str, Any], str]] = {
    "epoch text": ({"epoch": "0"}, "epoch"),
    "epoch negative": ({"epoch": -5}, "epoch"),
    "epoch huge": ({"epoch": LARGE}, "epoch"),
    "epoch none": ({"epoch": None}, "epoch"),
    "epoch fraction": ({"epoch": 0.5}, "epoch"),
    "epoch nan": ({"epoch": float("nan")}, "epoch"),
    "epoch list": ({"epoch": [1]}, "epoch"),
    "epoch tensor": ({"epoch": tensor(2)}, "epoch"),
    "step text": ({"step": "3"}, "step"),
    "step list": ({"step": [3]}, "step"),
    "step negative": ({"step": -1}, "step"),
    "args of tensors": ({"args": {"lr": tensor(2), "epochs": [tensor(3)]}}, "args"),
    "sampler list": ({"sampler": [1]}, "sampler"),
    "sampler empty": ({"sampler": {}}, "sampler"),
    "sampler text": ({"sampler": {"epoch": "a", "dealt": "b"}}, "sampler"),
    "ranks number": ({"ranks": 3}, "ranks"),
    "ranks empty": ({"ranks": []}, "ranks"),
    "ranks of numbers": ({"ranks": [1]}, "ranks"),
    "ranks without meter": ({"ranks": [{}]}, "ranks"),
    "ranks of many": ({"ranks": [{}] * 10**5}, "ranks"),
    "optimizer number": ({"optimizer": 3}, "optimizer"),
    "optimizer list": ({"optimizer": [1]}, "optimizer"),
    "optimizer empty": ({"optimizer": {}}, "optimizer"),
    "optimizer of text": ({"optimizer": {"state": "a", "param_groups": "b"}}, "optimizer"),
    "optimizer state list": ({"optimizer": {"state": [], "param_groups": []}}, "optimizer"),
    "scaler number": ({"scaler": 3}, "scaler"),
    "scaler list": ({"scaler": [1]}, "scaler"),
    "lr_scheduler number": ({"lr_scheduler": 3}, "lr_scheduler"),
    "lr_scheduler list": ({"lr_scheduler": [1]}, "lr_scheduler"),
    "best_acc1 text": ({"best_acc1": "high"}, "best_acc1"),
    "best_acc1 list": ({"best_acc1": [1.0]}, "best_acc1"),
    "best number": ({"best": 3}, "best"),
    "best of numbers": ({"best": [1, 2]}, "best"),
    "best of texts": ({"best": [("a", "b")]}, "best"),
    "model_ema number": ({"model_ema": 3}, "model_ema"),
    "model_ema of other shapes": ({"model_ema": {"head.weight": tensor(7, 7)}}, "head.weight"),
}


def of_state(path: tuple[Any, ...], value: Any) -> Callable[[Path, World], None]:
    """Return a function that writes the valid checkpoint with another value at a path of keys."""

    def make(folder: Path, world: World) -> None:
        content = world.changed()
        owner = content
        for key in path[:-1]:
            owner = owner[key]
        owner[path[-1]] = value
        torch.save(content, folder / "x.pth")

    return make


RANDOM, METER = ("ranks", 0, "random"), ("ranks", 0, "meter")
DEEP: tuple[tuple[tuple[Any, ...], Any], ...] = (
    ((*RANDOM, "python"), 3),
    ((*RANDOM, "python"), (3, [LARGE] * 625, None)),
    ((*RANDOM, "numpy"), ()),
    ((*RANDOM, "numpy"), ("MT19937", tensor(3), 0, 0, 0.0)),
    ((*RANDOM, "torch"), tensor(3)),
    ((*RANDOM, "torch"), "seed"),
    (RANDOM, [1]),
    ((*METER, "steps"), "many"),
    ((*METER, "total"), [1]),
    ((*METER, "corrupt"), 3),
    (METER, {}),
    (("sampler", "dealt"), -5),
    (("sampler", "dealt"), LARGE),
    (("sampler", "batch_size"), 0),
    (("sampler", "num_replicas"), 0),
    (("sampler", "window"), "a"),
    (("optimizer", "param_groups", 0, "params"), 3),
    (("optimizer", "param_groups", 0, "params"), [0] * 10**5),
    (("optimizer", "param_groups", 0), 3),
    (("optimizer", "state", 0, "exp_avg"), tensor(7, 7)),
    (("optimizer", "state", 0, "exp_avg"), "text"),
    (("optimizer", "state", 0), 3),
)


def resumed() -> list[Case]:
    """Return the cases of the training's state, through ``--resume``."""
    flags = ["--resume", "@x.pth", *TRAIN, "--model-ema"]
    found = [
        Case("metadata", name, "main", flags, saver(changes), named or "x.pth")
        for name, (changes, named) in STATES.items()
    ]
    for i, (path, value) in enumerate(DEEP):
        name = f"{'.'.join(map(str, path))} {i}"
        found.append(Case("metadata", name, "main", flags, of_state(path, value), path[0]))
    return found
