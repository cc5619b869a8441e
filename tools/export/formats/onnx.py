"""ONNX files: PyTorch's exporter, and onnxruntime's quantizer."""

import contextlib
import tempfile
from pathlib import Path

import torch

from tools.export.formats.base import (
    BATCH,
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
from utils import UserError


def write_onnx(source: ExportSource, path: Path, job: Job) -> None:
    """Write an ONNX file with weights and metadata.

    Raises:
        UserError: The graph cannot be converted to this version of the operators.
    """
    program = capture(source, job)
    with quiet():
        onnx = torch.onnx.export(
            program,
            dynamo=True,
            verbose=False,
            input_names=[source.input_name],
            output_names=[OUTPUT],
            opset_version=job.opset,
            dynamic_shapes=({0: BATCH},) if program.range_constraints else None,
        )
        written = onnx.model.opset_imports[""]
        if job.opset not in (None, written):
            raise UserError(f"--opset {job.opset} is not possible: the program needs {written}")
        onnx.model.metadata_props.update(source.metadata)
        onnx.save(path, external_data=False)
        if job.precision == INT8:
            _quantize(source, path, job)


def _quantize(source: ExportSource, path: Path, job: Job) -> None:
    """Replace a file by one whose layers with weights multiply integers (QDQ).

    Weights have a scale for every output channel, activations one for a tensor.
    """
    tools = import_package("onnxruntime.quantization")
    onnx = import_package("onnx")
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        prepared = Path(folder, path.name)
        import_package("onnxruntime.quantization.shape_inference").quant_pre_process(path, prepared)
        tools.quantize_static(
            prepared,
            path,
            _Reader(source, job),
            quant_format=tools.QuantFormat.QDQ,
            op_types_to_quantize=["Conv", "Gemm", "MatMul"],
            per_channel=True,
            # not signed: onnxruntime's kernels for x86 multiply unsigned by signed integers
            activation_type=tools.QuantType.QUInt8,
            weight_type=tools.QuantType.QInt8,
            # products of queries, keys and values stay as they are
            extra_options={"MatMulConstBOnly": True},
        )
        model = onnx.load(path)
        onnx.helper.set_model_props(model, source.metadata)
        onnx.save(model, path)


class _Reader:
    """Batches of calibration images, as onnxruntime's quantizer asks for them."""

    def __init__(self, source: ExportSource, job: Job):
        batches = job.calibration.batches(job.batch)
        self._inputs = ({source.input_name: images.numpy()} for images in batches)

    def get_next(self) -> dict | None:
        return next(self._inputs, None)


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


def _cuda() -> str:
    with contextlib.suppress(ImportError):
        if "CUDAExecutionProvider" in import_package("onnxruntime").get_available_providers():
            return ""
    return "this onnxruntime has no CUDA (pip install onnxruntime-gpu)"


ONNX = Format(
    suffix=".onnx",
    runtime="onnxruntime",
    packages=("onnx", "onnxscript"),
    precisions=PRECISIONS,
    write=write_onnx,
    load=load_onnx,
    runs=("onnxruntime",),
    quantizes=("onnxruntime",),
    cuda=_cuda,
)
