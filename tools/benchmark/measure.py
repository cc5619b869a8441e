"""Rates by the clock, alternating between candidates; memory in processes of their own."""

import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from tools.benchmark.candidates import Peer, build, configure
from utils import UserError

ROOT = Path(__file__).resolve().parents[2]
MATRIX = {"cpu": 2048, "cuda": 8192}


@dataclass(frozen=True)
class Case:
    """One measurement.

    Attributes:
        mode: ``"infer"`` or ``"train"``.
        name: Model.
        side, config: Whose, and how configured (see :mod:`tools.benchmark.candidates`).
        batch: Images per step.
        dtype: ``float32``, or what inference nets are converted to and training computes in.
        device: ``cpu`` or ``cuda``.
        size: Height and width of the images.
    """

    mode: str
    name: str
    side: str
    config: str
    batch: int
    dtype: str
    device: str
    size: int

    @property
    def label(self) -> str:
        """Side and configuration."""
        return f"{self.side} {self.config}"


def step_of(case: Case, peer: Peer | None) -> Callable[[], None]:
    """What one step of a case does, ready to be repeated.

    Inference is the forward pass alone. A training step is a forward pass, cross-entropy, the
    backward pass and fused AdamW, the same for all.
    """
    model = build(case.side, case.name, peer, case.size)
    dtype = getattr(torch, case.dtype)
    model = model.train(case.mode == "train").to(case.device)
    if case.mode == "infer":
        model = model.to(dtype)
    model = configure(model, case.side, case.config)
    last = "channels_last" in case.config
    image = torch.randn(case.batch, 3, case.size, case.size, device=case.device)
    image = image.to(memory_format=torch.channels_last if last else torch.contiguous_format)
    if case.mode == "infer":
        image = image.to(dtype)

        def infer() -> None:
            with torch.inference_mode():
                model(image)

        return infer
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    target = torch.randint(1000, (case.batch,), device=case.device)
    mixed = dtype is not torch.float32

    def train() -> None:
        optimizer.zero_grad()
        with torch.autocast(case.device, dtype, enabled=mixed):
            loss = F.cross_entropy(model(image), target)
        loss.backward()
        optimizer.step()

    return train


def matrix_step(device: str, dtype: str) -> tuple[Callable[[], None], float]:
    """A large matrix product, and its multiply-accumulates in billions."""
    size = MATRIX[device]
    a, b = (torch.randn(size, size, device=device).to(getattr(torch, dtype)) for _ in range(2))
    return lambda: torch.mm(a, b), size**3 / 1e9


def seconds(step: Callable[[], None], times: int, device: str) -> float:
    """Mean time of a step."""
    if device == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(times):
        step()
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - started) / times


def alternate(
    steps: dict[str, Callable[[], None]], device: str, rounds: int, min_time: float
) -> dict[str, list[float]]:
    """Times of every step, measured in turn, in another order in every round.

    Args:
        steps: What to repeat.
        device: Where it runs.
        rounds: Measurements of each.
        min_time: Seconds that a measurement takes at least.

    Returns:
        Seconds per step, one number a round.
    """
    times = {}
    for label, step in steps.items():
        for _ in range(2):
            step()
        times[label] = max(1, round(min_time / seconds(step, 1, device)))
    labels, measured = list(steps), {label: [] for label in steps}
    for index in range(rounds):
        turn = index % len(labels)
        for label in labels[turn:] + labels[:turn]:
            measured[label].append(seconds(steps[label], times[label], device))
    return measured


def ratio(ours: list[float], others: list[float]) -> float:
    """How many times faster: the median over rounds of the times' ratio."""
    return statistics.median(other / own for own, other in zip(ours, others, strict=True))


def resident_peak() -> float:
    """Largest resident set of this process so far, in MiB."""
    try:  # getrusage counts what the process was before it became this program
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) / 1024
    except (OSError, IndexError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def peak_memory(case: Case, peer: Peer | None, steps: int = 2) -> float:
    """Peak memory in MiB of this process after a few steps: the allocator's, or resident."""
    step = step_of(case, peer)
    for _ in range(steps):
        step()
    if case.device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resident_peak()


def in_process_of_its_own(case: Case, peer: Peer | None) -> float:
    """:func:`peak_memory` of a fresh process.

    Raises:
        UserError: The process dies, as some configurations of peers do.
    """
    words = {"case": asdict(case), "peer": peer and [str(peer.folder), peer.kwargs]}
    command = [sys.executable, "-m", "tools.benchmark.measure", json.dumps(words)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        if done.returncode < 0:
            reason = f"killed by signal {-done.returncode}"
        raise UserError(f"{case.mode} {case.name} {case.label}: {reason}")
    return float(done.stdout.splitlines()[-1])


def memory(case: Case, peer: Peer | None) -> tuple[float, float]:
    """Peak in MiB, and MiB per image: what twice the batch takes more."""
    peak = in_process_of_its_own(case, peer)
    double = Case(**asdict(case) | {"batch": 2 * case.batch})
    return peak, (in_process_of_its_own(double, peer) - peak) / case.batch


if __name__ == "__main__":
    words = json.loads(sys.argv[1])
    original = words["peer"] and Peer(Path(words["peer"][0]), words["peer"][1])
    print(peak_memory(Case(**words["case"]), original))
