"""Remote files: each is fetched once per machine, and is complete in its cache or absent.

Not fsspec's file cache: it neither resumes a broken transfer where it stopped nor lets the
processes of a machine wait for one another, and reads HTTP only with aiohttp installed.
"""

import contextlib
import fcntl
import hashlib
import http.client
import io
import os
import re
import shutil
import subprocess
import tempfile
import time
import urllib.error
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from models.checkpoint.address import open_address

from ..images import DataError

PIPE = "pipe:"
REMOTE = ("http://", "https://", PIPE)
CHUNK = 2**20  # bytes
LONGEST_PAUSE = 30.0  # seconds
MISSING = (403, 404, 410)  # a bucket that must not be listed answers 403 for what it lacks
TEMPORARY = (408, 425, 429)  # may change with the next try, like all statuses from 500 on


class MissingFileError(DataError):
    """The server does not have the file."""


class _TransferError(Exception):
    """A transfer failed; another try may succeed."""


def without_query(url: str) -> str:
    """Return a URL for messages: its query may hold a secret. Commands stay as they are."""
    return url if url.startswith(PIPE) else url.partition("?")[0]


def check_size(name: str, found: int, size: int | None) -> None:
    """Raise a DataError unless the file ``name`` has the expected size in bytes, if any."""
    if size not in (None, found):
        raise DataError(f"{name} does not match its index: it has {found:,} bytes, not {size:,}")


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keep other processes of this machine out of the block; the file ``path`` stays.

    The system releases the lock when the process ends, however it ends.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def default_folder(url: str) -> Path:
    """Return this user's temporary folder for the files in the remote folder of ``url``.

    Raises:
        DataError: It belongs to another user.
    """
    mine = Path(tempfile.gettempdir(), f"shards-{os.getuid()}")
    with contextlib.suppress(FileExistsError):
        mine.mkdir(mode=0o700)
    if mine.is_symlink() or mine.lstat().st_uid != os.getuid():
        raise DataError(f"{mine} belongs to another user: name a folder (--shard-cache)")
    folder = without_query(url).rpartition("/")[0]
    return mine / hashlib.sha256(folder.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Cache:
    """Remote files in a folder of this machine, shared by its processes.

    One process fetches a file while the others that need it wait. It gets its own name once it
    is complete and verified. HTTP transfers that break resume where they stopped, or restart
    where the server does not support that, with a warning.

    Args:
        folder: Folder of the files; made if necessary.
        tries: Attempts to fetch a file.
        pause: Seconds before the second try, doubled before each further one.
    """

    folder: Path
    tries: int = 6
    pause: float = 1.0

    def open(
        self,
        url: str,
        size: int | None = None,
        sha256: str | None = None,
        verify: Callable[[BinaryIO], object] | None = None,
    ) -> int:
        """Return a descriptor of the file at ``url``, fetching it if necessary.

        Args:
            url: ``http:``, ``https:``, or ``pipe:`` and a command that prints the file.
            size: Expected size in bytes.
            sha256: Expected digest; files of different digests are different files.
            verify: Called with the complete file; raises an error if it is not valid.

        Raises:
            DataError: The file cannot be fetched or kept, or is not as expected; names it.
        """
        last = re.sub(r"[^\w.-]+", "_", without_query(url).rpartition("/")[2])[-60:]
        path = self.folder / f"{(sha256 or hashlib.sha256(url.encode()).hexdigest())[:32]}-{last}"
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not _is_complete(path, size):
                with locked(Path(f"{path}.lock")):
                    if not _is_complete(path, size):  # else another process has fetched it
                        free = shutil.disk_usage(self.folder).free // 10 * 9
                        self._fetch(_Transfer(url, size, sha256, free), path, verify)
            return os.open(path, os.O_RDONLY)
        except OSError as error:
            name = without_query(url)
            raise DataError(f"cannot keep {name} in {self.folder}: {error.strerror}") from error

    def fetch(self, url: str, limit: int) -> bytes:
        """Return the current content of a file of at most ``limit`` bytes, without keeping it.

        Raises:
            MissingFileError: The server does not have the file.
            DataError: The file cannot be fetched; names it.
        """
        file = io.BytesIO()
        _Transfer(url, limit=limit).run(file, self.tries, self.pause)
        return file.getvalue()

    def _fetch(
        self, transfer: "_Transfer", path: Path, verify: Callable[[BinaryIO], object] | None
    ) -> None:
        part = Path(f"{path}.part")
        try:
            with part.open("w+b") as file:
                transfer.run(file, self.tries, self.pause)
                if verify is not None:
                    file.seek(0)
                    verify(file)
                os.fsync(file.fileno())
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)


def _is_complete(path: Path, size: int | None) -> bool:
    return path.exists() and size in (None, path.stat().st_size)


