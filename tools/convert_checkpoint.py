"""Write a checkpoint of any known layout as ours, as timm's, or as a detector's backbone.

``python -m tools.convert_checkpoint IN OUT --model NAME``; what was loaded, renamed, resampled and
dropped is printed. OUT ends in ``.safetensors`` or ``.pth``.
"""

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch

import models
from models.checkpoint.contents import num_classes_of, state_dict_of
from training import checkpoints, files

KEPT_FLAGS = ("eval_crop_ratio",)  # of a run's: how its images are prepared


def write(path: Path, content: Mapping[str, Any], layout: str) -> None:
    """Write weights, and with our layout what else is known of the model, to ``path``."""
    name = "model" if "model" in content else "state_dict"
    weights = {key: value.contiguous() for key, value in content[name].items()}
    if path.suffix == ".safetensors":
        texts = {} if layout == "timm" else {k: v for k, v in content.items() if k != name}
        metadata = {k: v if isinstance(v, str) else json.dumps(v) for k, v in texts.items()}
        data = safetensors.torch.save(weights, metadata={"format": "pt", **metadata})
        files.write_atomically(path, lambda file: file.write(data))
    else:
        checkpoints.save_checkpoint(weights if layout == "timm" else content, path)


def convert(args: argparse.Namespace) -> str:
    """Convert ``args.input`` into ``args.output``; returns the report."""
    checkpoint = models.read_checkpoint(args.input)
    name = args.model or checkpoint.get("model_name")
    if name is None:
        raise models.ModelError(f"{args.input} does not say which model it is: give --model NAME")
    if args.output.suffix not in (".safetensors", ".pth"):
        raise files.OutputError(f"{args.output} must end in .safetensors or .pth")
    to = convert_for_detection if args.to == "detection" else convert_classifier
    report, content = to(args, checkpoint, name)
    write(args.output, checkpoints.plain(content), args.to)
    return f"{report}\nwritten to {args.output}"


def convert_classifier(
    args: argparse.Namespace, checkpoint: Mapping[str, Any], name: str
) -> tuple[models.LoadReport, dict[str, Any]]:
    """The report, and a checkpoint of the whole model."""
    kwargs = dict(checkpoint.get("model_kwargs") or {})
    if "num_classes" not in kwargs:
        state, _ = state_dict_of(checkpoint, args.input, args.ema)
        kwargs["num_classes"] = num_classes_of(state, name)
    if args.qk_scale_factor is not None:
        kwargs["qk_scale_factor"] = args.qk_scale_factor
    if args.input_size is not None:
        kwargs["img_size"] = args.input_size
    model, kwargs = models.build_model(name, kwargs, {})
    report = models.load_weights(model, checkpoint, args.input, ema=args.ema)
    if hasattr(model, "qk_scale_factor"):
        kwargs["qk_scale_factor"] = model.qk_scale_factor
    content = {
        "model": model.state_dict(),
        "model_name": name,
        "model_kwargs": kwargs,
        "gelu": checkpoint.get("gelu", "none"),
    }
    if classes := models.class_names(checkpoint, args.input):
        content["classes"] = classes
    if size := args.input_size or checkpoint.get("input_size"):
        content["input_size"] = size
    if (flags := models.flags_of_run(checkpoint)) is not None:
        content["args"] = {key: flags.get(key) for key in KEPT_FLAGS}
    return report, content


def convert_for_detection(
    args: argparse.Namespace, checkpoint: Mapping[str, Any], name: str
) -> tuple[models.LoadReport, dict[str, Any]]:
    """The report, and what ``load_from`` of a detector with this backbone reads.

    Without position embeddings, head and what else :class:`models.VisionBackbone` has not.
    """
    kwargs = {}
    if args.qk_scale_factor is not None:
        kwargs["qk_scale_factor"] = args.qk_scale_factor
    backbone = models.VisionBackbone(name, model_kwargs=kwargs)
    report = models.load_backbone(backbone, args.input, ema=args.ema)
    new = {key.rpartition(".")[0] for key in report.missing}
    weights = {
        f"backbone.{key}": value
        for key, value in backbone.state_dict().items()
        if key.rpartition(".")[0] not in new
    }
    kwargs = {"qk_scale_factor": getattr(backbone, "qk_scale_factor", None)}
    return report, {
        "state_dict": weights,
        "model_name": name,
        "model_kwargs": {key: value for key, value in kwargs.items() if value is not None},
        "gelu": checkpoint.get("gelu", "none"),
    }


def main(argv: list[str]) -> int:
    """Convert with the flags ``argv``; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("input", help="file or address of the checkpoint")
    parser.add_argument("output", type=Path, help="file to write, .safetensors or .pth")
    parser.add_argument("--model", help="timm's name of the model, unless the checkpoint says it")
    parser.add_argument(
        "--to", choices=["ours", "timm", "detection"], default="ours", help="layout to write"
    )
    parser.add_argument("--ema", action="store_true", help="take the moving average")
    parser.add_argument("--input-size", type=int, help="resample to this size")
    parser.add_argument("--qk-scale-factor", type=float, help="exponent that it was trained with")
    try:
        print(convert(parser.parse_args(argv)))
    except (models.CheckpointError, models.ModelError, files.OutputError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
