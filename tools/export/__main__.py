"""Export a model for deployment: ``python -m tools.export --output FILE``.

The suffix of ``FILE`` chooses the format: ``.onnx`` is an ONNX model, ``.pt2`` a ``torch.export``
program, or with --format aot an AOTInductor package for this kind of machine, ``.mlpackage`` a
Core ML package, ``.pte`` an ExecuTorch program, ``.xml`` one of OpenVINO. The program is the model
after ``fuse()``. It takes ``image``, ``B 3 H W``, normalized, or with --with-preprocessing
``pixels``, ``B H W 3`` of uint8, both of one size, and returns ``logits``, ``B num_classes``.

Before the file gets its name, the program runs on random images and is compared with the model,
and with --calibration its accuracy is measured; a wrong one is not kept. Then its speed is
measured.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from tools import cli
from tools.export.calibration import CalibrationSet
from tools.export.check import compare, measure, speed
from tools.export.formats import (
    FLOAT32,
    FORMATS,
    INT8,
    PRECISIONS,
    Job,
    check_requirements,
    device_of,
    format_of,
    precision_of,
    write,
)
from tools.export.source import ExportSource, load_source
from tools.files import check_outputs, check_writable, folder_beside, move_into_place
from training.files import OutputError
from training.parser import Parser, add_input_size, positive
from utils import UserError

MAX_DROP = 1.0  # points


@cli.program
def main(argv: list[str]) -> int:
    """Run with the flags ``argv``; write ``--output`` once it is verified."""
    args = get_parser().parse_args(argv)
    path = args.output
    format_name = format_of(path, args.format)
    precision = precision_of(args.precision, format_name)
    target = FORMATS[format_name]
    check_flags(args, format_name, precision)
    check_requirements(format_name, precision, args.check)
    source = load_source(args, device_of(args.device, format_name), target.takes_pixels)
    for note in source.notes:
        print(note)
    images = None if args.calibration is None else CalibrationSet(args.calibration, source)
    job = Job(precision, args.batch_size or target.batch, args.opset, images)
    lines = []
    try:
        with folder_beside(path) as folder:
            written = target.files(folder / path.name)
            write(format_name, source, written[0], job)
            if target.inspect is not None:
                lines.append(target.inspect(source, written[0]))
            size = size_of(written)
            if args.check and target.load is not None:
                lines += check(args, format_name, source, written[0], job)
            move_into_place(written, path.parent)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from error
    shape = "x".join(map(str, source.size))
    what = f"{source.name}, {source.input_name} of {shape}, batch {job.batch or 'any'}"
    print("\n".join([f"written to {path}: {what}, {precision}, {size:.1f} MiB", *lines]))
    return 0


def check_flags(args: argparse.Namespace, format_name: str, precision: str) -> None:
    """Check flags that depend on the format, and that the files can be written.

    Raises:
        UserError: Flags contradict each other, or a file cannot be written.
    """
    target, path = FORMATS[format_name], args.output
    files = target.files(path)
    if not target.is_package(path):
        outputs = [("--output", file) for file in files]
        check_outputs(outputs, [args.checkpoint] if args.checkpoint else [])
    for file in files:
        check_writable("--output", file)
    if args.opset is not None and format_name != "onnx":
        raise UserError(f"--opset applies to ONNX, not to {path}")
    if precision == INT8 and args.calibration is None:
        raise UserError("--precision int8 needs --calibration FOLDER with images, such as val/")
    if args.calibration is not None and not (args.check and target.load is not None):
        why = "--no-check" if target.load is not None else f"{target.runtime} does not run here"
        raise UserError(f"--calibration {args.calibration} runs the program: {why}")
    if args.max_drop is not None and args.calibration is None:
        raise UserError(f"--max-drop {args.max_drop:g} has no effect without --calibration")
    if args.max_drop is not None and not 0 <= args.max_drop <= 100:
        raise UserError(f"--max-drop {args.max_drop:g} must be from 0 to 100 points")


def check(
    args: argparse.Namespace, format_name: str, source: ExportSource, written: Path, job: Job
) -> list[str]:
    """Run what was written; return lines about its agreement, accuracy, size and speed.

    Raises:
        UserError: It is wrong, or loses more accuracy than allowed.
    """
    target = FORMATS[format_name]
    program = target.load(written, source.device)
    lines = []
    if job.precision != INT8:
        agreement = compare(program, source, job.batch, job.precision)
        lines.append(f"{target.runtime} agrees with torch: {agreement}")
    if job.calibration is not None:
        quality = measure(program, source, job.calibration, job.batch)
        allowed = MAX_DROP if args.max_drop is None else args.max_drop
        if quality.drop > allowed:
            raise UserError(
                f"{job.precision} loses {quality.drop:.2f} points, with --max-drop {allowed:g}: "
                f"{quality}"
            )
        lines.append(f"{target.runtime} on {args.calibration}: {quality}")
    if args.benchmark:
        programs = {target.runtime: program}
        if job.precision != FLOAT32:
            wide = written.parent / FLOAT32 / written.name
            wide.parent.mkdir()
            write(format_name, source, wide, replace(job, precision=FLOAT32))
            lines.append(f"the same in float32: {size_of(target.files(wide)):.1f} MiB")
            programs[FLOAT32] = target.load(wide, source.device)
        lines.append(speed(programs, source, job.batch))
    return lines


def size_of(paths: Sequence[Path]) -> float:
    """Return the size of files and folders in MiB."""
    files = [file for path in paths for file in (path, *path.rglob("*")) if file.is_file()]
    return sum(file.stat().st_size for file in files) / 2**20


def get_parser() -> argparse.ArgumentParser:
    """Return the parser of the flags."""
    parser = Parser("tools.export", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--output", type=Path, required=True, help="file to write; its suffix is the format")
    add("--format", choices=list(FORMATS), help="of a .pt2 file: exported (default) or aot")
    add("--precision", choices=PRECISIONS, help="float32 (float16 for Core ML) if not given")
    where = "images for int8, and to measure accuracy: FOLDER/CLASS/IMAGE, or FOLDER/IMAGE"
    add("--calibration", type=Path, metavar="FOLDER", help=where)
    points = "points of accuracy, or of agreement without classes, that may be lost (1)"
    add("--max-drop", type=float, metavar="POINTS", help=points)
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
