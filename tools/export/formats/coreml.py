"""Core ML packages: ML programs that take an image. They are converted here, and run on macOS."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from tools.export.formats.base import (
    DECOMPOSED,
    FLOAT16,
    FLOAT32,
    OUTPUT,
    Format,
    Job,
    graph_of,
    import_package,
    quiet,
)
from tools.export.source import ExportSource
from utils import UserError

INPUT = "image"
LABELLED = ["classLabel", "classLabel_probs"]  # Core ML's usual outputs of classifiers


class Classifier(nn.Module):
    """A model of pixels ``B H W C`` as one of images ``B C H W`` in 0..255.

    Args:
        model: Normalizes pixels itself.
        is_labelled: Return probabilities instead of logits.
    """

    def __init__(self, model: nn.Module, is_labelled: bool):
        super().__init__()
        self.model, self.is_labelled = model, is_labelled

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """``B C H W`` to logits or probabilities ``B num_classes``."""
        logits = self.model(image.permute(0, 2, 3, 1))
        return logits.softmax(1) if self.is_labelled else logits


def write_coreml(source: ExportSource, path: Path, job: Job) -> None:
    """Write an ML program of one image, with the metadata.

    With class names it is a classifier: it returns the likeliest name, and the probability of
    each.

    Raises:
        UserError: The batch is not 1, or class names are not unique.
    """
    if job.batch != 1:
        raise UserError(f"--batch-size {job.batch} must be 1: Core ML's images are single")
    if len(set(source.classes)) < len(source.classes):
        raise UserError(f"{source.name} has classes of equal names, which Core ML does not accept")
    coremltools = import_package("coremltools")
    model = Classifier(source.exported, bool(source.classes)).eval()
    sample = torch.full((1, len(source.images.mean), *source.size), 128.0)
    program = graph_of(model, sample, source.name, False).run_decompositions(DECOMPOSED)
    colours = coremltools.colorlayout
    layout = colours.GRAYSCALE if source.images.is_grey else colours.RGB
    labels = coremltools.ClassifierConfig(list(source.classes)) if source.classes else None
    precisions = {
        FLOAT16: coremltools.precision.FLOAT16,
        FLOAT32: coremltools.precision.FLOAT32,
    }
    with quiet():
        package = coremltools.convert(
            program,
            convert_to="mlprogram",
            inputs=[coremltools.ImageType(INPUT, sample.shape, color_layout=layout)],
            outputs=[coremltools.TensorType(OUTPUT)],
            classifier_config=labels,
            compute_precision=precisions[job.precision],
            minimum_deployment_target=coremltools.target.iOS15,
            skip_model_load=True,
        )
        package.user_defined_metadata.update(source.metadata)
        package.save(str(path))


def inspect_coreml(source: ExportSource, path: Path) -> str:
    """Read a package again, which cannot run here, and describe it.

    Raises:
        UserError: Its image, outputs, class names or metadata are not those of the model.
    """
    spec = import_package("coremltools").utils.load_spec(str(path))
    described = spec.description
    image = described.input[0].type.imageType
    colours = type(image).ColorSpace.Name(image.colorSpace)
    function = spec.mlProgram.functions["main"]
    operations = function.block_specializations[function.opset].operations
    found = {
        "image": (described.input[0].name, colours, (image.height, image.width)),
        "outputs": [output.name for output in described.output],
        "classes": _classes(operations[-1]),
        "metadata": {key: described.metadata.userDefined.get(key) for key in source.metadata},
    }
    expected = {
        "image": (INPUT, "GRAYSCALE" if source.images.is_grey else "RGB", source.size),
        "outputs": LABELLED if source.classes else [OUTPUT],
        "classes": list(source.classes),
        "metadata": source.metadata,
    }
    for key, value in expected.items():
        if found[key] != value:
            raise UserError(f"the package is wrong: {key} {found[key]}, not {value}")
    kinds = {operation.type for operation in operations} - {"const"}
    count = sum(operation.type != "const" for operation in operations)
    return (
        f"read again, but not run, which Core ML does on macOS alone: {INPUT} {colours}, outputs "
        f"{', '.join(found['outputs'])}, {count} operations: {', '.join(sorted(kinds))}"
    )


def _classes(operation: Any) -> list[str]:
    """Return the class names of a program's last operation, if it is that of a classifier."""
    if operation.type != "classify":
        return []
    names = operation.inputs["classes"].arguments[0].value.immediateValue.list.values
    return [name.immediateValue.tensor.strings.values[0] for name in names]


COREML = Format(
    suffix=".mlpackage",
    runtime="Core ML",
    packages=("coremltools",),
    precisions=(FLOAT16, FLOAT32),
    write=write_coreml,
    load=None,
    batch=1,
    takes_pixels=True,
    inspect=inspect_coreml,
)
