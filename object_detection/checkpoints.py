"""mmengine's checkpoints, read without executing code in them, and checked against the model.

mmengine's loader falls back on unpickling arbitrary objects; :func:`install_loader` replaces it by
one that reads tensors and plain values only.
"""

import os
import pickle
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from models import Backbone, CheckpointError, read_checkpoint
from models.detection_backbone import checkpoint_filter_fn

DTYPES = ("float64", "float32", "int64", "int32", "bool")
NUMPY_CORES = ("core", "_core")  # of numpy 1 and 2, which read each other's files
STATISTICS = ("min", "max", "mean", "current")
COUNTER = "num_batches_tracked"  # which no function depends on
SHOWN = 4


def _statistic(owner: type, name: str) -> Any:
    """Replace ``getattr``, by which log buffers name their four statistics."""
    from mmengine.logging import HistoryBuffer

    if owner is not HistoryBuffer or name not in STATISTICS:
        raise pickle.UnpicklingError("Unsupported: GLOBAL builtins.getattr")
    return getattr(owner, name)


def plain_classes() -> list[Any]:
    """Return the classes in mmengine's checkpoints: log buffers, numpy's arrays and numbers.

    For ``torch.serialization.safe_globals``.
    """
    from mmengine.logging import HistoryBuffer

    classes = [np.ndarray, np.dtype, HistoryBuffer, *(type(np.dtype(name)) for name in DTYPES)]
    for maker in (np.zeros(0).__reduce__()[0], np.float64(0).__reduce__()[0]):
        names = [f"numpy.{core}.multiarray.{maker.__name__}" for core in NUMPY_CORES]
        classes += [(maker, name) for name in names]
    return [*classes, (_statistic, "builtins.getattr")]


def read(path: str | os.PathLike[str], map_location: Any = None) -> dict[str, Any]:
    """Read a checkpoint of mmengine, or any that :func:`models.read_checkpoint` accepts.

    Args:
        path: File or http(s) address.
        map_location: Of mmengine's loaders; tensors are on the CPU, and it copies them from there.

    Raises:
        CheckpointError: The file is missing, corrupted, of another kind, or a pickle of more than
            plain values.
    """
    with torch.serialization.safe_globals(plain_classes()):
        checkpoint = read_checkpoint(path)
    for key in ("meta", "state_dict"):
        if not isinstance(checkpoint.get(key, {}), dict):
            raise CheckpointError(
                f"{path} is not a checkpoint of mmengine: its {key!r} must be a dict"
            )
    checkpoint.get("meta", {}).pop("config", None)  # source that resuming would execute
    return checkpoint


def install_loader() -> None:
    """Make mmengine read local files and addresses by :func:`read`."""
    from mmengine.runner import CheckpointLoader

    CheckpointLoader.register_scheme(["", "http://", "https://"], read, force=True)


def check_fit(
    model: nn.Module, checkpoint: Mapping[str, Any], source: str, whole: bool = True
) -> None:
    """Raise CheckpointError unless a checkpoint fits ``model``; mmengine would only log that.

    Args:
        model: A detector.
        checkpoint: From :func:`read`.
        source: Name of the checkpoint in the message.
        whole: Require exactly the model's tensors; otherwise one of the backbone's is enough.
    """
    state = _weights(model, checkpoint)
    own = model.state_dict()
    unfit = [key for key in own if key not in state or state[key].shape != own[key].shape]
    unfit = [key for key in unfit if not key.endswith(COUNTER)]
    unknown = [key for key in state if key not in own and not key.endswith(COUNTER)]
    if whole and (unfit or unknown):
        parts = (("missing or of another shape", unfit), ("not in the model", unknown))
        differences = [
            f"{len(keys)} {what}: {', '.join(keys[:SHOWN])}{', ...' if len(keys) > SHOWN else ''}"
            for what, keys in parts
            if keys
        ]
        raise CheckpointError(f"{source} does not fit the model: {'; '.join(differences)}")
    if all(k in unfit or k.endswith(COUNTER) for k in own if k.startswith("backbone.")):
        raise CheckpointError(
            f"{source} has nothing that fits the detector's backbone; weights of a classifier go "
            f"to model.backbone.init_cfg"
        )


def _weights(model: nn.Module, checkpoint: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Return a checkpoint's weights by the model's keys, also from the original's backbone."""
    state = checkpoint.get("state_dict", checkpoint)
    state = {k.removeprefix("module."): v for k, v in state.items() if torch.is_tensor(v)}
    backbone = getattr(model, "backbone", None)
    if not isinstance(backbone, Backbone) or not any(k.startswith("backbone.") for k in state):
        return state
    own = set(backbone.state_dict())
    converted = checkpoint_filter_fn(state, backbone)
    return {f"backbone.{key}" if key in own else key: value for key, value in converted.items()}
