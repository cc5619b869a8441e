"""Read checkpoint files and addresses, whatever their format, without running what they hold."""

import argparse
import errno
import hashlib
import json
import os
import re
import shutil
import stat
import tempfile
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import safetensors
import torch

from models.checkpoint.archive import safe_names, verify_archive
from models.checkpoint.checksum import file_digest, verify_checksum
from models.checkpoint.mindspore import looks_like_mindspore, read_mindspore
from models.checkpoint.numpy_scalars import DTYPE, NUMBER_GLOBALS
from models.errors import CheckpointError, UnreadableFileError, UnsafeFileError

JSON_METADATA = {
    "model_kwargs",
    "classes",
    "input_size",
    "data_config",
    "args",
}  # of a header with the first
# errors that what a file holds may cause, as offsets beyond its end; all others are of the system
ABOUT_CONTENT = (None, errno.EINVAL, errno.EOVERFLOW, errno.EFBIG, errno.ENOENT, errno.EISDIR)
OUT_OF_MEMORY = "DefaultCPUAllocator"  # in PyTorch's message
MAX_HEADER = 1 << 23  # bytes of safetensors, some 70 per tensor
TIMEOUT = 60.0  # seconds without a byte
CHUNK = 1 << 20  # bytes
START_BYTES = 256  # enough to tell the formats apart


def fetch(url: str) -> Path:
    """Download a checkpoint into torch.hub's folder, once.

    A name such as ``visformer_small-839e1f5b.pth`` holds the first digits of the file's
    SHA-256, which are verified; a copy that fails is fetched again. A name without digits, such
    as ``best.pth``, is that of many files: the copy's begins with a hash of the address.

    Raises:
        CheckpointError: The address names no file, or downloading or the digits fail.
    """
    try:
        return _fetch(url)
    except CheckpointError:
        raise
    except Exception as error:  # addresses and servers of any kind raise errors of any kind
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(f"cannot download {url}: {reason}") from error


def _fetch(url: str) -> Path:
    name = Path(urlparse(url).path).name
    if name in ("", ".."):
        raise CheckpointError(f"cannot download {url}: it names no file")
    digits = re.search(r"-([0-9a-f]{8,})\.", name)
    if not digits:
        name = f"{hashlib.sha256(url.encode('utf-8', 'surrogatepass')).hexdigest()[:16]}-{name}"
    path = Path(torch.hub.get_dir(), "checkpoints", name)
    if path.is_file() and (not digits or _digest(path).startswith(digits[1])):
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    _download(url, path, digits and digits[1])
    return path


def _download(url: str, path: Path, digits: str | None) -> None:
    """Write a file that is complete, and leaves a tenth of the disk's free space.

    Raises:
        OSError, ValueError, http.client.HTTPException: It cannot be had so.
    """
    room = shutil.disk_usage(path.parent).free // 10 * 9
    digest, received = hashlib.sha256(), 0
    with (
        urllib.request.urlopen(url, timeout=TIMEOUT) as response,
        tempfile.TemporaryDirectory(dir=path.parent) as folder,
        open(Path(folder, "part"), "wb") as file,
    ):
        size = getattr(response, "length", None)
        while (size or 0) <= room >= received and (chunk := response.read1(CHUNK)):
            received += len(chunk)
            digest.update(chunk)
            file.write(chunk)
        if max(size or 0, received) > room:
            raise ValueError(f"it has more than the {room} bytes that the disk has room for")
        if size not in (None, received):
            raise ValueError(f"the connection ended after {received} of {size} bytes")
        if not digest.hexdigest().startswith(digits or ""):
            raise ValueError(f"its SHA-256 is {digest.hexdigest()}, not {digits}...")
        file.flush()
        os.replace(file.name, path)


def _digest(path: Path) -> str:
    with path.open("rb", buffering=0) as file:
        return file_digest(file, path.stat().st_size).hexdigest()


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint file onto the CPU without executing anything that it holds.

    Formats: PyTorch files of tensors and plain values, with an ``argparse.Namespace`` as in
    DeiT's and Visformer's files, and NumPy's scalars, which become Python's; safetensors;
    MindSpore's ``.ckpt`` of MindCV's models. The content decides, not the name. The checksum is
    verified first, if the file has one.

    Args:
        path: File, or http(s) address of one.

    Raises:
        UnsafeFileError: The file is a pickle or archive that asks for more than plain values.
        CheckpointError: The file is missing, damaged or of another kind.
    """
    path = fetch(str(path)) if str(path).startswith(("http://", "https://")) else Path(path)
    try:
        content = _read(path)
    except UnsafeFileError as error:
        raise UnsafeFileError(f"{path} {error}") from error
    except CheckpointError:
        raise
    except OSError as error:
        kind = CheckpointError if error.errno in ABOUT_CONTENT else UnreadableFileError
        raise kind(f"cannot read checkpoint {path}: {error.strerror or error}") from error
    except MemoryError as error:
        raise UnreadableFileError(f"cannot read checkpoint {path}: out of memory") from error
    except Exception as error:  # bytes of any kind make the readers raise errors of any kind
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        if OUT_OF_MEMORY in str(error):
            raise UnreadableFileError(f"cannot read checkpoint {path}: {reason}") from error
        raise CheckpointError(f"{path} is not a checkpoint, or is damaged: {reason}") from error
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not a checkpoint")
    return dict(content)


def _read(path: Path) -> Any:
    """The content of a file, in whatever format."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):  # reading a pipe would block
        raise CheckpointError(f"cannot read checkpoint {path}: not a regular file")
    verify_checksum(path)
    with path.open("rb") as file:
        start = file.read(START_BYTES)
    if not start:
        raise CheckpointError(f"{path} is empty, not a checkpoint")
    if start[8:9] == b"{":
        if (length := int.from_bytes(start[:8], "little")) > MAX_HEADER:
            raise ValueError(
                f"its header has {length} bytes, of which at most {MAX_HEADER} are read"
            )
        return _read_safetensors(path)
    if looks_like_mindspore(start, status.st_size):
        return _read_mindspore(path)
    numbers = [] if DTYPE in safe_names() else NUMBER_GLOBALS  # the caller may allow NumPy's own
    with torch.serialization.safe_globals([argparse.Namespace, *numbers]):
        verify_archive(path)
        return torch.load(path, map_location="cpu", weights_only=True)


def _read_safetensors(path: Path) -> dict[str, Any]:
    """The tensors under ``state_dict``, and the texts of the header, JSON where it is ours."""
    with safetensors.safe_open(path, "pt") as file:
        content: dict[str, Any] = dict(file.metadata() or {})
        for key in JSON_METADATA & content.keys() if "model_kwargs" in content else ():
            content[key] = json.loads(content[key])
        content["state_dict"] = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    return content


def _read_mindspore(path: Path) -> dict[str, Any]:
    """The parameters under ``mindspore``, and what MindCV's networks compute with them."""
    state = read_mindspore(path)
    content: dict[str, Any] = {"mindspore": state, "gelu": "tanh"}
    if any(name.endswith("patch_embed0.proj.weight") for name in state):
        content["qk_scale_factor"] = -0.5  # VisformerV2
    return content