@dataclass
class _Transfer:
    """A file that is being fetched.

    Attributes:
        url: Its URL.
        size, sha256: Expected bytes and digest, if known.
        limit: Bytes that may be written.
        received: Bytes so far.
        digest: SHA-256 of these.
        tag: The server's name for this version of the file, if it gives one.
    """

    url: str
    size: int | None = None
    sha256: str | None = None
    limit: int | None = None
    received: int = 0
    digest: Any = field(default_factory=hashlib.sha256)
    tag: str | None = None

    def run(self, file: BinaryIO, tries: int, pause: float) -> None:
        """Fetch the file to ``file``.

        Raises:
            MissingFileError: The server does not have it.
            DataError: It cannot be fetched, or is not as expected.
        """
        if self.url.startswith(PIPE):
            self._run_command(file)
        else:
            for number in range(1, tries + 1):
                try:
                    self._resume(file)
                    break
                except _TransferError as error:
                    reason = (
                        f"{without_query(self.url)}: {error} after {self.received:,} bytes"
                        f" (try {number} of {tries})"
                    )
                    if number == tries:
                        raise DataError(f"cannot fetch {reason}") from error
                warnings.warn(f"{reason}; trying again", stacklevel=2)
                time.sleep(min(pause * 2 ** (number - 1), LONGEST_PAUSE))
        check_size(without_query(self.url), self.received, self.size)
        if self.sha256 not in (None, found := self.digest.hexdigest()):
            raise DataError(
                f"{without_query(self.url)} does not match its index: its SHA-256 is {found}"
            )

    def _check_room(self, size: int) -> None:
        """Raise a DataError if so many bytes are more than expected, or than there is room for."""
        known = [limit for limit in (self.size, self.limit) if limit is not None]
        if size > min(known, default=size):
            raise DataError(f"{without_query(self.url)} has more than {min(known):,} bytes")

    def _write(self, file: BinaryIO, data: bytes) -> None:
        self._check_room(self.received + len(data))
        file.write(data)
        self.digest.update(data)
        self.received += len(data)

    def _restart(self) -> None:
        self.received, self.digest = 0, hashlib.sha256()

    def _resume(self, file: BinaryIO) -> None:
        """Request the rest of the file and write it."""
        with self._request() as response:
            total = self._start(response)
            if total is not None:
                check_size(without_query(self.url), total, self.size)
                self._check_room(total)
            file.truncate(self.received)
            file.seek(self.received)
            while chunk := self._read(response):
                self._write(file, chunk)
        if total not in (None, self.received):
            raise _TransferError(f"the connection ended before {total:,} bytes")

    def _request(self) -> http.client.HTTPResponse:
        headers = {}
        if self.received:
            headers["Range"] = f"bytes={self.received}-"
            if self.tag:
                headers["If-Range"] = self.tag
        try:
            return open_address(self.url, headers)
        except urllib.error.HTTPError as error:
            error.close()
            reason = f"the server says {error.code} {error.reason}"
            if error.code == 416:  # it has less than was received: another version
                self._restart()
            elif error.code < 500 and error.code not in TEMPORARY:
                kind = MissingFileError if error.code in MISSING else DataError
                raise kind(f"cannot fetch {without_query(self.url)}: {reason}") from error
            raise _TransferError(reason) from error
        except (ValueError, http.client.InvalidURL) as error:
            raise DataError(f"cannot fetch {without_query(self.url)}: {error}") from error
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", None) or error
            raise _TransferError(str(reason) or type(error).__name__) from error

    def _start(self, response: http.client.HTTPResponse) -> int | None:
        """Return the size of the file if the server tells it; restart unless this is the rest."""
        content = response.headers.get("Content-Range", "")
        found = re.match(r"bytes (\d{1,15})-\d{1,15}/(\d{1,15})?", content)
        if response.status != 206:
            self._restart()
        elif not found or int(found[1]) != self.received:
            raise _TransferError("the server sent another part than requested")
        tag = response.headers.get("ETag")
        self.tag = tag if tag and not tag.startswith("W/") else None
        if response.status == 206 and found[2]:
            return int(found[2])  # the part may end before
        return None if response.length is None else self.received + response.length

    def _read(self, response: http.client.HTTPResponse) -> bytes:
        try:
            return response.read1(CHUNK)
        except (OSError, http.client.HTTPException) as error:
            raise _TransferError(str(error) or type(error).__name__) from error

    def _run_command(self, file: BinaryIO) -> None:
        """Write the output of the command of a ``pipe:``.

        Raises:
            DataError: Its exit status is not 0; quotes the end of its errors.
        """
        command = self.url.removeprefix(PIPE)
        with tempfile.TemporaryFile() as errors:
            options = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": errors}
            with subprocess.Popen(command, shell=True, **options) as process:
                while chunk := process.stdout.read(CHUNK):
                    self._write(file, chunk)
            if process.returncode:
                errors.seek(max(0, errors.seek(0, os.SEEK_END) - 500))
                said = " ".join(errors.read().decode(errors="replace").split())
                raise DataError(f"{self.url} ended with status {process.returncode}: {said}")
