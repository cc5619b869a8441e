"""Read checkpoint files and addresses, whatever their format, without running what they hold."""

import argparse
import errno
import glob
import hashlib
import json
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import safetensors
import torch

from ..errors import CheckpointError, UnreadableFileError, UnsafeFileError
from .address import open_address
from .archive import safe_names, verify_archive
from .checksum import file_digest, verify_checksum
from .mindspore import looks_like_mindspore, read_mindspore
from .numpy_scalars import DTYPE, NUMBER_GLOBALS

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
CHUNK = 1 << 20  # bytes
DIGITS = re.compile(r"-([0-9a-f]{8,})\.")  # of a file's SHA-256, in its name
START_BYTES = 256  # enough to tell the formats apart


def fetch(url: str) -> Path:
    """Download a checkpoint into torch.hub's folder, once.

    A name such as ``visformer_small-839e1f5b.pth`` holds the first digits of the file's
    SHA-256, which are verified; a copy that fails is fetched again. A name without digits, such
    as ``best.pth``, is that of many files: the copy's begins with a hash of the address and
    the digits of what was fetched, which are verified in the same way.

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
    folder, digits = Path(torch.hub.get_dir(), "checkpoints"), DIGITS.search(name)
    if digits:
        copies = {folder / name: digits[1]}
    else:
        address = hashlib.sha256(url.encode("utf-8", "surrogatepass")).hexdigest()[:16]
        name = f"{address}-{{digits}}-{name[-150:]}"
        found = folder.glob(glob.escape(name).replace("{digits}", "*"))
        copies = {path: path.name[len(address) + 1 :][:16] for path in found}
    for path, known in copies.items():
        if path.is_file() and _digest(path).startswith(known):
            return path
    folder.mkdir(parents=True, exist_ok=True)
    return _download(url, folder, name, digits and digits[1])


def _download(url: str, folder: Path, name: str, digits: str | None) -> Path:
    """Write a file that is complete, and leaves a tenth of the disk's free space.

    Without ``digits``, its name holds ``{digits}`` for the first ones of its SHA-256.

    Raises:
        OSError, ValueError, http.client.HTTPException: It cannot be had so.
    """
    room = shutil.disk_usage(folder).free // 10 * 9
    digest, received = hashlib.sha256(), 0
    with (
        open_address(url) as response,
        tempfile.TemporaryDirectory(dir=folder) as temporary,
        open(Path(temporary, "part"), "wb") as file,
    ):
        if response.status != 200:
            raise ValueError(f"the server answers with {response.status}, not with the file")
        size = response.length
        while (size or 0) <= room >= received and (chunk := response.read1(CHUNK)):
            received += len(chunk)
            digest.update(chunk)
            file.write(chunk)
        if max(size or 0, received) > room:
            raise ValueError(f"it has more than the {room} bytes that the disk has room for")
        if size not in (None, received):
            raise ValueError(f"the connection ended after {received} of {size} bytes")
        if not received:
            raise ValueError("the server sends an empty file")
        if not digest.hexdigest().startswith(digits or ""):
            raise ValueError(f"its SHA-256 is {digest.hexdigest()}, not {digits}...")
        file.flush()
        path = folder / (name if digits else name.replace("{digits}", digest.hexdigest()[:16]))
        os.replace(file.name, path)
    return path


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
