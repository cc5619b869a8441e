"""Recipe files and args.yaml: commands, aliases, duplicates, wrong types and huge ones."""

import os
import random
from collections.abc import Callable
from pathlib import Path

from tests.attack.case import FINE, Case
from tests.attack.programs import DATA
from tests.attack.valid import World

BOMB = b"a: &a [x, x, x, x, x, x, x, x, x]\n" + b"".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n".encode()
    for old, new in zip("abcdefghi", "bcdefghij", strict=True)
)
MERGE = b"base: &x {lr: 1}\n<<: *x\n"
TEXTS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "x.yaml"),
    "list": (b"- lr\n- 3\n", "x.yaml"),
    "text": (b"\x1b[2J", "x.yaml"),
    "number": (b"7", "x.yaml"),
    "NUL": (bytes(99), "x.yaml"),
    "no UTF-8": (b"\xff\xfe\xfd", "x.yaml"),
    "tabs": (b"lr:\t1\n\tx: 2\n", "x.yaml"),
    "not closed": (b"lr: [1, 2", "x.yaml"),
    "two documents": (b"lr: 1\n---\nlr: 2\n", "x.yaml"),
    "deep": (b"lr: " + b"[" * 10**5, "x.yaml"),
    "deep maps": (b"{a: " * 5000, "x.yaml"),
    "bomb of aliases": (BOMB, "x.yaml"),
    "alias of its own": (b"lr: &a [*a]\n", "x.yaml"),
    "unknown alias": (b"lr: *b\n", "x.yaml"),
    "merge": (MERGE, "x.yaml"),
    "call": (b"lr: !!python/object/apply:os.system ['touch /tmp/attacked']\n", "x.yaml"),
    "name": (b"lr: !!python/name:os.system\n", "x.yaml"),
    "unknown tag": (b"lr: !x 3\n", "x.yaml"),
    "duplicate": (b"lr: 1\nlr: 2\n", "lr"),
    "two spellings": (b"batch-size: 1\nbatch_size: 2\n", "batch_size"),
    "unknown flag": (b"nonesuch: 1\n", "nonesuch"),
    "flag with ESC": (b'"\\e[2J": 1\n', "[2J"),
    "flag of two lines": (b'"a\\nerror: b": 1\n', "error: b"),
    "flag a list": (b"[a, b]: 1\n", "x.yaml"),
    "flag a map": (b"? {a: 1}\n: 1\n", "x.yaml"),
    "flag help": (b"help: true\n", "help"),
    "flag config": (b"config: x.yaml\n", "config"),
    "number as text": (b"lr: fast\n", "lr"),
    "number a list": (b"lr: [1, 2]\n", "lr"),
    "number a map": (b"lr: {a: 1}\n", "lr"),
    "number a flag": (b"lr: true\n", "lr"),
    "number a date": (b"epochs: 2020-01-01\n", "epochs"),
    "number huge": (b"epochs: 1" + b"0" * 5000 + b"\n", "x.yaml"),
    "number infinite": (b"lr: .inf\n", "lr"),
    "number nan": (b"lr: .nan\n", "lr"),
    "flag a number": (b"amp: 3\n", "amp"),
    "choice unknown": (b"mixup_mode: nonesuch\n", "mixup_mode"),
    "command": (b"data_path: 'pipe:touch /tmp/attacked'\n", "data_path"),
    "command after spaces": (b"val_path: '  pipe:touch /tmp/attacked'\n", "val_path"),
    "command in a list": (b"data_path: ['pipe:touch /tmp/attacked']\n", "data_path"),
    "value with ESC": (b'model: "\\e[2J"\n', "[2J"),
    "value of two lines": (b'model: "a\\nerror: b"\n', "error: b"),
    "value long": (b"model: " + b"v" * 10**6 + b"\n", "x.yaml"),
    "flag long": (b"v" * 1000 + b": 1\n", "vvvv"),
    "model_kwargs map": (b"model_kwargs: {depth: 2}\n", "model_kwargs"),
    "model_kwargs loader": (b"model_kwargs: [pretrained=True]\n", "pretrained"),
    "model_kwargs deep": (b"model_kwargs: ['depth=" + b"[" * 5000 + b"']\n", "depth"),
    "model_kwargs file": (b"model_kwargs: [checkpoint_path=/etc/passwd]\n", "checkpoint_path"),
    "out of range": (b"drop: 7\n", "7"),
    "negative": (b"epochs: -3\n", "-3"),
    "surrogate": (b'model: "\\ud800"\n', ("x.yaml", "ud800")),
}
KINDS: dict[str, Callable[[Path], object]] = {
    "missing": lambda path: None,
    "a folder": os.mkdir,
    "a loop": lambda path: path.symlink_to(path),
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "sparse": lambda path: (path.touch(), os.truncate(path, 1 << 40)),
}


def cases(rng: random.Random) -> list[Case]:
    """Return the cases of this class; none depends on chance."""
    found = []
    words = ["--config", "@x.yaml", "--eval", "--resume", "+mid.pth", *DATA]
    for name, (data, named) in TEXTS.items():
        if name.startswith("model_kwargs"):  # of the model's arguments, not of a checkpoint
            line = ["--config", "@x.yaml", "--model", "vit_b_32_224", *DATA, "--output_dir", "=run"]
        else:
            line = words
        make = lambda folder, world, data=data: (folder / "x.yaml").write_bytes(data)  # noqa: E731
        found.append(Case("recipes", name, "main", line, make, named))
    for name, write in KINDS.items():
        make = lambda folder, world, write=write: write(folder / "x.yaml")  # noqa: E731
        found.append(Case("recipes", name, "main", words, make, "x.yaml"))

    def unused(folder: Path, world: World) -> None:
        (folder / "x.yaml").write_bytes(b"finetune: null\nreprob: 0.1\n")

    found.append(Case("recipes", "empty values", "main", words, unused, outcome=FINE))
    return found
