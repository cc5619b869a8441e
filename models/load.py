"""From a name, a Hub id, a folder, a file or an address to a model and its preprocessing.

The one rule of which model a source is, and what it expects of its images.
"""

import contextlib
import inspect
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn
from torch.nn.modules import module as hooks

from models.checkpoint.apply import LoadReport, load_weights
from models.checkpoint.contents import class_names, num_classes_of, settings_of, state_dict_of
from models.checkpoint.read import read_checkpoint
from models.data_config import DataConfig, data_config_of
from models.errors import CheckpointError, ModelError
from models.factory import build_model, check_name, pretrained_config
from models.hub import FOLDER, HUB, check_pretrained, read_hub

WEIGHTS = ("model", "ema")
FREE_ELEMENTS, GROWTH = 1 << 24, 4  # a model may have so many, and so often those of its file
FREE_TENSORS = 2000  # parameters that a model may have beyond GROWTH times those of its file
# settings in pretrained_cfg that describe other weights
STALE = ("url", "hf_hub_id", "tag", "test_input_size", "test_crop_pct", "label_names", "license")
LONGEST_TEXT, LONGEST_LIST = 100, 1000  # of an argument from a file


@dataclass(frozen=True)
class ModelSource:
    """A model that can be built: its name, arguments, weights and preprocessing.

    Attributes:
        label: Name of the file, or of the weights, for messages.
        name: Registered name of the model.
        data_config: Preprocessing of its images.
        required: Keyword arguments that the model must accept; None for its default.
        optional: Keyword arguments that are left out if the model does not accept them.
        checkpoint: Content of the file; empty for a model without one.
        classes: Class names in the order of the outputs, None if unknown.
        pretrained: Build with timm's weights.
    """

    label: str
    name: str
    data_config: DataConfig
    required: Mapping[str, Any] = field(default_factory=dict)
    optional: Mapping[str, Any] = field(default_factory=dict)
    checkpoint: Mapping[str, Any] = field(default_factory=dict)
    classes: tuple[str, ...] | None = None
    pretrained: bool = False

    @property
    def has_weights(self) -> bool:
        """False for a model with random weights."""
        return bool(self.checkpoint) or self.pretrained

    def without_weights(self) -> "ModelSource":
        """Return the same model with random weights."""
        return replace(self, checkpoint={}, pretrained=False, label=f"{self.name} of {self.label}")

    def weights(self, choice: str = "both") -> tuple[str, ...]:
        """Return the chosen weights, of ``both`` those that exist: ``model``, ``ema``.

        Raises:
            CheckpointError: The chosen weights do not exist.
        """
        if self.checkpoint:
            wanted = WEIGHTS if choice == "both" else (choice,)
            return tuple(_states(self.checkpoint, self.label, wanted))
        if choice == "ema":
            raise CheckpointError(f"{self.label}: no moving average; use --weights model")
        return ("model",)

    @property
    def num_classes(self) -> int | None:
        """Number of outputs; None if only the built model can tell."""
        if self.checkpoint or "num_classes" in self.required:
            return self.required.get("num_classes")
        config = pretrained_config(self.name)
        return config.num_classes if config else None

    def build(self, size: int | Sequence[int] | None = None, **required: Any) -> nn.Module:
        """Build the model, with timm's weights if ``pretrained``, else with random ones.

        Args:
            size: Image size in pixels, for models that depend on it.
            **required: Further keyword arguments that the model must accept.

        Raises:
            ModelError: The model cannot be built, or timm's weights cannot be downloaded.
        """
        return self.build_with_kwargs(size, required)[0]

    def build_with_kwargs(
        self,
        size: int | Sequence[int] | None = None,
        required: Mapping[str, Any] | None = None,
        optional: Mapping[str, Any] | None = None,
    ) -> tuple[nn.Module, dict[str, Any]]:
        """Build the model as :meth:`build` does; return it with its keyword arguments."""
        required = dict(self.required) | dict(required or {})
        optional = dict(self.optional) | dict(optional or {})
        optional |= {} if size is None else {"img_size": size}
        if self.checkpoint:
            self._check_arguments(required, optional)
        if not self.pretrained:
            return build_model(self.name, required, optional)
        check_pretrained(pretrained_config(self.name), self.name)
        try:
            model, kwargs = build_model(self.name, required | {"pretrained": True}, optional)
        except ModelError:
            raise
        except Exception as error:  # downloads raise errors of any type
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ModelError(f"cannot get {self.label}: {reason}") from error
        del kwargs["pretrained"]
        return model, kwargs

    def _check_arguments(self, required: Mapping[str, Any], optional: Mapping[str, Any]) -> None:
        """Build the model without memory first: its file may ask for any size.

        Raises:
            CheckpointError: An argument of the file is not one of the model's constructor, or the
                model has many more parameters than its file.
        """
        tensors = [
            value
            for state in _states(self.checkpoint, self.label).values()
            for value in state.values()
        ]
        elements = GROWTH * sum(value.numel() for value in tensors) + FREE_ELEMENTS
        count = GROWTH * len(tensors) + FREE_TENSORS
        given = {key for key in self.optional if key not in required}
        try:
            with torch.device("meta"):
                known = _parameters_of(type(build_model(self.name, {}, {})[0]))
                if strange := sorted(given - known):
                    raise CheckpointError(
                        f"{self.label}: model_kwargs has {', '.join(strange)}, which is not an "
                        f"argument of {self.name}"
                    )
                with _bounded(count, elements, f"{self.label}: {self.name}"):
                    build_model(self.name, required, optional)
        except CheckpointError:
            raise
        except Exception as error:  # values of any kind make constructors raise errors of any kind
            reason = " ".join(str(error).split()) or type(error).__name__
            raise CheckpointError(f"{self.label}: {reason}") from error

    def load(self, model: nn.Module, weights: str = "model", **options: bool) -> LoadReport | None:
        """Load the weights of the file, ``model`` or ``ema``, if there is a file.

        Args:
            model: From :meth:`build`.
            weights: Which.
            **options: See :func:`models.load_weights`.

        Raises:
            CheckpointError: The weights do not fit the model.
        """
        if not self.checkpoint:
            return None
        try:
            report = load_weights(
                model, self.checkpoint, self.label, ema=weights == "ema", **options
            )
        except CheckpointError as error:
            saved = self.checkpoint.get("model_name")
            if saved in (None, self.name):
                raise
            raise CheckpointError(f"{error}; it is of {saved}, not of {self.name}") from error
        return report

    def describe(self, model: nn.Module, data_config: DataConfig | None = None) -> None:
        """Record preprocessing and classes in ``model.pretrained_cfg``, where timm looks."""
        old = dict(getattr(model, "pretrained_cfg", None) or {})
        own = (data_config or self.data_config).to_timm()
        own["num_classes"] = model.num_classes
        if self.checkpoint:
            own |= dict.fromkeys(STALE)
            own["license"] = self.checkpoint.get("license")
            if self.classes and len(self.classes) == model.num_classes:
                own["label_names"] = list(self.classes)
        if own["input_size"] != tuple(old.get("input_size") or ()):
            own["pool_size"] = None
        model.pretrained_cfg = model.default_cfg = old | own


