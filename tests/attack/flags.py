"""Values of flags: odd names, long texts, and numbers out of range."""

import random

from tests.attack.case import FINE, Case
from tests.attack.metadata import BREAK, ESCAPE, RTL
from tests.attack.programs import DATA, FEW, TRAIN, VIT

LONG = "n" * 10**5
NAMES = {"two lines": BREAK, "ESC": ESCAPE, "right to left": RTL, "long": LONG, "empty": ""}
NAMES |= {
    "bytes": "a\udcff.pth",
    "NUL-like": "a%00\\0b",
    "dots": "..",
    "dash": "-",
    "quote": "'; touch x",
}
NUMBERS: dict[str, tuple[str, ...]] = {
    "batch-size": ("0", "-1", "x", "1e9", "9" * 5000, "nan"),
    "epochs": ("0", "-1", "1.5", ""),
    "lr": ("-1", "nan", "inf", "x"),
    "input-size": ("0", "-32", "x", "7"),
    "drop": ("-1", "2", "nan"),
    "drop-path": ("1.5", "x"),
    "mixup": ("-1", "inf"),
    "smoothing": ("7",),
    "num_workers": ("-1", "x"),
    "warmup-epochs": ("-1", "x"),
    "seed": ("-1", "x"),
    "accum-iter": ("0", "-1"),
    "sampling-ratio": ("0", "1.5", "nan"),
    "val-split": ("0", "1", "nan", "x"),
    "k-folds": ("1", "3", "x"),
    "fold": ("0", "-1", "x"),
    "labels": ("nonesuch", ESCAPE, ""),
    "clip-grad": ("-1", "nan"),
    "model-ema-decay": ("1.5", "-1"),
    "layer-decay": ("0", "2"),
    "eval-crop-ratio": ("0", "-1", "nan"),
    "opt": ("nonesuch", ESCAPE, ""),
    "sched": ("nonesuch", ESCAPE, ""),
    "aa": ("nonesuch", ESCAPE),
    "device": ("nonesuch", "meta", ESCAPE, "cuda:99", ""),
    "data-set": ("nonesuch", ESCAPE, ""),
    "compile": ("nonesuch", ESCAPE),
    "dist-timeout": ("0", "nan"),
    "cutmix-minmax": ("5", "nan"),
    "opt-betas": ("0.5", "x"),
    "nonesuch": (ESCAPE, BREAK),
}


def cases(rng: random.Random) -> list[Case]:
    """Return the cases of this class; none depends on chance."""
    found: list[Case] = []

    def add(name: str, program: str, *words: object, named: str = "", **options: object) -> None:
        found.append(Case("flags", name, program, words, named=named, **options))

    for flag, values in NUMBERS.items():
        for value in values:
            line = [*TRAIN, *VIT, f"--{flag}={value}"]
            add(f"--{flag} {value[:20]!r}", "main", *line, named=(flag, flag.replace("_", "-")))
    for what, name in NAMES.items():
        eval_flags = ["--eval", *DATA]
        if name:
            add(f"--resume {what}", "main", *eval_flags, "--resume", f"{name}x", named="x")
            add(f"--model {what}", "main", *TRAIN, f"--model={name}", named=("model", ".."))
        add(f"--data-path {what}", "main", "--data-path", f"{name}/x", *VIT, *FEW, named="x")
        add(f"--finetune {what}", "main", *TRAIN, f"--finetune={name}x", named="x")
        add(f"--config {what}", "main", f"--config={name}x", named="x")
        add(f"validate {what}", "validate", f"{name}x.pth", *DATA, named=("x.pth", "nn"))
        add(
            f"predict {what}",
            "predict",
            f"{name}x.png",
            "--checkpoint",
            "+mid.pth",
            named=("x.png", "IMAGE"),
        )
        add(f"visualize {what}", "visualize", "bias", f"{name}x.pth", "--output", "=x.png")
        add(f"convert {what}", "convert", "=x.pth", f"={name}/y.txt", named="")
        if what not in ("empty", "dots"):
            output = f"={name}/x.onnx"
            words = ["--checkpoint", "+mid.pth", "--output", output]
            add(f"export {what}", "export", *words, named="x")
    for what in ("two lines", "ESC", "right to left", "bytes", "quote"):
        words = ["+photo.jpg", "--checkpoint", "+mid.pth", "--device", "cpu"]
        csv = f"={NAMES[what]}.csv"
        add(f"--csv {what}", "predict", *words, "--csv", csv, outcome=FINE)
        line = ["--eval", "--resume", "+mid.pth", *DATA, "--output_dir", f"={NAMES[what]}"]
        add(f"--output_dir {what}", "main", *line, outcome=FINE)
    for words in (["pretrained=True"], ["depth"], ["=3"], ["depth=" + "[" * 5000], ["a\nb=1"]):
        line = [*TRAIN, "--model", "vit_b_32_224", "--model-kwargs", *words]
        add(f"--model-kwargs {words[0][:20]!r}", "main", *line, named=("model-kwargs", "depth"))
    return found
