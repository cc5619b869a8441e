"""Remote files, each fetched once per machine, and whole in its cache or not there."""

import contextlib
import fcntl
import hashlib
import http.client
import io
import os
import re
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from pipeline.images import DataError

PIPE = "pipe:"
REMOTE = ("http://", "https://", PIPE)
CHUNK = 2**20  # bytes
TIMEOUT = 60.0  # seconds without a byte
LONGEST_PAUSE = 30.0  # seconds
NOT_THERE = (403, 404, 410)  # 403: a bucket that must not be listed says so of what it lacks
PASSING = (408, 425, 429)  # statuses that may be others at the next try, as all from 500 on
PART = ".part"
OURS = re.compile(r"[0-9a-f]{32}-")  # how the names of files in a cache begin


def shown(url: str) -> str:
    """A URL as messages show it: without its query, which may hold a secret."""
    return url if url.startswith(PIPE) else url.partition("?")[0]


class NotThereError(DataError):
    """The server says that it has no such file."""


class _BrokenError(Exception):
    """A transfer failed in a way that another try may mend."""


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keep other processes of this machine out of the block; the file ``path`` stays.

    The system lets go of the lock when the process ends, however it ends.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def default_folder(url: str) -> Path:
    """This user's folder for what lies beside ``url``, among the temporary files.

    Raises:
        DataError: It belongs to somebody else.
    """
    mine = Path(tempfile.gettempdir(), f"shards-{os.getuid()}")
    with contextlib.suppress(FileExistsError):
        mine.mkdir(mode=0o700)
    if mine.is_symlink() or mine.lstat().st_uid != os.getuid():
        raise DataError(f"{mine} belongs to somebody else: name a folder (--shard-cache)")
    return mine / hashlib.sha256(shown(url).rpartition("/")[0].encode()).hexdigest()[:16]


@dataclass
class _Download:
    """What has come of a file so far.

    Attributes:
        url: Of the file.
        file: Where it goes.
        reserve: Called with its size once that is known.
        have: Bytes.
        digest: SHA-256 of them.
        tag: The server's name for this version of the file, if it gives one.
    """

    url: str
    file: BinaryIO
    reserve: Callable[[int], None]
    have: int = 0
    digest: Any = field(default_factory=hashlib.sha256)
    tag: str | None = None

    def start_over(self) -> None:
        self.have, self.digest = 0, hashlib.sha256()
        self.file.seek(0)

    def write(self, data: bytes) -> None:
        self.file.write(data)
        self.digest.update(data)
        self.have += len(data)


