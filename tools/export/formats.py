"""Formats of programs: capturing a model, writing it, and loading what was written.

All formats come from one graph of ``torch.export``; its batch is dynamic unless a number is given.
"""

import importlib
import io
import json
import logging
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
from torch.export import Dim, ExportedProgram

from tools.export.source import ExportSource
from training.launch import DistInfo, select_device
from utils import UserError

OUTPUT, BATCH = "logits", "batch"
METADATA_FILE = "metadata.json"
# they log operators without a faster form, converted versions, and missing CUDA
NOISY = ("torch.onnx", "onnxscript", "torch._inductor", "torch.utils.cpp_extension")
Program = Callable[[torch.Tensor], torch.Tensor]


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporters' logs and warnings; errors are raised."""
    loggers = [logging.getLogger(name) for name in NOISY]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def import_package(name: str) -> ModuleType:
    """Import a package; what it leaves in the temporary folder is removed.

    onnxruntime writes an identifier of the machine's session to ``TMPDIR``.

    Raises:
        ImportError: It is not installed.
    """
    before = os.environ.get("TMPDIR")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TMPDIR"] = folder
        try:
            return importlib.import_module(name)
        finally:
            os.environ.pop("TMPDIR")
            if before is not None:
                os.environ["TMPDIR"] = before


@torch.no_grad()
def capture(source: ExportSource, batch: int | None) -> ExportedProgram:
    """Return the graph of the model, for any batch or for ``batch`` images.

    Raises:
        UserError: The model cannot be captured.
    """
    shapes = None if batch else ({0: Dim(BATCH, min=1)},)
    try:
        with _quiet():
            return torch.export.export(
                source.exported, (source.random_images(batch or 2),), dynamic_shapes=shapes
            )
    except Exception as error:  # torch.export raises errors of many kinds
        raise UserError(f"torch.export cannot capture {source.name}: {error}") from error


def write_onnx(
    program: ExportedProgram, path: Path, source: ExportSource, opset: int | None = None
) -> None:
    """Write an ONNX file with weights and metadata.

    Raises:
        UserError: The graph cannot be converted to this version of the operators.
    """
    with _quiet():
        onnx = torch.onnx.export(
            program,
            dynamo=True,
            verbose=False,
            input_names=[source.input_name],
            output_names=[OUTPUT],
            opset_version=opset,
            dynamic_shapes=({0: BATCH},) if program.range_constraints else None,
        )
        written = onnx.model.opset_imports[""]
        if opset not in (None, written):
            raise UserError(f"--opset {opset} is not possible: the program needs {written}")
        onnx.model.metadata_props.update(source.metadata)
        onnx.save(path, external_data=False)


def load_onnx(path: Path, device: torch.device) -> Program:
    """Load an ONNX file in onnxruntime, with PyTorch's number of threads."""
    onnxruntime = import_package("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    provider = "CUDAExecutionProvider" if device.type == "cuda" else "CPUExecutionProvider"
    session = onnxruntime.InferenceSession(path, options, providers=[provider])
    name = session.get_inputs()[0].name

    def run(images: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(session.run(None, {name: images.cpu().numpy()})[0])

    return run


def write_exported(
    program: ExportedProgram, path: Path, source: ExportSource, opset: None = None
) -> None:
    """Write a ``torch.export`` program, and the metadata as JSON."""
    extra, content = {METADATA_FILE: json.dumps(source.metadata)}, io.BytesIO()
    with _quiet():
        torch.export.save(program, content, extra_files=extra)
    # not to the path directly: PyTorch's writer aborts the process if the disk is full
    path.write_bytes(content.getbuffer())


def load_exported(path: Path, device: torch.device) -> Program:
    """Load a ``torch.export`` program."""
    return torch.export.load(path).module()


def write_aot(
    program: ExportedProgram, path: Path, source: ExportSource, opset: None = None
) -> None:
    """Compile a graph with AOTInductor for its device, with the metadata."""
    with _quiet():
        torch._inductor.aoti_compile_and_package(
            program,
            package_path=str(path),
            inductor_configs={"aot_inductor.metadata": source.metadata},
        )


def load_aot(path: Path, device: torch.device) -> Program:
    """Load an AOTInductor package."""
    return torch._inductor.aoti_load_package(str(path))


class Format(NamedTuple):
    """A format of programs, and what writes and runs it."""

    suffix: str
    runtime: str
    packages: tuple[str, ...]
    write: Callable[..., None]
    load: Callable[[Path, torch.device], Program]


FORMATS = {  # the first one of a suffix is its default
    "onnx": Format(".onnx", "onnxruntime", ("onnx", "onnxscript"), write_onnx, load_onnx),
    "exported": Format(".pt2", "torch.export", (), write_exported, load_exported),
    "aot": Format(".pt2", "AOTInductor", (), write_aot, load_aot),
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


def device_of(name: str | None, format_name: str) -> torch.device:
    """Return the device of a program: ``--device``, or CUDA if the runtime can use it, else CPU.

    Raises:
        UserError: The device does not exist, or the runtime cannot use it.
    """
    has_cuda = True
    if format_name == "onnx" and torch.cuda.is_available():
        try:
            onnxruntime = import_package("onnxruntime")
        except ImportError:
            has_cuda = False
        else:
            has_cuda = "CUDAExecutionProvider" in onnxruntime.get_available_providers()
    device = select_device(name or (None if has_cuda else "cpu"), DistInfo())
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {name} must be cpu or cuda")
    if device.type == "cuda" and not has_cuda:
        raise UserError(
            f"--device {name}: this onnxruntime has no CUDA (pip install onnxruntime-gpu); "
            f"use --device cpu"
        )
    return device


def check_requirements(format_name: str, check: bool) -> None:
    """Check that the packages and the compiler of a format are installed.

    Raises:
        UserError: One is missing; says what to install.
    """
    packages = FORMATS[format_name].packages
    if check and format_name == "onnx":
        packages = (*packages, "onnxruntime")
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


def write(
    format_name: str, path: Path, source: ExportSource, batch: int | None, opset: int | None
) -> None:
    """Capture a model and write it in a format; raise UserError if that fails."""
    program = capture(source, batch)
    try:
        FORMATS[format_name].write(program, path, source, opset)
    except (UserError, OSError):
        raise
    except Exception as error:  # exporters and compilers raise errors of many kinds
        cause: BaseException = error  # the first error, not the exporter's advice on reporting it
        while cause.__cause__ is not None:
            cause = cause.__cause__
        reason = (str(cause).strip() or type(cause).__name__).splitlines()[0]
        raise UserError(f"{source.name} cannot be written as {format_name}: {reason}") from error
