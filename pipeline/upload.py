"""Move small arrays to a device together."""

from collections.abc import Hashable, Mapping

import numpy as np
import torch
from torch import Tensor

ALIGNMENT = 16  # bytes


def upload(arrays: Mapping[Hashable, np.ndarray], device: torch.device) -> dict[Hashable, Tensor]:
    """Return the arrays as tensors on a device, by one copy from pinned memory, without waiting.

    A tensor made of a list, or of an array each, would be a copy of its own, from memory that is
    not pinned: the host waits for it.
    """
    starts = np.cumsum([0, *(-(-a.nbytes // ALIGNMENT) * ALIGNMENT for a in arrays.values())])
    memory = torch.empty(int(starts[-1]), dtype=torch.uint8, pin_memory=device.type == "cuda")
    places = memory.numpy()
    for array, start in zip(arrays.values(), starts.tolist(), strict=False):
        places[start : start + array.nbytes].view(array.dtype).reshape(array.shape)[...] = array
    moved = memory.to(device, non_blocking=True)
    return {
        key: moved[start : start + array.nbytes].view(_dtype(array)).view(array.shape)
        for (key, array), start in zip(arrays.items(), starts.tolist(), strict=False)
    }


def _dtype(array: np.ndarray) -> torch.dtype:
    return torch.from_numpy(np.empty(0, array.dtype)).dtype