@dataclass(frozen=True)
class Cache:
    """Remote files in a folder of this machine, shared by its processes.

    A file is fetched by one process while the others that want it wait, to a temporary name, and
    gets its own when it is whole and proven. Transfers by HTTP that break go on where they
    broke, or from the start where the server cannot do that, with a warning.

    With ``max_bytes``, the files whose opening is longest ago make room for new ones, but never
    one that a process has open: what is in use may exceed the bound, with a warning, and so may
    a file of unknown size until it is whole.

    Args:
        folder: Where files are kept; made if it is not there.
        max_bytes: Of all files together.
        tries: Of a transfer.
        pause: Seconds before the second try, doubled before each further one.
    """

    folder: Path
    max_bytes: int | None = None
    tries: int = 6
    pause: float = 1.0

    def open(
        self,
        url: str,
        size: int | None = None,
        sha256: str | None = None,
        prove: Callable[[BinaryIO], object] = lambda file: None,
    ) -> int:
        """A descriptor of the file at ``url``, which is fetched if it is not here.

        While it is open, the file is not removed to make room.

        Args:
            url: Of the file: ``http``, ``https``, or ``pipe:`` and a command that prints it.
            size: Bytes that it must have.
            sha256: Digest that it must have; a file of another one is another file.
            prove: Called with the file before it counts as whole; raises unless it is good.

        Raises:
            NotThereError: The server has no such file.
            DataError: It cannot be fetched or kept, or is not what it must be; names it.
        """
        path = self.folder / _file_name(url, sha256)
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            while True:
                descriptor = _open_whole(path, size)
                if descriptor is not None:
                    return descriptor
                with locked(Path(f"{path}.lock")):
                    if not _is_whole(path, size):
                        self._fetch(url, path, size, sha256, prove)
        except OSError as error:
            raise DataError(
                f"cannot keep {shown(url)} in {self.folder}: {error.strerror}"
            ) from error

    def fetch(self, url: str) -> bytes:
        """A small file, as it is now and not kept.

        Raises:
            NotThereError: The server has no such file.
            DataError: It cannot be fetched; names it.
        """
        download = _Download(url, io.BytesIO(), lambda size: None)
        receive(download, None, self.tries, self.pause)
        return download.file.getvalue()[: download.have]

    def _fetch(
        self,
        url: str,
        path: Path,
        size: int | None,
        sha256: str | None,
        prove: Callable[[BinaryIO], object],
    ) -> None:
        part = Path(f"{path}{PART}")
        with locked(self.folder / ".lock"):  # nobody may take it for a remnant meanwhile
            file = open(part, "w+b")  # noqa: SIM115, it outlives this block
            fcntl.flock(file, fcntl.LOCK_EX)
        try:
            with file:
                download = _Download(url, file, lambda size: self._make_room(size, file))
                if size is not None:
                    download.reserve(size)
                receive(download, size, self.tries, self.pause)
                file.truncate(download.have)
                if sha256 not in (None, download.digest.hexdigest()):
                    raise DataError(
                        f"{shown(url)} does not match its index: its SHA-256 is another"
                    )
                file.seek(0)
                prove(file)
                os.fsync(file.fileno())
                os.replace(part, path)
                self._make_room(0, file)  # where the size was not known before
        finally:
            part.unlink(missing_ok=True)

    def _make_room(self, size: int, file: BinaryIO) -> None:
        """Let ``file`` have ``size`` bytes, removing what has not been opened for longest."""
        if self.max_bytes is None:
            return
        with locked(self.folder / ".lock"):
            if os.fstat(file.fileno()).st_size < size:
                file.truncate(size)
            files = _files_by_age(self.folder)
            total = sum(size for _, size in files)
            for path, size in files:
                if total > self.max_bytes and _remove_unused(path):
                    total -= size
            if total > self.max_bytes:
                warnings.warn(
                    f"{self.folder} holds {total:,} bytes, more than the bound of"
                    f" {self.max_bytes:,}, as all of them are in use",
                    stacklevel=2,
                )


def _file_name(url: str, sha256: str | None) -> str:
    """A name of its own for each file: of its content where that is known, or of its URL."""
    last = re.sub(r"[^\w.-]+", "_", shown(url).rpartition("/")[2])[-60:]
    return f"{sha256 or hashlib.sha256(url.encode()).hexdigest()}"[:32] + f"-{last}"


def _files_by_age(folder: Path) -> list[tuple[str, int]]:
    """Path and bytes of each file of a cache, the one opened longest ago first."""
    files = []
    for entry in os.scandir(folder):
        if not OURS.match(entry.name):  # the folder may have other uses
            continue
        with contextlib.suppress(FileNotFoundError):  # it has got its name, or was given up
            status = entry.stat()
            files.append((status.st_mtime_ns, entry.path, status.st_size))
    return [(path, size) for _, path, size in sorted(files) if size]


def _is_whole(path: Path, size: int | None) -> bool:
    try:
        return size in (None, path.stat().st_size)
    except FileNotFoundError:
        return False


