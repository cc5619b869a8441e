"""Cache, in evaluation, of values that depend only on parameters and sizes."""

from collections.abc import Callable, Hashable
from typing import TypeVar

import torch
from torch import nn

from .tracing import is_captured

T = TypeVar("T")


def _fingerprint(tensor: torch.Tensor) -> tuple:
    version = 0 if tensor.is_inference() else tensor._version
    return tensor.data_ptr(), version, tensor.dtype, tensor.device


def may_keep(x: torch.Tensor) -> bool:
    """Return True if tensors made for ``x`` may be cached: real ones, in no captured graph."""
    return type(x) in (torch.Tensor, nn.Parameter) and not is_captured()


class EvalCache:
    """The last result of a computation, valid while its source tensors are unchanged.

    Nothing is cached in training, while gradients are recorded, or while a graph is captured.
    Optimizers and ``load_state_dict`` change the version of a tensor; writing through ``.data``
    does not, so modules also :meth:`clear` the cache when their mode is set.
    """

    def __init__(self) -> None:
        self._key: Hashable = None
        self._value = None

    def get(
        self,
        module: nn.Module,
        sources: tuple[torch.Tensor, ...],
        key: Hashable,
        make: Callable[[], T],
    ) -> T:
        """Return ``make()``, or its last result for the same ``key`` and ``sources``.

        Args:
            module: Owner of the cache; nothing is cached while it is training.
            sources: Tensors that ``make`` reads.
            key: Everything else that the result depends on.
            make: Computes the result.
        """
        if (
            module.training
            or torch.is_grad_enabled()
            or is_captured()
            or any(source.device.type == "meta" for source in sources)
        ):
            return make()
        key = (key, *map(_fingerprint, sources))
        if self._key != key:
            self._key, self._value = key, make()
        return self._value

    def clear(self) -> None:
        """Empty the cache."""
        self._key = self._value = None

    def __deepcopy__(self, memo: dict) -> "EvalCache":
        return EvalCache()

    def __getstate__(self) -> dict:
        return {"_key": None, "_value": None}
