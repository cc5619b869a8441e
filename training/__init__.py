"""What keeps a training run whole: its state and folder, signals, a watch over its processes."""

from training.distillation import (
    DistillationLoss,
    Taught,
    build_teacher,
    learn_from_teacher,
)
from training.files import OutputError
from training.network import (
    Network,
    build_network,
    choose_precision,
    count_parameters,
    fused,
    renormalized,
)
from training.output import CHECKPOINT, Output
from training.resume import find_checkpoint, read_resume
from training.run import Run
from training.trainer import Evaluation, Trainer
from training.watchdog import ProcessError

__all__ = [
    "CHECKPOINT",
    "DistillationLoss",
    "Evaluation",
    "Network",
    "Output",
    "OutputError",
    "ProcessError",
    "Run",
    "Taught",
    "Trainer",
    "build_network",
    "build_teacher",
    "choose_precision",
    "count_parameters",
    "find_checkpoint",
    "fused",
    "learn_from_teacher",
    "read_resume",
    "renormalized",
]