@dataclass(frozen=True)
class LoadedModel:
    """A model with its weights, and what its images are.

    Attributes:
        model: In evaluation mode, on the CPU.
        name: Registered name.
        kwargs: Keyword arguments that built it.
        classes: Class names in the order of the outputs, None if unknown.
        data_config: Preprocessing of its images; ``model.pretrained_cfg`` has the same.
        report: Report of keys; None if the weights are timm's or random.
    """

    model: nn.Module
    name: str
    kwargs: Mapping[str, Any]
    classes: tuple[str, ...] | None
    data_config: DataConfig
    report: LoadReport | None


def load_model(
    source: str | Path | ModelSource,
    name: str | None = None,
    *,
    pretrained: bool = False,
    weights: str = "model",
    input_size: int | tuple[int, int] | None = None,
    num_classes: int | None = None,
    **kwargs: Any,
) -> LoadedModel:
    """Load a model from any source.

    Args:
        source: Registered name, with or without timm's tag; ``hf-hub:ORG/NAME``;
            ``local-dir:FOLDER``; or a file or http(s) address in any format that
            :func:`models.read_checkpoint` reads; or a result of :func:`find_model`.
        name: Name of the model, for files that do not contain it.
        pretrained: Load timm's weights of a registered name, instead of random ones.
        weights: ``model``, or ``ema`` for the moving average.
        input_size: Side, or height and width, in pixels; default: that of the source.
        num_classes: Number of outputs; a new classifier if the source has another number.
        **kwargs: Further arguments of the model; ``img_size`` is the same as ``input_size``.

    Raises:
        ModelError: The source does not exist, or the model cannot be built.
        CheckpointError: Weights cannot be read, or do not fit the model.
    """
    input_size = kwargs.pop("img_size", input_size)
    found = source
    if not isinstance(source, ModelSource):
        found = find_model(str(source), name, pretrained=pretrained)
    found.weights(weights)
    config = found.data_config if input_size is None else found.data_config.at_size(input_size)
    size = config.input_size
    if num_classes is not None:
        kwargs["num_classes"] = num_classes
    model, used = found.build_with_kwargs(size[0] if size[0] == size[1] else size, kwargs)
    is_new = num_classes not in (None, found.num_classes)
    report = found.load(model, weights, new_head=is_new, other_classes=is_new)
    found.describe(model, config)
    classes = None if is_new else found.classes
    return LoadedModel(model.eval(), found.name, used, classes, config, report)


