"""Convert a checkpoint of any known layout to ours, to timm's, or to a detector's backbone.

``python -m tools.convert_checkpoint IN OUT --model NAME`` prints which keys are loaded, renamed,
resampled and dropped. OUT ends in ``.safetensors`` or ``.pth``.
"""

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch

import models
from tools import cli, files
from tools.networks import ModelSource, from_checkpoint
from training import checkpoints
from training.files import OutputError, write_atomically
from training.flags import Parser

SUFFIXES = (".safetensors", ".pth")
KEPT_FLAGS = ("eval_crop_ratio",)  # of a run's flags: how its images are preprocessed


def write(path: Path, content: Mapping[str, Any], layout: str) -> None:
    """Write weights and, except in timm's layout, their metadata to ``path``."""
    name = "model" if "model" in content else "state_dict"
    weights = {key: value.contiguous() for key, value in content[name].items()}
    if path.suffix == ".safetensors":
        texts = {} if layout == "timm" else {k: v for k, v in content.items() if k != name}
        metadata = {k: v if isinstance(v, str) else json.dumps(v) for k, v in texts.items()}
        data = safetensors.torch.save(weights, metadata={"format": "pt", **metadata})
        write_atomically(path, lambda file: file.write(data))
    else:
        checkpoints.save_checkpoint(weights if layout == "timm" else content, path)


def convert(args: argparse.Namespace) -> str:
    """Convert ``args.input`` to ``args.output``; return the report."""
    if args.output.suffix not in SUFFIXES:
        raise OutputError(f"{args.output} must end in {' or '.join(SUFFIXES)}")
    files.check_files({"output": args.output})
    source = from_checkpoint(args.input, args.model)
    to = convert_for_detection if args.to == "detection" else convert_classifier
    report, content = to(args, source)
    write(args.output, checkpoints.plain(content), args.to)
    return f"{report}\nwritten to {args.output}"


def convert_classifier(
    args: argparse.Namespace, source: ModelSource
) -> tuple[models.LoadReport, dict[str, Any]]:
    """Return the report and a checkpoint of the whole model."""
    checkpoint = source.checkpoint
    given = {"qk_scale_factor": args.qk_scale_factor, "img_size": args.input_size}
    given = {name: value for name, value in given.items() if value is not None}
    model, kwargs = source.build_with_kwargs(**given)
    report = source.load(model, "ema" if args.ema else "model")
    if hasattr(model, "qk_scale_factor"):
        kwargs["qk_scale_factor"] = model.qk_scale_factor
    content = {
        "model": model.state_dict(),
        "model_name": source.name,
        "model_kwargs": kwargs,
        "gelu": checkpoint.get("gelu", "none"),
    }
    if source.classes:
        content["classes"] = list(source.classes)
    if size := args.input_size or source.input_size:
        content["input_size"] = size
    if (flags := models.flags_of_run(checkpoint)) is not None:
        content["args"] = {key: flags.get(key) for key in KEPT_FLAGS}
    return report, content


def convert_for_detection(
    args: argparse.Namespace, source: ModelSource
) -> tuple[models.LoadReport, dict[str, Any]]:
    """Return the report and a checkpoint for ``load_from`` of a detector with this backbone.

    It lacks position embeddings, head and whatever else is not in :class:`models.VisionBackbone`.
    """
    exponent = args.qk_scale_factor
    kwargs = {} if exponent is None else {"qk_scale_factor": exponent}
    backbone = models.VisionBackbone(source.name, model_kwargs=kwargs)
    report = models.load_backbone(backbone, args.input, ema=args.ema)
    new = {key.rpartition(".")[0] for key in report.missing}
    weights = {
        f"backbone.{key}": value
        for key, value in backbone.state_dict().items()
        if key.rpartition(".")[0] not in new
    }
    exponent = getattr(backbone, "qk_scale_factor", None)
    return report, {
        "state_dict": weights,
        "model_name": source.name,
        "model_kwargs": {} if exponent is None else {"qk_scale_factor": exponent},
        "gelu": source.checkpoint.get("gelu", "none"),
    }


@cli.program
def main(argv: list[str]) -> None:
    """Run with the flags ``argv``."""
    parser = Parser("tools.convert_checkpoint", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("input", help="file or address of the checkpoint")
    add("output", type=Path, help="file to write, .safetensors or .pth")
    add("--model", help="model name, unless the checkpoint contains it")
    add("--to", choices=["ours", "timm", "detection"], default="ours", help="layout to write")
    add("--ema", action="store_true", help="convert the moving average")
    add("--input-size", type=int, help="resample to this size")
    add("--qk-scale-factor", type=float, help="exponent of the training")
    print(convert(parser.parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
