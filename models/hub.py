"""Models on the Hugging Face Hub, and folders of the Hub's layout that timm reads and writes.

Such a folder has a ``config.json`` (architecture, arguments, preprocessing, class names) and the
weights next to it. Both are read as plain values.
"""

import http.client
import json
import os
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from timm.models import PretrainedCfg

from .checkpoint.read import read_checkpoint
from .errors import CheckpointError, ModelError

HUB, FOLDER = "hf-hub:", "local-dir:"  # timm's prefixes
CONFIG = "config.json"
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
MAX_CONFIG = 1 << 24  # bytes
IMAGES = ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")
CONNECT_SECONDS = 10


def read_hub(source: str) -> dict[str, Any]:
    """Read a model of the Hub, or a folder of its layout, as the content of a checkpoint.

    Args:
        source: ``hf-hub:ORG/NAME``, with ``@REVISION`` if wanted, ``local-dir:FOLDER`` or a folder.

    Returns:
        ``model_name``, ``model_kwargs``, ``classes``, ``data_config``, ``license`` and
        ``state_dict``.

    Raises:
        CheckpointError: A file is missing, cannot be read or downloaded, or is not one of timm's.
    """
    if source.startswith(HUB):
        name = source.removeprefix(HUB)
        config, weights = _download(name, (CONFIG,)), _download(name, WEIGHTS)
    else:
        folder = Path(source.removeprefix(FOLDER))
        config, weights = folder / CONFIG, _first_file(folder)
    return _content(config) | {"state_dict": _state(weights)}


def _first_file(folder: Path) -> Path:
    if not (folder / CONFIG).is_file():
        runs = [name for name in ("best.pth", "checkpoint.pth") if (folder / name).is_file()]
        hint = f"; give one of its files, such as {folder / runs[0]}" if runs else ""
        raise CheckpointError(f"folder {folder} has no {CONFIG}{hint}")
    for name in WEIGHTS:
        if (folder / name).is_file():
            return folder / name
    raise CheckpointError(f"folder {folder} has no weights: {' or '.join(WEIGHTS)}")


def _download(name: str, files: tuple[str, ...]) -> Path:
    """Return the path of the first of these files that the Hub has."""
    import huggingface_hub as hub  # takes 0.2 s

    repository, _, revision = name.partition("@")
    where = f"{HUB}{name}"
    check_cached_or_reachable(repository, files, where)
    for file in files:
        try:
            return Path(hub.hf_hub_download(repository, file, revision=revision or None))
        except hub.errors.RemoteEntryNotFoundError:
            continue
        except Exception as error:  # downloads raise errors of any type
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise CheckpointError(f"cannot get {file} of {where}: {reason}") from error
    raise CheckpointError(f"{where} has no {' or '.join(files)}")


def check_cached_or_reachable(repository: str, files: tuple[str, ...], source: str) -> None:
    """Raise CheckpointError without the 25 seconds of retries, if there is no network.

    Args:
        repository: ``ORG/NAME`` on the Hub.
        files: Names, any of which is enough.
        source: Name of the model in the message.
    """
    import huggingface_hub as hub

    try:
        found = [hub.try_to_load_from_cache(repository, file) for file in files]
    except ValueError as error:  # of the name
        raise CheckpointError(f"{source}: {error}") from error
    if any(isinstance(path, str) for path in found):
        return
    endpoint = hub.constants.ENDPOINT
    check_reachable(endpoint, f"{source} ({endpoint}/{repository}, {' or '.join(files)})")


def check_reachable(address: str, source: str) -> None:
    """Raise CheckpointError if no server answers at ``address`` within some seconds."""
    request = urllib.request.Request(address, method="HEAD")
    try:
        urllib.request.urlopen(request, timeout=CONNECT_SECONDS).close()
    except urllib.error.HTTPError:
        return  # it answers
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise CheckpointError(f"cannot download {source}: {reason}") from error


def check_pretrained(config: PretrainedCfg | None, name: str) -> None:
    """Raise ModelError if timm has no weights of a model, or cannot get them now.

    Args:
        config: timm's description of the weights.
        name: Name of the model, for messages.
    """
    if config is None or not config.has_weights:
        raise ModelError(f"there are no published weights of {name}")
    source = f"weights of {name}"
    if config.file or config.state_dict:
        return
    if config.hf_hub_id:
        files = (config.hf_hub_filename,) if config.hf_hub_filename else WEIGHTS
        check_cached_or_reachable(config.hf_hub_id.partition("@")[0], files, source)
    elif not Path(torch.hub.get_dir(), "checkpoints", os.path.basename(config.url)).is_file():
        check_reachable(config.url, f"{source} ({config.url})")


def _content(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > MAX_CONFIG:
            raise CheckpointError(f"{path} has more than {MAX_CONFIG} bytes")
        config = json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    own = config if isinstance(config, Mapping) else {}
    images = own.get("pretrained_cfg", own)  # older configs have one level
    name = own.get("architecture", images.get("architecture") if images is own else None)
    if not isinstance(name, str) or not isinstance(images, Mapping):
        raise CheckpointError(f"{path} does not name timm's architecture: it is not timm's config")
    content = {"model_name": name, "model_kwargs": own.get("model_args") or {}}
    # what is missing has timm's default, not that of the architecture's own weights
    content["data_config"] = {
        key: getattr(PretrainedCfg, key) if images.get(key) is None else images[key]
        for key in IMAGES
    }
    if not isinstance(content["model_kwargs"], Mapping):
        raise CheckpointError(f"{path}: model_args must be an object")
    number = own.get("num_classes", images.get("num_classes"))
    if number is not None:
        content["model_kwargs"] = {**content["model_kwargs"], "num_classes": number}
    names = own.get("label_names", images.get("label_names", images.get("labels")))
    if isinstance(names, Mapping):  # by the number of the output
        names = [names.get(str(i)) for i in range(len(names))]
    if "exif" in own:
        content["data_config"]["exif"] = own["exif"]
    if "gelu" in own:
        content["gelu"] = own["gelu"]
    if isinstance(license_ := images.get("license"), str):
        content["license"] = license_
    return content | ({"classes": names} if names else {})


def _state(path: Path) -> dict[str, Any]:
    content = read_checkpoint(path)
    return content.get("state_dict", content)
