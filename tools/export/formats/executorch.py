"""ExecuTorch programs, with the parts that XNNPACK can run given to it."""

from pathlib import Path

import torch

from tools.export.formats.base import (
    DECOMPOSED,
    FLOAT32,
    INT8,
    Format,
    Job,
    Program,
    capture,
    graph_of,
    import_package,
    quiet,
)
from tools.export.source import ExportSource


def write_executorch(source: ExportSource, path: Path, job: Job) -> None:
    """Write a program with a method ``forward``, and one for each value of the metadata."""
    exir = import_package("executorch.exir")
    xnnpack = import_package("executorch.backends.xnnpack.partition.xnnpack_partitioner")
    with quiet():
        program = capture(source, job)
        if job.precision == INT8:
            images = source.random_images(job.batch)
            program = graph_of(_quantized(program, job), images, source.name, False)
        lowered = exir.to_edge_transform_and_lower(
            program.run_decompositions(DECOMPOSED),
            partitioner=[xnnpack.XnnpackPartitioner()],
            constant_methods=source.metadata,
        )
        path.write_bytes(lowered.to_executorch().buffer)


def _quantized(program: torch.export.ExportedProgram, job: Job) -> torch.nn.Module:
    """Return the graph with quantized layers: weights by output channel, activations by tensor."""
    pt2e = import_package("torchao.quantization.pt2e.quantize_pt2e")
    xnnpack = import_package("executorch.backends.xnnpack.quantizer.xnnpack_quantizer")
    config = xnnpack.get_symmetric_quantization_config(is_per_channel=True)
    quantizer = xnnpack.XNNPACKQuantizer().set_global(config)
    prepared = pt2e.prepare_pt2e(program.module(), quantizer)
    for images in job.calibration.batches(job.batch):
        prepared(images)
    return pt2e.convert_pt2e(prepared)


def load_executorch(path: Path, device: torch.device) -> Program:
    """Load a program in the runtime of the Python package, which has XNNPACK."""
    runtime = import_package("executorch.runtime").Runtime.get()
    method = runtime.load_program(path).load_method("forward")

    def run(images: torch.Tensor) -> torch.Tensor:
        return method.execute([images])[0].clone()

    return run


EXECUTORCH = Format(
    suffix=".pte",
    runtime="ExecuTorch (all cores)",
    packages=("executorch",),
    precisions=(FLOAT32, INT8),  # XNNPACK keeps weights of float16 in float32, and is slower
    write=write_executorch,
    load=load_executorch,
    quantizes=("torchao",),
    batch=1,
)
