"""What follows from parameters and sizes alone, kept while a model is only evaluated."""

from collections.abc import Callable, Hashable
from typing import TypeVar

import torch
from torch import nn

T = TypeVar("T")


def _fingerprint(tensor: torch.Tensor) -> tuple:
    version = 0 if tensor.is_inference() else tensor._version
    return tensor.data_ptr(), version, tensor.dtype, tensor.device


class EvalCache:
    """The last result of a computation, while its sources stay as they are.

    Nothing is kept in training, while gradients are recorded, or while a graph is captured.
    Every optimizer and ``load_state_dict`` marks the tensors that it changes; writing through
    ``.data`` does not, which is why modules also :meth:`clear` it when their mode is set.
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
        """``make()``, or what it returned last for the same ``key`` and ``sources``.

        Args:
            module: Nothing is kept while it is training.
            sources: Tensors that ``make`` reads.
            key: All else that the result depends on.
            make: Computes the result.
        """
        if (
            module.training
            or torch.is_grad_enabled()
            or torch.compiler.is_compiling()
            or torch.jit.is_tracing()
            or any(source.device.type == "meta" for source in sources)
        ):
            return make()
        key = (key, *map(_fingerprint, sources))
        if self._key != key:
            self._key, self._value = key, make()
        return self._value

    def clear(self) -> None:
        """Forget."""
        self._key = self._value = None

    def __deepcopy__(self, memo: dict) -> "EvalCache":
        return EvalCache()

    def __getstate__(self) -> dict:
        return {"_key": None, "_value": None}