def _open_whole(path: Path, size: int | None) -> int | None:
    """A descriptor of a file that is there, in use from now on."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    status = os.fstat(descriptor)
    if status.st_nlink and size in (None, status.st_size):  # else it was removed meanwhile
        os.utime(descriptor, ns=(time.time_ns(),) * 2)  # finer than the system's own times
        return descriptor
    os.close(descriptor)
    return None


def _remove_unused(path: str) -> bool:
    """Remove a file unless a process uses it; whether it did."""
    with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        os.unlink(path)
        return True
    return False


def receive(download: _Download, size: int | None, tries: int, pause: float) -> None:
    """Fetch a file, by several tries if need be.

    Raises:
        NotThereError: The server has no such file.
        DataError: It could not be had, or has not ``size`` bytes.
    """
    name = shown(download.url)
    if download.url.startswith(PIPE):
        _run(download)
    else:
        for number in range(1, tries + 1):
            try:
                _continue(download, size)
                break
            except _BrokenError as error:
                reason = f"{name}: {error} after {download.have:,} bytes (try {number} of {tries})"
                if number == tries:
                    raise DataError(f"cannot fetch {reason}") from error
            warnings.warn(f"{reason}; trying again", stacklevel=2)
            time.sleep(min(pause * 2 ** (number - 1), LONGEST_PAUSE))
    if size not in (None, download.have):
        raise _wrong_size(download.url, download.have, size)


def _wrong_size(url: str, size: int, wanted: int) -> DataError:
    return DataError(
        f"{shown(url)} does not match its index: it has {size:,} bytes, not {wanted:,}"
    )


def _continue(download: _Download, size: int | None) -> None:
    """One try to fetch what is missing of a file."""
    with _ask(download) as response:
        whole = _size_of(response, download)
        if size is not None and whole not in (None, size):
            raise _wrong_size(download.url, whole, size)
        if whole is not None:
            download.reserve(whole)
        while chunk := _read(response):
            download.write(chunk)
    if whole is not None and download.have < whole:
        raise _BrokenError(f"the connection ended before {whole:,} bytes")


def _ask(download: _Download) -> http.client.HTTPResponse:
    """The server's answer to a request for what is missing of a file."""
    headers = {"Accept-Encoding": "identity"}
    if download.have:
        headers["Range"] = f"bytes={download.have}-"
        if download.tag:
            headers["If-Range"] = download.tag
    try:
        request = urllib.request.Request(download.url, headers=headers)
        return urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        error.close()
        reason = f"the server says {error.code} {error.reason}"
        if error.code in NOT_THERE:
            raise NotThereError(f"cannot fetch {shown(download.url)}: {reason}") from error
        if error.code == 416:  # it has less than what is here: another file by now
            download.start_over()
        elif error.code < 500 and error.code not in PASSING:
            raise DataError(f"cannot fetch {shown(download.url)}: {reason}") from error
        raise _BrokenError(reason) from error
    except (ValueError, http.client.InvalidURL) as error:
        raise DataError(f"cannot fetch {shown(download.url)}: {error}") from error
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        raise _BrokenError(str(reason) or type(error).__name__) from error


def _read(response: http.client.HTTPResponse) -> bytes:
    try:
        return response.read(CHUNK)
    except (OSError, http.client.HTTPException) as error:
        raise _BrokenError(str(error) or type(error).__name__) from error


def _size_of(response: http.client.HTTPResponse, download: _Download) -> int | None:
    """Bytes of the whole file, if the server says them; starts over unless this is the rest."""
    found = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
    if response.status != 206 or not found or int(found[1]) != download.have:
        if response.status == 206:
            raise _BrokenError("the server sent another part than was asked for")
        download.start_over()
    tag = response.headers.get("ETag")
    download.tag = tag if tag and not tag.startswith("W/") else None
    length = response.headers.get("Content-Length")
    return None if length is None else download.have + int(length)


def _run(download: _Download) -> None:
    """Take what the command of a ``pipe:`` prints.

    Raises:
        DataError: It ends with another status than 0; shows what it said.
    """
    command = download.url.removeprefix(PIPE)
    with tempfile.TemporaryFile() as errors:
        options = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": errors}
        with subprocess.Popen(command, shell=True, **options) as process:
            while chunk := process.stdout.read(CHUNK):
                download.write(chunk)
        if process.returncode:
            errors.seek(max(0, errors.seek(0, os.SEEK_END) - 500))
            said = " ".join(errors.read().decode(errors="replace").split())
            raise DataError(f"{download.url} ended with status {process.returncode}: {said}")
