"""Comparison of a program with its model, and its speed."""

import copy
import math
import statistics
from dataclasses import dataclass

import torch

from tools.benchmark.measure import alternate, ratio
from tools.export.formats import Program
from tools.export.source import ExportSource
from utils import UserError

TOLERANCE = 1e-4  # of the largest logit
ROUNDING = 4.0  # multiples of what float32 itself is off by
ROUNDS, MIN_TIME = 5, 0.2


@dataclass(frozen=True)
class Agreement:
    """Difference of a program from the model, relative to the largest logit.

    Attributes:
        difference: Largest difference from the model in float32.
        rounding: Largest difference of the model in float32 from float64, if the tolerance had to
            be that of rounding, which random weights amplify; else None.
        batches: Batch sizes that were compared.
    """

    difference: float
    rounding: float | None
    batches: tuple[int, ...]

    def __str__(self) -> str:
        batches = " and ".join(map(str, self.batches))
        text = f"at batch {batches} within {self.difference:.1e} of the largest logit"
        if self.rounding is not None:
            text += f"; float32 itself is within {self.rounding:.1e} of float64"
        return text


def _relative(one: torch.Tensor, other: torch.Tensor) -> float:
    difference = (one.double().cpu() - other.double().cpu()).abs().max()
    return (difference / other.abs().max().cpu()).item()


@torch.no_grad()
def compare(program: Program, source: ExportSource, batch: int | None) -> Agreement:
    """Compare a program with its model on random images, at batch 1 and 3 or at ``batch``.

    Raises:
        UserError: The difference is larger than 1e-4 of the largest logit and than rounding
            explains.
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
        off = _relative(found, expected)
        difference = max(difference, math.inf if math.isnan(off) else off)
    if difference <= TOLERANCE:
        return Agreement(difference, None, batches)
    exact = copy.deepcopy(source.eager).cpu().double()
    for number in batches:
        images = source.random_images(number, seed=number)
        double = images.cpu() if source.preprocessing else images.cpu().double()
        rounding = max(rounding, _relative(source.eager(images), exact(double)))
    if difference <= ROUNDING * rounding:
        return Agreement(difference, rounding, batches)
    raise UserError(
        f"the program is wrong: {difference:.1e} of the largest logit off, with {TOLERANCE:.0e} "
        f"allowed; float32 itself is within {rounding:.1e} of float64"
    )


def speed(program: Program, runtime: str, source: ExportSource, batch: int | None) -> str:
    """Return images per second of a program and of the model in PyTorch, measured in turn."""
    images = source.random_images(batch or 1)
    steps = {runtime: lambda: program(images), "torch eager": lambda: source.eager(images)}
    if source.exported is not source.eager:
        steps["torch fused"] = lambda: source.exported(images)
    with torch.inference_mode():
        times = alternate(steps, source.device.type, ROUNDS, MIN_TIME)
    rates = {label: len(images) / statistics.median(values) for label, values in times.items()}
    parts = [
        f"{label} {rate:.1f}"
        + ("" if label == runtime else f" ({runtime} {ratio(times[runtime], times[label]):.2f}x)")
        for label, rate in rates.items()
    ]
    where = f"{torch.get_num_threads()} thread(s)" if source.device.type == "cpu" else "cuda"
    return f"images/s at batch {len(images)}, {where}: {', '.join(parts)}"
