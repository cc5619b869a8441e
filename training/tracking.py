"""Experiment trackers of ``--log-to``: the flags and every epoch of a run, as in ``log.txt``.

They get the run name, keep to their own settings (environment, login), and never change a result.
"""

import contextlib
import importlib
import importlib.util
import io
import itertools
import json
import os
import signal
import sys
import threading
import time
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any, Protocol

import torch

import utils
from training.checkpoints import plain
from training.existing_run import LOG, TRACKING
from training.files import write_atomically
from training.output import Output
from utils import UserError, log

PROJECT = "visformer"
DEFAULTS = {  # of the packages' settings: quiet, no telemetry, and an outage ends in a minute
    "WANDB_SILENT": "true",
    "WANDB_CONSOLE": "off",
    "WANDB_ERROR_REPORTING": "false",
    "WANDB_FINISH_TIMEOUT": "300",
    "WANDB__TRANSACTION_LOG_FLUSH_INTERVAL": "1",  # seconds; a killed run loses the rest
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "15",
    "GIT_PYTHON_REFRESH": "quiet",
}


class Tracker(Protocol):
    """Adapter of one package."""

    def __init__(self, package: ModuleType): ...

    def begin(self, folder: Path, name: str, config: Mapping[str, Any], run: str | None) -> str:
        """Start a run, or continue the run of this id; return its id.

        Args:
            folder: Output folder; its name is that of a run without one.
            name: Name of the run, or an empty string.
            config: Flags.
            run: Id to continue, if any.
        """

    def log(self, metrics: Mapping[str, float], epoch: int) -> None:
        """Record the metrics of an epoch."""

    def end(self, status: str) -> None:
        """End the run: ``finished``, ``interrupted`` or ``failed``."""


class Wandb:
    """Weights & Biases; WANDB_MODE, WANDB_PROJECT, WANDB_NAME, WANDB_DIR and others apply."""

    def __init__(self, package: ModuleType):
        self.package = package

    def begin(self, folder: Path, name: str, config: Mapping[str, Any], run: str | None) -> str:
        self.run = self.package.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=name or os.environ.get("WANDB_NAME", folder.name),
            dir=os.environ.get("WANDB_DIR", str(folder)),
            id=run,
            resume="allow",
            config=dict(config),
            allow_val_change=True,
        )
        return self.run.id

    def log(self, metrics: Mapping[str, float], epoch: int) -> None:
        self.run.log(dict(metrics), step=epoch, commit=True)  # else with the next one

    def end(self, status: str) -> None:
        try:
            self.run.summary["status"] = status
            if status == "interrupted":
                self.run.mark_preempting()
            self.run.finish(exit_code=int(status != "finished"))
        finally:  # else it prints an error at the exit if its process was lost
            self.package.teardown()


class Mlflow:
    """MLflow; MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME, MLFLOW_EXPERIMENT_ID apply."""

    STATUS = {"finished": "FINISHED", "interrupted": "KILLED", "failed": "FAILED"}  # noqa: RUF012

    def __init__(self, package: ModuleType):
        self.package, self.client = package, package.MlflowClient()

    def begin(self, folder: Path, name: str, config: Mapping[str, Any], run: str | None) -> str:
        params = {key: str(value) for key, value in config.items()}
        if run is None:
            run = self.client.create_run(
                self._experiment(), run_name=name or folder.name
            ).info.run_id
        else:  # a parameter cannot change: its first value stays
            known = self.client.get_run(run).data.params
            params = {key: value for key, value in params.items() if key not in known}
            self.client.update_run(run, status="RUNNING")
        entities = self.package.entities
        self.client.log_batch(run, params=[entities.Param(*item) for item in params.items()])
        self.run = run
        return run

    def _experiment(self) -> str:
        if number := os.environ.get("MLFLOW_EXPERIMENT_ID"):
            return number
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        found = self.client.get_experiment_by_name(name)
        return found.experiment_id if found else self.client.create_experiment(name)

    def log(self, metrics: Mapping[str, float], epoch: int) -> None:
        now, metric = int(1000 * time.time()), self.package.entities.Metric
        values = [metric(key, float(value), now, epoch) for key, value in metrics.items()]
        self.client.log_batch(self.run, metrics=values)

    def end(self, status: str) -> None:
        self.client.set_tag(self.run, "status", status)
        self.client.set_terminated(self.run, self.STATUS[status])


class Trackio:
    """Trackio; TRACKIO_DIR, TRACKIO_SPACE_ID and others apply, and TRACKIO_PROJECT here."""

    def __init__(self, package: ModuleType):
        self.package = package

    def begin(self, folder: Path, name: str, config: Mapping[str, Any], run: str | None) -> str:
        project, name = os.environ.get("TRACKIO_PROJECT", PROJECT), name or folder.name
        if run is None:  # runs are resumed by name: it must be unique
            taken = set()
            with contextlib.suppress(ValueError):  # the project is new
                taken = {other.name for other in self.package.Api().runs(project)}
            names = (f"{name}-{number}" if number > 1 else name for number in itertools.count(1))
            run = next(free for free in names if free not in taken)
        self.run = self.package.init(project, run, config=dict(config), resume="allow", embed=False)
        return run

    def log(self, metrics: Mapping[str, float], epoch: int) -> None:
        self.run.log(dict(metrics), step=epoch)

    def end(self, status: str) -> None:
        if status != "finished":  # there is no other mark
            self.run.alert(status)
        self.package.finish()  # the run's own would leave another one to the exit