def find_model(
    source: str,
    name: str | None = None,
    *,
    pretrained: bool = False,
    default: str | None = None,
    exponent: float | None = None,
) -> ModelSource:
    """Find what model a source is, without building it.

    Args:
        source, name, pretrained: See :func:`load_model`.
        default: Name of the model if neither the file nor ``name`` tells.
        exponent: Query/key pre-scale exponent, for files that do not contain it.

    Raises:
        ModelError: The source does not exist, or does not fit the other arguments.
        CheckpointError: The file cannot be read, or is inconsistent.
    """
    checkpoint = _read(source)
    if checkpoint is None:
        return from_name(source, pretrained, name)
    return from_checkpoint(checkpoint, source, name, default, exponent)


def read_weights(source: str) -> Mapping[str, Any]:
    """Return the content of a checkpoint from any source; of a model name, timm's weights.

    Raises:
        ModelError, CheckpointError: See :func:`find_model`.
    """
    checkpoint = _read(source)
    if checkpoint is None:
        found = from_name(source, pretrained=True)
        return {"model_name": found.name, "model": found.build().state_dict()}
    return checkpoint


def _read(source: str) -> dict[str, Any] | None:
    """Read a file, an address, a folder or a model of the Hub; None for other names."""
    if source.startswith((HUB, FOLDER)):
        return read_hub(source)
    if source.startswith(("http://", "https://")) or os.path.isfile(source):
        return read_checkpoint(source)
    if timm.is_model(source) or not os.path.exists(source):
        return None
    return read_hub(source) if os.path.isdir(source) else read_checkpoint(source)


def from_name(name: str, pretrained: bool = False, other: str | None = None) -> ModelSource:
    """Return a model of timm's registry, with timm's weights or with random ones.

    Raises:
        ModelError: The name is neither a model nor a file, or ``other`` is given and differs.
    """
    try:
        config = pretrained_config(name)
    except ModelError as error:
        if "/" in name or Path(name).suffix in (".pth", ".pt", ".bin", ".safetensors", ".ckpt"):
            raise CheckpointError(
                f"cannot read checkpoint {name}: No such file or directory; a model of the Hub "
                f"has the prefix {HUB}, a folder {FOLDER}"
            ) from error
        raise
    if other is not None and timm.models.get_arch_name(other) != timm.models.get_arch_name(name):
        raise ModelError(f"{name} is a model, and so is {other}: leave one of them out")
    label = f"timm's weights of {name}" if pretrained else f"{name} with random weights"
    images = data_config_of({}, config.to_dict() if config else None, name)
    return ModelSource(label, name, images, pretrained=pretrained)


