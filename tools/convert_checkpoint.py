"""Convert weights to the layout of this repository, timm, the Hub or a detector's backbone.

``python -m tools.convert_checkpoint IN OUT --model NAME`` prints which keys are loaded, renamed,
resampled and dropped. OUT ends in ``.safetensors`` or ``.pth``; with ``--to hub``, it is a folder.
"""

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import nn

import models
from models import DataConfig, ModelSource
from tools import cli, files
from tools.hub_folder import push_folder, write_folder
from training import checkpoints
from training.files import OutputError, write_atomically
from training.parser import PIXELS, Parser, add_input_size
from utils import UserError

SUFFIXES = (".safetensors", ".pth")


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
    if args.push and args.to != "hub":
        raise UserError(f"--push {args.push} needs --to hub")
    if args.to == "hub":
        return convert_to_folder(args)
    if args.output.suffix not in SUFFIXES:
        raise OutputError(f"{args.output} must end in {' or '.join(SUFFIXES)}")
    files.check_files({"output": args.output}, [args.input])
    source = find_source(args)
    to = convert_for_detection if args.to == "detection" else convert_classifier
    report, content = to(args, source)
    write(args.output, checkpoints.plain(content), args.to)
    return f"{report}\nwritten to {args.output}"


def find_source(args: argparse.Namespace) -> ModelSource:
    """Return the model of ``args.input``; of a model name, with its published weights."""
    source = models.find_model(args.input, args.model, pretrained=True)
    source.weights("ema" if args.ema else "model")
    return source


def load(
    args: argparse.Namespace, source: ModelSource
) -> tuple[nn.Module, dict[str, Any], models.LoadReport | str, DataConfig]:
    """Return the model with its weights, its arguments, a report and its preprocessing."""
    exponent = args.qk_scale_factor
    images = source.data_config
    if args.input_size is not None:
        images = images.at_size(args.input_size)
    given = {} if exponent is None else {"qk_scale_factor": exponent}
    model, kwargs = source.build_with_kwargs(images.size, given)
    report = source.load(model, "ema" if args.ema else "model") or source.label
    if hasattr(model, "qk_scale_factor"):
        kwargs["qk_scale_factor"] = model.qk_scale_factor
    source.describe(model, images)
    return model.eval(), kwargs, report, images


def convert_to_folder(args: argparse.Namespace) -> str:
    """Write a folder in the Hub's layout, and push it if wanted; return the report."""
    output = args.output
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise OutputError(f"{output} exists: give the name of a new folder")
    files.check_writable("output", output)
    source = find_source(args)
    model, kwargs, report, _ = load(args, source)
    try:
        with files.folder_beside(output) as place:
            folder = place / output.name
            folder.mkdir()
            note = write_folder(folder, model, source, kwargs, args.ema)
            folder.replace(output)
    except OSError as error:
        raise OutputError(f"cannot write {output}: {error.strerror or error}") from error
    lines = [str(report), f"written to {output}: {note}"]
    if args.push:
        lines.append(f"pushed to {push_folder(output, args.push)}")
    return "\n".join(lines)


def convert_classifier(
    args: argparse.Namespace, source: ModelSource
) -> tuple[models.LoadReport | str, dict[str, Any]]:
    """Return the report and a checkpoint of the whole model."""
    model, kwargs, report, images = load(args, source)
    content = {
        "model": model.state_dict(),
        "model_name": source.name,
        "model_kwargs": kwargs,
        "input_size": images.size,
        "data_config": images.record(),
        "gelu": source.checkpoint.get("gelu", "none"),
    }
    if source.classes:
        content["classes"] = list(source.classes)
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
    parser = Parser("python -m tools.convert_checkpoint", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("input", help=f"weights to read: {cli.SOURCES}")
    output = "file to write, .safetensors or .pth; with --to hub, a new folder"
    add("output", type=Path, help=output)
    add("--model", metavar="NAME", help="model name, if the file does not contain it")
    layouts = ["ours", "timm", "hub", "detection"]
    add("--to", choices=layouts, default="ours", help="layout to write")
    push = "with --to hub: upload the folder to this repository of the Hugging Face Hub"
    add("--push", metavar="ORG/NAME", help=push)
    ema = "convert the moving average instead of the weights"
    add("--ema", action="store_true", help=ema)
    size = f"resample the weights to this {PIXELS}; default: as they are"
    add_input_size(parser, help=size)
    exponent = "--qk-scale-factor of the training, if the file does not contain it"
    add("--qk-scale-factor", type=float, metavar="EXPONENT", help=exponent)
    print(convert(parser.parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