TRACKERS: dict[str, type[Tracker]] = {"wandb": Wandb, "mlflow": Mlflow, "trackio": Trackio}


def check_installed(names: list[str]) -> None:
    """Raise UserError if the package of a tracker is missing."""
    for name in names:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:  # the latter for a folder of that name
            raise UserError(f"--log-to {name} needs the package {name}: pip install {name}")


@contextlib.contextmanager
def _isolated() -> Iterator[None]:
    """Keep output, warnings, random state, signal handlers and hooks as they are."""
    random = utils.random_state(torch.device("cpu"))
    handlers = {number: signal.getsignal(number) for number in signal.valid_signals()}
    hooks = sys.excepthook, threading.excepthook, sys.exit
    sink = io.StringIO()  # no terminal either: nothing is asked
    try:
        with (
            contextlib.redirect_stdout(sink),
            contextlib.redirect_stderr(sink),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        utils.set_random_state(random, torch.device("cpu"))
        for number, handler in handlers.items():
            if signal.getsignal(number) is not handler:
                signal.signal(number, handler)
        sys.excepthook, threading.excepthook, sys.exit = hooks


class Tracking:
    """Context manager of the tracked runs of a training, on rank 0.

    A resumed run continues the tracked runs of its folder. Epochs that they miss are added from
    ``log.txt``; those that they have are not logged again. A tracker that fails while training, or
    while a run resumes, costs a warning, and is left.

    Args:
        args: Flags.
        output: Output folder; ``log.txt`` holds the epochs before this start.
        resumes: The run continues one of this folder.

    Raises:
        UserError: A tracker of a new run cannot start.
    """

    def __init__(self, args: Namespace, output: Output, resumes: bool):
        self.status = "finished"
        self._output = output
        self._active: dict[str, Tracker] = {}
        self._failed: list[Tracker] = []
        self._record: dict[str, dict[str, Any]] = {}
        if not args.log_to or not utils.is_main_process():
            return
        for key, value in DEFAULTS.items():
            os.environ.setdefault(key, value)
        self._path = output.folder / TRACKING
        if resumes:
            self._record = _read(self._path)
        for name in dict.fromkeys(args.log_to):
            reason = self._attempt(lambda name=name: self._begin(name, args))
            if reason and not resumes:
                self._end("failed")
                raise UserError(f"--log-to {name} cannot start: {reason}")
            self._drop(name, reason)
        for row in _rows(output.folder / LOG):
            self.log(row, row["epoch"])

    def _begin(self, name: str, args: Namespace) -> None:
        tracker = TRACKERS[name](importlib.import_module(name))
        entry = self._record.get(name, {"id": None, "epoch": -1})
        folder = self._output.folder.absolute()
        entry["id"] = tracker.begin(folder, args.experiment, plain(vars(args)), entry["id"])
        self._active[name], self._record[name] = tracker, entry
        self._write()

    def log(self, stats: Mapping[str, float], epoch: int) -> None:
        """Record the statistics of an epoch, unless that was done before."""
        for name in list(self._active):
            if epoch > self._record[name]["epoch"]:
                self._drop(name, self._attempt(lambda name=name: self._log(name, stats, epoch)))

    def _log(self, name: str, stats: Mapping[str, float], epoch: int) -> None:
        entry = self._record[name]
        before, entry["epoch"] = entry["epoch"], epoch
        self._write()  # first: a run that is killed here must not log the epoch again
        try:
            self._active[name].log(stats, epoch)
        except Exception:
            entry["epoch"] = before
            self._write()
            raise

    def _write(self) -> None:
        text = json.dumps(self._record).encode()
        write_atomically(self._path, lambda file: file.write(text))

    def _attempt(self, call: Callable[[], None]) -> str | None:
        """Call a tracker; return the reason why it failed, if it did."""
        try:
            with _isolated():
                call()
        except Exception as error:  # of any kind: the training is worth more
            return next(iter(str(error).strip().splitlines()), type(error).__name__)
        return None

    def _drop(self, name: str, reason: str | None) -> None:
        if reason is not None:
            self._failed += [self._active.pop(name)] if name in self._active else []
            log(f"warning: {name} does not record this run any more: {reason}")

    def _end(self, status: str) -> None:
        self._output.wait()  # its warnings are printed while the output is
        for tracker in self._failed:  # it may be back
            self._attempt(lambda tracker=tracker: tracker.end(status))
        for name, tracker in self._active.items():
            if reason := self._attempt(lambda tracker=tracker: tracker.end(status)):
                log(f"warning: {name} did not record the end of this run: {reason}")
        self._failed, self._active = [], {}

    def __enter__(self) -> "Tracking":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None:
            self.status = "interrupted" if kind is KeyboardInterrupt else "failed"
        self._end(self.status)


def _read(path: Path) -> dict[str, dict[str, Any]]:
    """Return the runs that a folder has been tracked as; none if the file is missing or damaged."""
    try:
        record = json.loads(path.read_text("utf-8"))
        return {
            name: {"id": str(record[name]["id"]), "epoch": int(record[name]["epoch"])}
            for name in TRACKERS
            if name in record
        }
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        log(f"warning: cannot read {path}, new runs are tracked: {error}")
        return {}


def _rows(path: Path) -> Iterator[dict[str, float]]:
    """Yield the lines of ``log.txt``, with the best accuracy so far."""
    best = 0.0
    for line in path.read_text("utf-8").splitlines() if path.exists() else ():
        row = json.loads(line)
        best = max(best, row.get("test_acc1", 0.0))
        yield row | {"best_acc1": best}
