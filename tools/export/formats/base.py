"""What all formats share: capturing a model, and importing the packages that convert and run it.

All formats come from one graph of ``torch.export``.
"""

import contextlib
import importlib
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
from torch.export import Dim, ExportedProgram

from tools.export.calibration import CalibrationSet
from tools.export.source import ExportSource, in_half
from utils import UserError

OUTPUT, BATCH = "logits", "batch"
FLOAT32, FLOAT16, INT8 = PRECISIONS = ("float32", "float16", "int8")
Program = Callable[[torch.Tensor], torch.Tensor]
ATEN = torch.ops.aten
# as sums and products: Core ML and OpenVINO do not know these operators, or not all their layouts
DECOMPOSED = {
    ATEN.addcmul.default: lambda x, one, other, value=1: x + value * one * other,
    ATEN.lerp.Tensor: lambda start, end, weight: start + weight * (end - start),
    ATEN.alias.default: lambda x: x.view(x.shape),
}


@dataclass(frozen=True)
class Job:
    """What to write.

    Attributes:
        precision: One of ``PRECISIONS``.
        batch: Number of images; None for any.
        opset: Version of ONNX's operators; None for PyTorch's choice.
        calibration: Images of which int8 takes the ranges of activations.
    """

    precision: str = FLOAT32
    batch: int | None = None
    opset: int | None = None
    calibration: CalibrationSet | None = None


class Format(NamedTuple):
    """A format of programs, and what writes and runs it.

    Attributes:
        suffix: Of the file's name; of two files, of the second.
        runtime: What runs it, as messages call it.
        packages: What writing needs, by their names for import and pip.
        precisions: What can be written; the first is the default.
        write: Writes a model to a path.
        load: Loads what was written; None if it cannot run here.
        runs, quantizes: Packages that running needs, and int8.
        cuda: Says why there is no CUDA; empty if there is.
        batch: Number of images if none is given; None for any.
        takes_pixels: Programs always normalize images themselves.
        also: Suffix of a second file; empty for none.
        inspect: Checks what cannot run here, and describes it.
    """

    suffix: str
    runtime: str
    packages: tuple[str, ...]
    precisions: tuple[str, ...]
    write: Callable[[ExportSource, Path, Job], None]
    load: Callable[[Path, torch.device], Program] | None
    runs: tuple[str, ...] = ()
    quantizes: tuple[str, ...] = ()
    cuda: Callable[[], str] = lambda: "it runs on the CPU"
    batch: int | None = None
    takes_pixels: bool = False
    also: str = ""
    inspect: Callable[[ExportSource, Path], str] | None = None

    def is_package(self, path: Path) -> bool:
        """Return True if a folder is there that was written in this format."""
        return self.inspect is not None and (path / "Manifest.json").is_file()

    def files(self, path: Path) -> list[Path]:
        """Return the paths of what is written, ``path`` first."""
        return [path, *([path.with_suffix(self.also)] if self.also else [])]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the converters' logs, warnings and progress; errors are raised."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with open(os.devnull, "w") as nothing, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with contextlib.redirect_stdout(nothing), contextlib.redirect_stderr(nothing):
                yield
    finally:
        logging.disable(before)


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
            with quiet():
                return importlib.import_module(name)
        finally:
            os.environ.pop("TMPDIR")
            if before is not None:
                os.environ["TMPDIR"] = before


@torch.no_grad()
def capture(source: ExportSource, job: Job) -> ExportedProgram:
    """Return the graph of the model, for any batch or for that of the job.

    Raises:
        UserError: The model cannot be captured.
    """
    model = in_half(source.exported) if job.precision == FLOAT16 else source.exported
    return graph_of(model, source.random_images(job.batch or 2), source.name, not job.batch)


@torch.no_grad()
def graph_of(
    model: torch.nn.Module, images: torch.Tensor, name: str, any_batch: bool
) -> ExportedProgram:
    """Return the graph of a model called ``name``; see :func:`capture`."""
    shapes = ({0: Dim(BATCH, min=1)},) if any_batch else None
    try:
        with quiet():
            return torch.export.export(model, (images,), dynamic_shapes=shapes)
    except Exception as error:  # torch.export raises errors of many kinds
        raise UserError(f"torch.export cannot capture {name}: {error}") from error
