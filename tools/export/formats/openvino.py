"""OpenVINO's intermediate representation: ``.xml`` and ``.bin``."""

from pathlib import Path
from typing import Any

import torch

from tools.export.calibration import BATCH_SIZE, CalibrationSet
from tools.export.formats.base import (
    DECOMPOSED,
    FLOAT16,
    FLOAT32,
    INT8,
    OUTPUT,
    PRECISIONS,
    Format,
    Job,
    Program,
    capture,
    import_package,
    quiet,
)
from tools.export.source import ExportSource


def write_openvino(source: ExportSource, path: Path, job: Job) -> None:
    """Write the graph and its weights; the metadata is in ``rt_info``, as ``model_info``.

    In float16, weights are stored so; each device computes in the precision that suits it.
    """
    openvino = import_package("openvino")
    with quiet():
        program = capture(source, Job(FLOAT32, job.batch)).run_decompositions(DECOMPOSED)
        model = openvino.convert_model(program)
        # the converter leaves height and width open
        model.reshape([job.batch or -1, *source.random_images(1).shape[1:]])
        model.inputs[0].set_names({source.input_name})
        model.outputs[0].set_names({OUTPUT})
        if job.precision == INT8:
            model = _quantized(model, job.calibration, job.batch or BATCH_SIZE)
        for key, value in source.metadata.items():
            model.set_rt_info(value, ["model_info", key])
        openvino.save_model(model, path, compress_to_fp16=job.precision == FLOAT16)


def _quantized(model: Any, images: CalibrationSet, batch: int) -> Any:
    """Return a model whose layers multiply integers, with weights by output channel."""
    nncf = import_package("nncf")
    starts = range(0, len(images), batch)
    dataset = nncf.Dataset(starts, lambda start: images.batch(start, batch).numpy())
    return nncf.quantize(
        model,
        dataset,
        model_type=nncf.ModelType.TRANSFORMER,
        subset_size=len(starts),
        # the fast form of it moved logits of Visformer-Ti five times as far as no correction
        advanced_parameters=nncf.AdvancedQuantizationParameters(disable_bias_correction=True),
    )


def load_openvino(path: Path, device: torch.device) -> Program:
    """Load a program on the CPU, with PyTorch's number of threads."""
    openvino = import_package("openvino")
    options = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": "f32",  # its default is bfloat16 where the processor has it
    }
    model = openvino.Core().compile_model(path, "CPU", options)

    def run(images: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(model(images.numpy())[0].copy())

    return run


OPENVINO = Format(
    suffix=".xml",
    runtime="OpenVINO",
    packages=("openvino",),
    precisions=PRECISIONS,
    write=write_openvino,
    load=load_openvino,
    quantizes=("nncf",),
    also=".bin",
)