def from_checkpoint(
    checkpoint: Mapping[str, Any],
    label: str,
    name: str | None = None,
    default: str | None = None,
    exponent: float | None = None,
) -> ModelSource:
    """Return the model of a checkpoint that has been read; see :func:`find_model`.

    Raises:
        CheckpointError: The content is inconsistent, or names no registered model.
        ModelError: No model is named, or ``name`` is unknown.
    """
    saved_name = checkpoint.get("model_name") or checkpoint.get("arch")
    if saved_name is not None and not isinstance(saved_name, str):
        raise CheckpointError(f"{label}: model_name must be text, not {str(saved_name)[:40]}")
    if name is None and saved_name is not None and not timm.is_model(saved_name):
        raise CheckpointError(
            f"{label} is of model {saved_name[:LONGEST_TEXT]!r}, which is not registered: give "
            f"--model NAME"
        )
    name = name or saved_name or default
    if name is None:
        raise ModelError(f"{label} does not contain the model name: give --model NAME")
    check_name(name)
    is_own = saved_name is not None and _architecture(saved_name) == _architecture(name)
    saved = checkpoint.get("model_kwargs") or {}
    if not isinstance(saved, Mapping):
        raise CheckpointError(f"{label}: model_kwargs must be a dict")
    saved = _plain_arguments(saved, label) if is_own or saved_name is None else {}
    rows = num_classes_of(next(iter(_states(checkpoint, label).values())), name)
    number = rows if saved.get("num_classes") is None else saved["num_classes"]
    if number is not None and (type(number) is not int or rows not in (None, number)):
        raise CheckpointError(f"{label} has {rows} outputs, not {number} as its num_classes says")
    classes = class_names(checkpoint, label)
    if classes and number is not None and len(classes) != number:
        raise CheckpointError(f"{label} has {len(classes)} class names for {number} outputs")
    own_exponent, _ = settings_of(checkpoint, label)
    required = {"num_classes": number}
    required["qk_scale_factor"] = exponent if own_exponent is None else own_exponent
    config = pretrained_config(name)
    images = data_config_of(checkpoint, config.to_dict() if config else None, label)
    return ModelSource(label, name, images, required, saved, checkpoint, tuple(classes) or None)


def _architecture(name: str) -> str:
    return name.partition(".")[0]


def _plain_arguments(saved: Mapping[str, Any], label: str) -> dict[str, Any]:
    """Return arguments of a file: numbers, flags, short texts and lists of them."""

    def is_plain(value: Any) -> bool:
        if isinstance(value, list | tuple):
            return len(value) <= LONGEST_LIST and all(map(is_plain, value))
        if isinstance(value, str):
            return len(value) <= LONGEST_TEXT
        return value is None or isinstance(value, bool | int | float)

    for key, value in saved.items():
        if not isinstance(key, str) or not is_plain(value):
            raise CheckpointError(
                f"{label}: model_kwargs has {str(key)[:40]}={str(value)[:40]}, which is not a "
                f"number, a flag or a short text"
            )
    return dict(saved)


def _parameters_of(cls: type[nn.Module]) -> set[str]:
    """Return the names of the constructor's arguments, with those passed on to a base class."""
    return {
        name
        for base in cls.__mro__
        if base not in (nn.Module, object)
        for name in inspect.signature(base.__init__).parameters
        if name not in ("self", "args", "kwargs")
    }


@contextlib.contextmanager
def _bounded(count: int, elements: int, what: str) -> Iterator[None]:
    """Bound the tensors that modules register within the block; raise CheckpointError beyond."""
    seen = [0, 0]

    def register(module: nn.Module, name: str, tensor: torch.Tensor | None) -> None:
        if tensor is not None:
            seen[0], seen[1] = seen[0] + 1, seen[1] + tensor.numel()
            if seen[0] > count or seen[1] > elements:
                raise CheckpointError(f"{what} would be much larger than its file")

    handles = [
        hooks.register_module_parameter_registration_hook(register),
        hooks.register_module_buffer_registration_hook(register),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _states(
    checkpoint: Mapping[str, Any], source: str, wanted: Sequence[str] = WEIGHTS
) -> dict[str, dict[str, torch.Tensor]]:
    """Return those of the wanted weights that a file has.

    Raises:
        CheckpointError: The file has none of them; the reason for the first.
    """
    found, errors = {}, []
    for name in wanted:
        try:
            found[name] = state_dict_of(checkpoint, source, ema=name == "ema").state
        except CheckpointError as error:
            errors.append(error)
    if not found:
        raise errors[0]
    return found
