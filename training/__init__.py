"""What keeps a training run whole: its state and folder, signals, a watch over its processes."""

from training.distillation import (
    DistillationLoss,
    Taught,
    build_teacher,
    learn_from_teacher,
)
from training.files import OutputError
from training.output import CHECKPOINT, Output
from training.resume import find_checkpoint, read_resume
from training.run import Run
from training.trainer import Evaluation, Trainer
from training.watchdog import ProcessError

__all__ = [
    "CHECKPOINT",
    "DistillationLoss",
    "Evaluation",
    "Output",
    "OutputError",
    "ProcessError",
    "Run",
    "Taught",
    "Trainer",
    "build_teacher",
    "find_checkpoint",
    "learn_from_teacher",
    "read_resume",
]
