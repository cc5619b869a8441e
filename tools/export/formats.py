"""Writing programs, and running what was written.

All come from one graph of ``torch.export``, whose batch is dynamic unless a number is given.
"""

import importlib
import io
import json
import logging
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.export import Dim, ExportedProgram

from tools.export.source import Source
from utils import UserError

SUFFIXES = {".onnx": ("onnx",), ".pt2": ("exported", "aot")}
PACKAGES = {"onnx": ("onnx", "onnxscript"), "exported": (), "aot": ()}
OUTPUT, BATCH = "logits", "batch"
METADATA_FILE = "metadata.json"
# what they log: operators that have no faster form, versions they convert, CUDA that is not here
NOISY = ("torch.onnx", "onnxscript", "torch._inductor", "torch.utils.cpp_extension")
Program = Callable[[torch.Tensor], torch.Tensor]


def format_of(path: Path, name: str | None) -> str:
    """The format of a file: ``name``, or the first of its suffix.

    Raises:
        UserError: The suffix is unknown, or does not go with the format.
    """
    if path.suffix not in SUFFIXES:
        raise UserError(f"{path} must end in {' or '.join(SUFFIXES)}")
    name = name or SUFFIXES[path.suffix][0]
    if name not in SUFFIXES[path.suffix]:
        right = next(suffix for suffix, names in SUFFIXES.items() if name in names)
        raise UserError(f"--format {name} is written to a {right} file, not to {path}")
    return name


def device_of(name: str | None, format_name: str) -> torch.device:
    """Where a program will run: the device named, or CUDA if it can run there, else the CPU.

    Raises:
        UserError: The device is none, does not exist here, or onnxruntime cannot use it.
    """
    has_cuda = torch.cuda.is_available()
    if format_name == "onnx" and has_cuda:
        try:
            import onnxruntime
        except ImportError:
            has_cuda = False
        else:
            has_cuda = "CUDAExecutionProvider" in onnxruntime.get_available_providers()
    try:
        device = torch.device(name or ("cuda" if has_cuda else "cpu"))
    except RuntimeError as error:
        raise UserError(f"--device {name!r} is not a device: cpu or cuda") from error
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {name}: programs are made for cpu or cuda")
    if device.type == "cuda" and not has_cuda:
        why = "PyTorch finds no CUDA device"
        if torch.cuda.is_available():
            why = "onnxruntime here has no CUDA (pip install onnxruntime-gpu)"
        raise UserError(f"--device {name}: {why}; use --device cpu")
    return device


def check_requirements(format_name: str, check: bool) -> None:
    """Raise UserError, which names what to install, if the format cannot be made here."""
    packages = PACKAGES[format_name]
    if check and format_name == "onnx":
        packages = (*packages, "onnxruntime")
    for package in packages:
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise UserError(f"this needs {package}: pip install {' '.join(packages)}") from error
    compiler = os.environ.get("CXX") or "g++"
    if format_name == "aot" and shutil.which(compiler) is None:
        raise UserError(
            f"--format aot needs a C++ compiler, and {compiler} is not here: install g++, or name "
            f"another in the environment variable CXX"
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what exporters tell their own authors; errors are raised all the same."""
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


@torch.no_grad()
def capture(source: Source, batch: int | None) -> ExportedProgram:
    """The graph of the net, for any batch, or for ``batch`` images.

    Raises:
        UserError: It cannot be captured.
    """
    shapes = None if batch else ({0: Dim(BATCH, min=1)},)
    try:
        with _quiet():
            return torch.export.export(
                source.net, (source.images(batch or 2),), dynamic_shapes=shapes
            )
    except Exception as error:  # torch.export raises errors of many kinds
        raise UserError(f"torch.export cannot capture {source.name}: {error}") from error


def write_onnx(
    program: ExportedProgram, path: Path, source: Source, opset: int | None = None
) -> None:
    """Write an ONNX file, weights and metadata within.

    Raises:
        UserError: It cannot have this version of the operators.
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
            raise UserError(f"no conversion to --opset {opset}: the program needs {written}")
        onnx.model.metadata_props.update(source.metadata)
        onnx.save(path, external_data=False)


def load_onnx(path: Path, device: torch.device) -> Program:
    """Run an ONNX file by onnxruntime, with as many threads as PyTorch has."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    provider = "CUDAExecutionProvider" if device.type == "cuda" else "CPUExecutionProvider"
    session = onnxruntime.InferenceSession(path, options, providers=[provider])
    taken = session.get_inputs()[0].name

    def run(images: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(session.run(None, {taken: images.cpu().numpy()})[0])

    return run


def write_exported(program: ExportedProgram, path: Path, source: Source) -> None:
    """Write a ``torch.export`` program, and the metadata as JSON.

    By way of memory: PyTorch's own writer ends the process where the disk is full.
    """
    extra, content = {METADATA_FILE: json.dumps(source.metadata)}, io.BytesIO()
    with _quiet():
        torch.export.save(program, content, extra_files=extra)
    path.write_bytes(content.getbuffer())


def load_exported(path: Path, device: torch.device) -> Program:
    """Run a ``torch.export`` program."""
    return torch.export.load(path).module()


def write_aot(program: ExportedProgram, path: Path, source: Source) -> None:
    """Compile a graph by AOTInductor for its device, with the metadata."""
    with _quiet():
        torch._inductor.aoti_compile_and_package(
            program,
            package_path=str(path),
            inductor_configs={"aot_inductor.metadata": source.metadata},
        )


def load_aot(path: Path, device: torch.device) -> Program:
    """Run an AOTInductor package."""
    return torch._inductor.aoti_load_package(str(path))


def write(format_name: str, path: Path, source: Source, batch: int | None, opset: int | None):
    """Write the program of a source in a format.

    Raises:
        UserError: It cannot be made.
    """
    program = capture(source, batch)
    try:
        if format_name == "onnx":
            write_onnx(program, path, source, opset)
        elif format_name == "exported":
            write_exported(program, path, source)
        else:
            write_aot(program, path, source)
    except (UserError, OSError):
        raise
    except Exception as error:  # exporters and compilers raise errors of many kinds
        cause: BaseException = error  # what exporters say last is where to look for help
        while cause.__cause__ is not None:
            cause = cause.__cause__
        reason = (str(cause).strip() or type(cause).__name__).splitlines()[0]
        raise UserError(f"{source.name} cannot be written as {format_name}: {reason}") from error


LOADERS = {"onnx": load_onnx, "exported": load_exported, "aot": load_aot}
