"""``torch.export`` programs and AOTInductor packages."""

import io
import json
from pathlib import Path

import torch

from tools.export.formats.base import FLOAT16, FLOAT32, Format, Job, Program, capture, quiet
from tools.export.source import ExportSource

METADATA_FILE = "metadata.json"


def write_exported(source: ExportSource, path: Path, job: Job) -> None:
    """Write a ``torch.export`` program, and the metadata as JSON."""
    program = capture(source, job)
    extra, content = {METADATA_FILE: json.dumps(source.metadata)}, io.BytesIO()
    with quiet():
        torch.export.save(program, content, extra_files=extra)
    # not to the path directly: PyTorch's writer aborts the process if the disk is full
    path.write_bytes(content.getbuffer())


def load_exported(path: Path, device: torch.device) -> Program:
    """Load a ``torch.export`` program."""
    return torch.export.load(path).module()


def write_aot(source: ExportSource, path: Path, job: Job) -> None:
    """Compile a graph with AOTInductor for its device, with the metadata."""
    program = capture(source, job)
    with quiet():
        torch._inductor.aoti_compile_and_package(
            program,
            package_path=str(path),
            inductor_configs={"aot_inductor.metadata": source.metadata},
        )


def load_aot(path: Path, device: torch.device) -> Program:
    """Load an AOTInductor package."""
    return torch._inductor.aoti_load_package(str(path))


COMMON = {"suffix": ".pt2", "packages": (), "precisions": (FLOAT32, FLOAT16), "cuda": lambda: ""}
EXPORTED = Format(runtime="torch.export", write=write_exported, load=load_exported, **COMMON)
AOT = Format(runtime="AOTInductor", write=write_aot, load=load_aot, **COMMON)
