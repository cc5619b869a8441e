"""HTTP requests that end: to http(s) alone, and never slower than a floor."""

import http.client
import io
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from email.message import Message
from typing import IO
from urllib.parse import urlparse

TIMEOUT = 60.0  # seconds without a byte, and over which the speed is averaged
SLOWEST = 1024  # bytes per second, of headers and body


class _Paced(io.RawIOBase):
    """What a server sends, unless it is slower than ``SLOWEST``."""

    def __init__(self, raw: io.RawIOBase):
        self.raw, self.seconds, self.received = raw, 0.0, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        start = time.monotonic()
        count = self.raw.readinto(buffer)
        self.seconds += time.monotonic() - start  # without those that the reader takes
        self.received += count or 0
        if self.seconds > TIMEOUT:
            if self.received < SLOWEST * self.seconds:
                raise TimeoutError(f"fewer than {SLOWEST} bytes per second")
            self.seconds, self.received = 0.0, 0
        return count

    def close(self) -> None:
        self.raw.close()
        super().close()


class _Response(http.client.HTTPResponse):
    def __init__(self, sock, *args: object, **kwargs: object):
        super().__init__(sock, *args, **kwargs)
        self.fp.close()
        self.fp = io.BufferedReader(_Paced(sock.makefile("rb", buffering=0)))


class _Connection(http.client.HTTPConnection):
    response_class = _Response


class _SecureConnection(http.client.HTTPSConnection):
    response_class = _Response


class _Handler(urllib.request.HTTPHandler, urllib.request.HTTPSHandler):
    """Opens both kinds of addresses."""

    def http_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_Connection, request)

    def https_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_SecureConnection, request)


class _Redirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(
        self,
        request: urllib.request.Request,
        file: IO[bytes],
        code: int,
        reason: str,
        headers: Message,
        url: str,
    ) -> urllib.request.Request | None:
        if urlparse(url).scheme not in ("http", "https"):
            reason = f"and redirects to {url[:200]}, which is not http(s)"
            raise urllib.error.HTTPError(request.full_url, code, reason, headers, file)
        return super().redirect_request(request, file, code, reason, headers, url)


def open_address(url: str, headers: Mapping[str, str] | None = None) -> http.client.HTTPResponse:
    """Request a file as it is, following redirections to http(s) addresses.

    Raises:
        OSError, http.client.HTTPException: The server fails, or is too slow, as reading from the
            response may say, too; HTTPError for a status.
        ValueError: The address is not valid, or the file comes compressed.
    """
    headers = {"Accept-Encoding": "identity"} | dict(headers or {})
    opener = urllib.request.build_opener(_Handler, _Redirects)
    response = opener.open(urllib.request.Request(url, headers=headers), timeout=TIMEOUT)
    encoding = response.headers.get("Content-Encoding", "identity").strip().lower()
    if encoding not in ("", "identity"):
        response.close()
        raise ValueError(f"the server sends it compressed ({encoding[:50]}), which is not read")
    return response
