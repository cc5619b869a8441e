"""Export a model for deployment: ``python -m tools.export --output FILE``.

``FILE.onnx`` is an ONNX model, ``FILE.pt2`` a ``torch.export`` program, or with --format aot an
AOTInductor package for this kind of machine. The program is the model after ``fuse()``. It takes
``image``, ``B 3 H W``, normalized, or with --with-preprocessing ``pixels``, ``B H W 3`` of uint8,
both of one size, and returns ``logits``, ``B num_classes``.

Before the file gets its name, the program runs on random images and is compared with the model; a
wrong one is not kept. Then its speed is measured.
"""

import argparse
import os
import sys
from pathlib import Path

from tools import cli
from tools.export.check import compare, speed
from tools.export.formats import FORMATS, check_requirements, device_of, format_of, write
from tools.export.source import load_source
from tools.files import check_outputs, check_writable, folder_beside
from training.files import OutputError
from training.parser import Parser, add_input_size, positive
from utils import UserError


@cli.program
def main(argv: list[str]) -> None:
    """Run with the flags ``argv``; write ``--output`` once it is verified."""
    args = get_parser().parse_args(argv)
    path = args.output
    format_name = format_of(path, args.format)
    check_outputs([("--output", path)], [args.checkpoint] if args.checkpoint else [])
    check_writable("--output", path)
    if args.opset is not None and format_name != "onnx":
        raise UserError(f"--opset applies to ONNX, not to {path}")
    check_requirements(format_name, args.check)
    source = load_source(args, device_of(args.device, format_name))
    for note in source.notes:
        print(note)
    target, program = FORMATS[format_name], None
    try:
        with folder_beside(path) as folder:
            written = folder / path.name
            write(format_name, written, source, args.batch_size, args.opset)
            if args.check:
                program = target.load(written, source.device)
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
        print(f"{target.runtime} agrees with torch: {agreement}")
        if args.benchmark:
            print(speed(program, target.runtime, source, args.batch_size))


def get_parser() -> argparse.ArgumentParser:
    """Return the parser of the flags."""
    parser = Parser("tools.export", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--output", type=Path, required=True, help="file to write, .onnx or .pt2")
    add("--format", choices=list(FORMATS), help="of a .pt2 file: exported (default) or aot")
    add("--model", help="model name, for checkpoints that do not contain it")
    add("--pretrained", action="store_true", help="the published weights of --model")
    where = "file, address, hf-hub:ORG/NAME, local-dir:FOLDER, or name of published weights"
    add("--checkpoint", help=f"{where}; random ones without")
    add("--weights", choices=["model", "ema"], default="model", help="raw weights, or the EMA")
    add("--num-classes", type=positive, help="number of classes of a model without a checkpoint")
    add_input_size(parser)
    add("--batch-size", type=positive, help="fixed batch size; any if not given")
    add("--with-preprocessing", action="store_true", help="take pixels and normalize them inside")
    add("--no-fuse", dest="fuse", action="store_false", help="keep norms and branches as trained")
    add("--opset", type=positive, help="ONNX operator set; PyTorch's choice if not given")
    add("--device", help="device of the program; cuda if available, else cpu")
    add("--no-check", dest="check", action="store_false", help="do not run the program")
    add("--no-benchmark", dest="benchmark", action="store_false", help="do not measure its speed")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
