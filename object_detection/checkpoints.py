"""mmengine's checkpoints, read without executing code in them, and checked against the model.

mmengine's loader falls back on unpickling arbitrary objects; :func:`install_loader` replaces it by
one that reads tensors and plain values only. The config in a checkpoint is Python source, which
mmengine would execute; :func:`read_config_of` reads it as data.
"""

import ast
import os
import pickle
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from models import Backbone, CheckpointError, read_checkpoint
from models.detection_backbone import checkpoint_filter_fn
from utils import UserError

DTYPES = ("float64", "float32", "int64", "int32", "bool")
NUMPY_CORES = ("core", "_core")  # of numpy 1 and 2, which read each other's files
STATISTICS = ("min", "max", "mean", "current")
# types that a checkpoint's config may build: parts of this repository's detectors
PARTS = frozenset(
    """
    mmdet MaskRCNN CascadeRCNN FasterRCNN DetDataPreprocessor VisionBackbone SwinVisformer FPN
    RPNHead AnchorGenerator DeltaXYWHBBoxCoder StandardRoIHead CascadeRoIHead SingleRoIExtractor
    RoIAlign Shared2FCBBoxHead Shared4Conv1FCBBoxHead ConvFCBBoxHead FCNMaskHead BN SyncBN GN
    CrossEntropyLoss L1Loss SmoothL1Loss GIoULoss MaxIoUAssigner RandomSampler nms soft_nms
    LoadImageFromFile LoadAnnotations Resize Pad PackDetInputs
    """.split()  # noqa: SIM905
)
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


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a checkpoint of mmengine, or any that :func:`models.read_checkpoint` accepts.

    Args:
        path: File or http(s) address.

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


def load_from_plain_values(filename: str, map_location: Any = None) -> dict[str, Any]:
    """Call :func:`read` as a loader of mmengine, which logs the end of this name.

    Tensors are on the CPU for any ``map_location``; mmengine copies them from there.
    """
    return read(filename)


def install_loader() -> None:
    """Make mmengine read local files and addresses by :func:`read`."""
    from mmengine.runner import CheckpointLoader

    schemes = ["", "http://", "https://"]
    CheckpointLoader.register_scheme(schemes, load_from_plain_values, force=True)


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
        raise CheckpointError(f"{source} does not fit the config's model: {'; '.join(differences)}")
    if all(k in unfit or k.endswith(COUNTER) for k in own if k.startswith("backbone.")):
        raise CheckpointError(
            f"{source} has nothing that fits the detector's backbone; weights of a classifier go "
            f"to model.backbone.init_cfg"
        )


def load(model: nn.Module, checkpoint: Mapping[str, Any], source: str) -> None:
    """Load all weights of a detector.

    Raises:
        CheckpointError: Keys or shapes differ from the model's.
    """
    check_fit(model, checkpoint, source)
    model.load_state_dict(_weights(model, checkpoint), strict=False)  # counters may be missing


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


def test_pipeline(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the steps from an image to the detector: those of testing, else of validation.

    Raises:
        UserError: The config has neither.
    """
    for split in ("test", "val"):
        dataset = (config.get(f"{split}_dataloader") or {}).get("dataset") or {}
        while "pipeline" not in dataset and (
            inner := dataset.get("dataset", dataset.get("datasets"))
        ):
            dataset = inner[0] if isinstance(inner, list) else inner
        if "pipeline" in dataset:
            return dataset["pipeline"]
    raise UserError("the config has no test_dataloader whose pipeline would read an image")


def read_config_of(checkpoint: Mapping[str, Any], source: str) -> dict[str, Any] | None:
    """Return model and test pipeline of the config in a checkpoint, None without one.

    Raises:
        CheckpointError: It is more than assignments of plain values, or has other parts than this
            repository's detectors.
    """
    text = checkpoint.get("meta", {}).get("cfg")
    if not isinstance(text, str):
        return None
    try:
        config = {
            target.id: _literal(statement.value)
            for statement in ast.parse(text).body
            for target in statement.targets
        }
    except (SyntaxError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{source} contains a config with more than plain values: give --config"
        ) from error
    try:
        config["model"]["backbone"].pop("init_cfg", None)
        used = {
            "model": config["model"],
            "test_dataloader": {"dataset": {"pipeline": test_pipeline(config)}},
        }
    except (KeyError, TypeError, AttributeError, UserError):
        raise CheckpointError(
            f"{source} contains a config without model or test_dataloader: give --config"
        ) from None
    strange = sorted(set(_strange(used)))
    if strange:
        raise CheckpointError(
            f"{source} contains a config with {', '.join(strange[:SHOWN])}, which a checkpoint "
            f"may not have: give --config"
        )
    return used


def _literal(node: ast.expr) -> Any:
    """Evaluate an expression of literals, lists, tuples, dicts and ``dict(...)``."""
    if isinstance(node, ast.Call) and getattr(node.func, "id", None) == "dict":
        parts = [_literal(part) for part in node.args]  # a dict literal, for keys with dots
        keywords = {keyword.arg: _literal(keyword.value) for keyword in node.keywords}
        return {**dict(*parts), **keywords}
    if isinstance(node, ast.Dict):
        keys = map(ast.literal_eval, node.keys)
        return dict(zip(keys, map(_literal, node.values), strict=True))
    if isinstance(node, ast.List):
        return [_literal(element) for element in node.elts]
    if isinstance(node, ast.Tuple):
        return tuple(_literal(element) for element in node.elts)
    return ast.literal_eval(node)


def _strange(value: Any) -> Iterator[str]:
    """Yield the types of a config that are not in PARTS, and arguments that name further files.

    mmengine imports and calls a type by its dotted path, and mmcv evaluates the name of its NMS.
    """
    if isinstance(value, dict):
        for key, part in value.items():
            if key in ("type", "_scope_") and str(part) not in PARTS:
                yield f"{key} {part}"
            elif str(key).startswith(("pretrained", "checkpoint")):
                yield f"argument {key}"
        value = list(value.values())
    if isinstance(value, list | tuple):
        for element in value:
            yield from _strange(element)
