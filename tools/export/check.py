"""Comparison of a program with its model, its accuracy, and its speed."""

import copy
import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from tools.benchmark.measure import alternate, ratio
from tools.export.calibration import CalibrationSet
from tools.export.formats import FLOAT16, FLOAT32, Program
from tools.export.source import ExportSource, in_half
from utils import UserError

TOLERANCE = {FLOAT32: 1e-4, FLOAT16: 2e-2}  # of the largest logit
ROUNDING = 4.0  # multiples of what the precision itself is off by
ROUNDS, MIN_TIME = 5, 0.2


@dataclass(frozen=True)
class Agreement:
    """Difference of a program from the model, relative to the largest logit.

    Attributes:
        difference: Largest difference from the model in float32.
        rounding: Largest difference of the model in the program's precision from a wider one, if
            the tolerance had to be that of rounding, which random weights amplify; else None.
        batches: Batch sizes that were compared.
        precision: Of the program.
    """

    difference: float
    rounding: float | None
    batches: tuple[int, ...]
    precision: str = FLOAT32

    def __str__(self) -> str:
        batches = " and ".join(map(str, self.batches))
        text = f"at batch {batches} within {self.difference:.1e} of the largest logit"
        if self.rounding is not None:
            text += f"; {self.precision} itself is within {self.rounding:.1e} of "
            text += WIDER[self.precision]
        return text


WIDER = {FLOAT32: "float64", FLOAT16: "float32"}


def _relative(one: torch.Tensor, other: torch.Tensor) -> float:
    difference = (one.double().cpu() - other.double().cpu()).abs().max()
    off = (difference / other.abs().max().cpu()).item()
    return math.inf if math.isnan(off) else off


@torch.no_grad()
def compare(
    program: Program, source: ExportSource, batch: int | None, precision: str = FLOAT32
) -> Agreement:
    """Compare a program with its model on random images, at batch 1 and 3 or at ``batch``.

    Args:
        program: The program.
        source: Its model.
        batch: Its number of images; None for any.
        precision: Its precision, float32 or float16.

    Raises:
        UserError: The difference is larger than the tolerance and than rounding explains.
    """
    batches = (batch,) if batch else (1, 3)
    difference = rounding = 0.0
    for number in batches:
        images = source.random_images(number, seed=number)
        expected, found = source.eager(images), program(images)
        if found.shape != expected.shape:
            raise UserError(
                f"the program's output is {tuple(found.shape)}, not {tuple(expected.shape)}"
            )
        difference = max(difference, _relative(found, expected))
    tolerance = TOLERANCE[precision]
    if difference <= tolerance:
        return Agreement(difference, None, batches, precision)
    narrow, wide = source.eager, source.eager
    if precision == FLOAT16:
        narrow = in_half(narrow)
    else:
        wide = copy.deepcopy(wide).cpu().double()
    for number in batches:
        images = source.random_images(number, seed=number)
        exact = images
        if precision == FLOAT32:
            exact = images.cpu() if source.preprocessing else images.cpu().double()
        rounding = max(rounding, _relative(narrow(images), wide(exact)))
    if difference <= ROUNDING * rounding:
        return Agreement(difference, rounding, batches, precision)
    raise UserError(
        f"the program is wrong: {difference:.1e} of the largest logit off, with {tolerance:.0e} "
        f"allowed; {precision} itself is within {rounding:.1e} of {WIDER[precision]}"
    )


@dataclass(frozen=True)
class Quality:
    """A program on calibration images, next to the model in float32.

    Attributes:
        images: Number of images, and of them, those
        agreeing: for which both have the same likeliest class,
        hits: which the program classifies correctly, None without classes,
        expected: which the model does, None without classes.
        difference: Largest difference of a logit, of the largest logit.
    """

    images: int
    agreeing: int
    hits: int | None
    expected: int | None
    difference: float

    @property
    def drop(self) -> float:
        """Points of accuracy that are lost, or without classes, of agreement."""
        lost = self.images - self.agreeing if self.hits is None else self.expected - self.hits
        return 100 * lost / self.images

    def __str__(self) -> str:
        text = ""
        if self.hits is not None:
            now, before = (100 * hits / self.images for hits in (self.hits, self.expected))
            text = f"top-1 {now:.2f}% (torch in float32 {before:.2f}%), "
        agreement = 100 * self.agreeing / self.images
        return (
            f"{text}the same top-1 class in {agreement:.2f}% of {self.images} images, logits within"
            f" {self.difference:.1e} of the largest"
        )


@torch.no_grad()
def measure(
    program: Program, source: ExportSource, images: CalibrationSet, batch: int | None
) -> Quality:
    """Run a program and its model, which takes ``batch`` images or any number, on a folder."""
    batches = (inputs.to(source.device) for inputs in images.batches(batch))
    pairs = [(program(inputs).cpu(), source.eager(inputs).cpu()) for inputs in batches]
    found, expected = (torch.cat(logits)[: len(images)] for logits in zip(*pairs, strict=True))
    top1 = found.argmax(1).where(found.isfinite().all(1), -1)
    right = expected.argmax(1)
    hits = wanted = None
    if images.targets is not None:
        hits, wanted = ((top == images.targets).sum().item() for top in (top1, right))
    agreeing = (top1 == right).sum().item()
    return Quality(len(images), agreeing, hits, wanted, _relative(found, expected))


def speed(programs: Mapping[str, Program], source: ExportSource, batch: int | None) -> str:
    """Return images per second of programs and of the model in PyTorch, measured in turn.

    The first of the programs is compared with the others, and with the model.
    """
    images = source.random_images(batch or 1)
    steps = {label: lambda one=one: one(images) for label, one in programs.items()}
    first = next(iter(programs))
    steps["torch eager"] = lambda: source.eager(images)
    if source.exported is not source.eager:
        steps["torch fused"] = lambda: source.exported(images)
    with torch.inference_mode():
        times = alternate(steps, source.device.type, ROUNDS, MIN_TIME)
    rates = {label: len(images) / statistics.median(values) for label, values in times.items()}
    parts = [
        f"{label} {rate:.1f}"
        + ("" if label == first else f" ({first} {ratio(times[first], times[label]):.2f}x)")
        for label, rate in rates.items()
    ]
    where = f"{torch.get_num_threads()} thread(s)" if source.device.type == "cpu" else "cuda"
    return f"images/s at batch {len(images)}, {where}: {', '.join(parts)}"
