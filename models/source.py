"""A model that can be built: its name, arguments, weights and preprocessing."""

import contextlib
import functools
import inspect
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as hooks

from .checkpoint.apply import LoadReport, load_weights
from .checkpoint.contents import states_of
from .data_config import DataConfig
from .errors import CheckpointError, ModelError
from .factory import build_model, pretrained_config
from .hub import check_pretrained

FREE_ELEMENTS, GROWTH = 1 << 24, 4  # a model may have so many, and so often those of its file
FREE_TENSORS = 500  # parameters that a model may have beyond GROWTH times those of its file
# settings in pretrained_cfg that describe other weights
STALE = ("url", "hf_hub_id", "tag", "test_input_size", "test_crop_pct", "label_names", "license")


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

    def with_channels(self, in_chans: int | None) -> "ModelSource":
        """Return the same model for images of 1 or 3 channels; None for those of the source.

        Raises:
            ModelError: See :meth:`DataConfig.with_channels`; names the source.
        """
        try:
            return replace(self, data_config=self.data_config.with_channels(in_chans))
        except ModelError as error:
            raise ModelError(f"{self.label}: {error}") from error

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
            wanted = {} if choice == "both" else {"wanted": (choice,)}
            return tuple(states_of(self.checkpoint, self.label, **wanted))
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
        required |= {"in_chans": 1} if self.data_config.is_grey else {}
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
            for state in states_of(self.checkpoint, self.label).values()
            for value in state.values()
        ]
        elements = GROWTH * sum(value.numel() for value in tensors) + FREE_ELEMENTS
        count = GROWTH * len(tensors) + FREE_TENSORS
        given = {key for key in self.optional if key not in required}
        try:
            if strange := sorted(given - _arguments_of(self.name)):
                raise CheckpointError(
                    f"{self.label}: model_kwargs has {', '.join(strange)}, which is not an "
                    f"argument of {self.name}"
                )
            with torch.device("meta"), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # an error says more
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
            reason = str(error).removeprefix(f"{self.label} ")
            message = f"{self.label} is of {saved}, not of {self.name}: it {reason}"
            raise CheckpointError(message) from error
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


@functools.cache
def _arguments_of(name: str) -> frozenset[str]:
    """Return the names of a constructor's arguments, with those passed on to a base class."""
    with torch.device("meta"):
        model, _ = build_model(name, {}, {})
    return frozenset(
        argument
        for base in type(model).__mro__
        if base not in (nn.Module, object)
        for argument in inspect.signature(base.__init__).parameters
        if argument not in ("self", "args", "kwargs")
    )


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
