"""Formats of programs: what writes each of them, and what loads and runs it."""

import os
import shutil
from pathlib import Path

import torch

from tools.export.formats.base import (
    FLOAT16,
    FLOAT32,
    INT8,
    PRECISIONS,
    Format,
    Job,
    Program,
    import_package,
)
from tools.export.formats.coreml import COREML
from tools.export.formats.executorch import EXECUTORCH
from tools.export.formats.onnx import ONNX
from tools.export.formats.openvino import OPENVINO
from tools.export.formats.pytorch import AOT, EXPORTED
from tools.export.source import ExportSource
from training.launch import DistInfo, select_device
from utils import UserError

__all__ = ["FLOAT16", "FLOAT32", "FORMATS", "INT8", "PRECISIONS", "Format", "Job", "Program"]

FORMATS = {  # the first one of a suffix is its default
    "onnx": ONNX,
    "exported": EXPORTED,
    "aot": AOT,
    "coreml": COREML,
    "executorch": EXECUTORCH,
    "openvino": OPENVINO,
}


def format_of(path: Path, name: str | None) -> str:
    """Return the format of a file: ``name``, or the default of its suffix.

    Raises:
        UserError: The suffix is unknown, or is not that of the format.
    """
    found = [key for key, one in FORMATS.items() if one.suffix == path.suffix]
    if not found:
        suffixes = dict.fromkeys(one.suffix for one in FORMATS.values())
        raise UserError(f"{path} must end in {' or '.join(suffixes)}")
    if name not in (None, *found):
        raise UserError(f"--format {name} needs a {FORMATS[name].suffix} file, not {path}")
    return name or found[0]


def precision_of(name: str | None, format_name: str) -> str:
    """Return the precision of a program: ``--precision``, or the default of its format.

    Raises:
        UserError: The format does not have it; says which have.
    """
    offered = FORMATS[format_name].precisions
    if name not in (None, *offered):
        pairs = [f"{key} {', '.join(one.precisions)}" for key, one in FORMATS.items()]
        raise UserError(
            f"--precision {name} is not offered for {format_name}; these are: {'; '.join(pairs)}"
        )
    return name or offered[0]


def device_of(name: str | None, format_name: str) -> torch.device:
    """Return the device of a program: ``--device``, or CUDA if the runtime can use it, else CPU.

    Raises:
        UserError: The device does not exist, or the runtime cannot use it.
    """
    lacking = FORMATS[format_name].cuda() if torch.cuda.is_available() else ""
    device = select_device(name or ("cpu" if lacking else None), DistInfo())
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {name} must be cpu or cuda")
    if device.type == "cuda" and lacking:
        raise UserError(f"--device {name}: {lacking}; use --device cpu")
    return device


def check_requirements(format_name: str, precision: str, check: bool) -> None:
    """Check that the packages and the compiler of a format are installed.

    Raises:
        UserError: One is missing; says what to install.
    """
    target = FORMATS[format_name]
    packages = target.packages + (target.runs if check else ())
    packages += target.quantizes if precision == INT8 else ()
    packages = tuple(dict.fromkeys(packages))
    for package in packages:
        try:
            import_package(package)
        except ImportError as error:
            raise UserError(f"this needs {package}: pip install {' '.join(packages)}") from error
    compiler = os.environ.get("CXX") or "g++"
    if format_name == "aot" and shutil.which(compiler) is None:
        raise UserError(
            f"--format aot needs a C++ compiler, and {compiler} is not installed: install g++, "
            f"or set the environment variable CXX"
        )


def write(format_name: str, source: ExportSource, path: Path, job: Job) -> None:
    """Capture a model and write it in a format; raise UserError if that fails."""
    try:
        FORMATS[format_name].write(source, path, job)
    except (UserError, OSError):
        raise
    except Exception as error:  # exporters and compilers raise errors of many kinds
        cause: BaseException = error  # the first error, not the exporter's advice on reporting it
        while cause.__cause__ is not None:
            cause = cause.__cause__
        reason = (str(cause).strip() or type(cause).__name__).splitlines()[0]
        raise UserError(f"{source.name} cannot be written as {format_name}: {reason}") from error
