"""Write a model as a program for deployment: ``python -m tools.export --output FILE``.

``FILE.onnx`` is an ONNX model, ``FILE.pt2`` a ``torch.export`` program, or with --format aot a
package that AOTInductor compiled for this kind of machine. The program is the inference net of
``model.fuse()``, and takes ``image``, ``B 3 H W``, normalised, or with --with-preprocessing
``pixels``, ``B H W 3`` of uint8; both of one size. It gives ``logits``, ``B num_classes``.

Before the file gets its name, it is run on random images and compared with the model; one that
differs is not kept. Then its speed is measured.
"""

import argparse
import os
import sys
from pathlib import Path

from tools.export.check import compare, speed
from tools.export.formats import LOADERS, check_requirements, device_of, format_of, write
from tools.export.source import load_source
from tools.files import check_outputs, check_writable, folder_beside
from training import launch
from training.files import OutputError
from training.flags import positive
from utils import UserError

RUNTIMES = {"onnx": "onnxruntime", "exported": "torch.export", "aot": "AOTInductor"}


def export(args: argparse.Namespace) -> None:
    """Write ``args.output``, whole and proved, or not at all.

    Raises:
        UserError, ModelError, CheckpointError: It cannot be made.
        OutputError: It cannot be written.
    """
    path = args.output
    format_name = format_of(path, args.format)
    check_outputs([("--output", path)], [args.checkpoint] if args.checkpoint else [])
    check_writable("--output", path)
    if args.opset is not None and format_name != "onnx":
        raise UserError(f"--opset is for ONNX, and {path} is not")
    check_requirements(format_name, args.check)
    source = load_source(args, device_of(args.device, format_name))
    for note in source.notes:
        print(note)
    runtime, program = RUNTIMES[format_name], None
    try:
        with folder_beside(path) as folder:
            written = folder / path.name
            write(format_name, written, source, args.batch_size, args.opset)
            if args.check:
                program = LOADERS[format_name](written, source.device)
                agreement = compare(program, source, args.batch_size)
            with written.open("rb") as file:
                os.fsync(file.fileno())
            written.replace(path)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from error
    shape = "x".join(map(str, source.size))
    batch = args.batch_size or "any"
    megabytes = path.stat().st_size / 2**20
    what = f"{source.name}, {source.input_name} of {shape}, batch {batch}, {megabytes:.1f} MiB"
    print(f"written to {path}: {what}")
    if args.check:
        print(f"{runtime} agrees with torch: {agreement}")
        if args.benchmark:
            print(speed(program, runtime, source, args.batch_size))


def get_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = argparse.ArgumentParser("tools.export", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--output", type=Path, required=True, help="file to write, .onnx or .pt2")
    add("--format", choices=list(RUNTIMES), help="what a .pt2 file is: exported (default) or aot")
    add("--model", help="timm's name of the model, unless the checkpoint says it")
    add("--checkpoint", help="file or address of the weights; random ones without")
    add("--weights", choices=["model", "ema"], default="model", help="raw, or moving average")
    add("--num-classes", type=positive, help="classes of a model without a checkpoint")
    add(
        "--input-size",
        type=positive,
        nargs="+",
        help="side, or height and width, in pixels; the checkpoint's if not given, or the model's",
    )
    add("--batch-size", type=positive, help="images that the program takes; any if not given")
    add("--with-preprocessing", action="store_true", help="take pixels, and normalise them inside")
    add("--no-fuse", dest="fuse", action="store_false", help="leave norms and branches as trained")
    add("--opset", type=positive, help="version of ONNX's operators; PyTorch's choice if not given")
    add("--device", help="where the program will run; cuda if present, else cpu")
    add("--no-check", dest="check", action="store_false", help="do not run what was written")
    add("--no-benchmark", dest="benchmark", action="store_false", help="do not measure its speed")
    return parser


def main(argv: list[str]) -> int:
    """Export with the flags ``argv``; returns the exit status."""
    parser = get_parser()
    args = parser.parse_args(argv)
    if args.input_size:
        if len(args.input_size) > 2:
            parser.error("--input-size takes one or two numbers")
        args.input_size = (args.input_size[0], args.input_size[-1])
    return launch.run_program(lambda: export(args))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
