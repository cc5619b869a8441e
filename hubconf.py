"""Entrypoints of ``torch.hub``: every model of this repository under its registered name.

``torch.hub.list``, ``torch.hub.help`` and ``torch.hub.load`` accept the repository's name,
``torch.hub.load`` with ``source="local"`` also the folder of this file.
"""

import sys as _sys
from collections.abc import Callable as _Callable
from collections.abc import Iterator as _Iterator
from contextlib import contextmanager as _contextmanager
from pathlib import Path as _Path

import timm as _timm
from torch import nn as _nn

dependencies = ["torch", "timm", "safetensors"]

_own: dict[str, object] = {}  # modules of this repository's package, if another has its name


def _packages() -> dict[str, object]:
    names = [name for name in _sys.modules if name == "models" or name.startswith("models.")]
    return {name: _sys.modules[name] for name in names}


@_contextmanager
def _models() -> _Iterator[None]:
    """Make ``models`` this repository's package, and restore another of that name afterwards."""
    others = _packages()
    file = getattr(others.get("models"), "__file__", None)
    if file and _Path(file).resolve().parent == _Path(__file__).resolve().parent / "models":
        yield
        return
    for name in others:
        del _sys.modules[name]
    _sys.modules.update(_own)
    try:
        yield
    finally:
        _own.update(_packages())
        if others:
            for name in _own:
                _sys.modules.pop(name, None)
            _sys.modules.update(others)


def _entrypoint(build: _Callable[..., _nn.Module]) -> _Callable[..., _nn.Module]:
    def create(
        pretrained: bool = False, checkpoint: str | None = None, **kwargs: object
    ) -> _nn.Module:
        with _models():
            from models import load_model, pretrained_config
            from models.hub import check_pretrained

            if checkpoint is None:
                given = kwargs.keys() & {"pretrained_cfg", "pretrained_cfg_overlay"}
                if pretrained and not given:
                    check_pretrained(pretrained_config(build.__name__), build.__name__)
                return build(pretrained=pretrained, **kwargs)
            if pretrained or kwargs.get("features_only"):
                other = "pretrained" if pretrained else "features_only"
                raise ValueError(
                    f"checkpoint {checkpoint} excludes {other}=True: leave one of them out"
                )
            return load_model(checkpoint, build.__name__, pretrained=True, **kwargs).model.train()

    create.__name__ = create.__qualname__ = build.__name__
    create.__doc__ = f"""{build.__doc__}

    Args:
        pretrained: Load timm's weights of this name.
        checkpoint: Weights to load, from any source of ``models.load_model``: a file, an http(s)
            address, ``hf-hub:ORG/NAME`` or ``local-dir:FOLDER``. Excludes pretrained and
            features_only.
        kwargs: Arguments of the model, such as num_classes, img_size, drop_path_rate,
            features_only.

    Returns:
        The model in training mode: images ``B 3 H W`` to logits ``B num_classes``, or with
        features_only to a list of feature maps.

    Raises:
        ValueError: checkpoint is given with pretrained or features_only.
    """
    return create


def _entrypoints() -> dict[str, _Callable[..., _nn.Module]]:
    found = {}
    with _models():
        import models  # noqa: F401 registers them

        for name in _timm.list_models():
            build = _timm.models.model_entrypoint(name)
            if vars(_packages().get(build.__module__, _sys)).get(name) is build:
                found[name] = _entrypoint(build)
    return found


globals().update(_entrypoints())
