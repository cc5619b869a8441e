"""HTTP servers of checkpoints and shards: errors, lies, loops, and answers without end."""

import contextlib
import gzip
import random
import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from models.checkpoint import address
from tests.attack.case import Case
from tests.attack.files import safetensors
from tests.attack.programs import FEW, readers

BOMB = gzip.compress(bytes(1 << 28), 1)
PAGE = b"<!DOCTYPE html><html>\x1b[2J</html>"


class Handler(BaseHTTPRequestHandler):
    """Answers a path by the function of its first part; nothing is printed."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.close_connection = True
        name = self.path.split("/")[1]
        with contextlib.suppress(OSError):  # the client may be gone
            ANSWERS[name](self)

    def answer(self, status: int, body: bytes = b"", **headers: object) -> None:
        """Send an answer; the length is that of the body unless it is given."""
        self.send_response(status)
        for key, value in ({"Content_Length": len(body)} | headers).items():
            if value is not None:
                self.send_header(key.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def redirect(to: str) -> Callable[[Handler], None]:
    return lambda handler: handler.answer(302, Location=to)


def raw(data: bytes) -> Callable[[Handler], None]:
    def answer(handler: Handler) -> None:
        handler.wfile.write(data)

    return answer


def trickle(start: bytes) -> Callable[[Handler], None]:
    """Return a function that sends ``start`` and then a byte at a time, without end."""

    def answer(handler: Handler) -> None:
        handler.wfile.write(start)
        while not handler.server.ended.wait(0.05):
            handler.wfile.write(b"0")

    return answer


def busy(status: int, after: object) -> Callable[[Handler], None]:
    return lambda handler: handler.answer(status, PAGE, Retry_After=after)


def part(content_range: str | None) -> Callable[[Handler], None]:
    """Return a function that answers with a part of a file, as nobody asked for."""
    return lambda handler: handler.answer(206, b"x" * 9, Content_Range=content_range)


def broken(handler: Handler) -> None:
    """Break the connection within the body."""
    handler.answer(200, b"PK\3\4" + bytes(99), Content_Length=10**6)
    handler.connection.shutdown(socket.SHUT_RDWR)


ANSWERS: dict[str, Callable[[Handler], None]] = {
    "404": lambda handler: handler.answer(404, PAGE),
    "403": lambda handler: handler.answer(403, PAGE),
    "410": lambda handler: handler.answer(410),
    "page": lambda handler: handler.answer(200, PAGE),
    "nothing": lambda handler: handler.answer(200),
    "no-content": lambda handler: handler.answer(204, Content_Length=None),
    "partial": part("bytes 5-9/3"),
    "partial-start": part("bytes 0-8/1000"),
    "partial-huge": part(f"bytes 0-8/{10**18}"),
    "partial-text": part("bytes x-y/z\x1b[2J"),
    "partial-none": part(None),
    "429": busy(429, None),
    "429-huge": busy(429, 10**30),
    "429-negative": busy(429, -5),
    "503-date": busy(503, "Fri, 31 Dec 9999 23:59:59 GMT"),
    "503-text": busy(503, "\x1b[2J"),
    "no-length": lambda handler: handler.answer(200, PAGE, Content_Length=None),
    "length-text": lambda handler: handler.answer(200, PAGE, Content_Length="many"),
    "length-negative": lambda handler: handler.answer(200, PAGE, Content_Length=-5),
    "length-huge": lambda handler: handler.answer(200, PAGE, Content_Length=1 << 70),
    "too-long": lambda handler: handler.answer(200, PAGE, Content_Length=3),
    "too-short": lambda handler: handler.answer(200, PAGE, Content_Length=len(PAGE) + 9),
    "broken": broken,
    "slow-status": trickle(b"HTTP/1.1 200 O"),
    "slow-header": trickle(b"HTTP/1.1 200 OK\r\nA: "),
    "slow-length": trickle(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"),
    "slow-body": trickle(b"HTTP/1.1 200 OK\r\n\r\nPK\3\4"),
    "slow-redirect": trickle(b"HTTP/1.1 302 Found\r\nLocation: "),
    "header-cut": raw(b"HTTP/1.1 200 OK\r\nContent-Le"),
    "loop": redirect("/loop/x.pth"),
    "to-file": redirect("file:///etc/passwd"),
    "to-ftp": redirect("ftp://127.0.0.1/x.pth"),
    "to-ftps": redirect("ftps://127.0.0.1/x.pth"),
    "to-data": redirect("data:,x.pth"),
    "to-command": redirect("pipe:touch x.pth"),
    "to-nowhere": redirect("http://127.0.0.1:1/x.pth"),
    "to-nothing": redirect(""),
    "no-http": raw(b"\x1b[2J hello\r\n\r\n"),
    "bad-status": raw(b"HTTP/1.1 abc OK\r\n\r\n"),
    "silence": raw(b""),
    "bad-chunks": raw(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\nabc\r\n"),
    "long-header": raw(b"HTTP/1.1 200 OK\r\nA: " + b"a" * 10**6 + b"\r\n\r\n"),
    "many-headers": raw(b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 1000 + b"\r\n"),
    "gzip": lambda handler: handler.answer(200, b"\x1f\x8b" + bytes(9), Content_Encoding="gzip"),
    "gzip-bomb": lambda handler: handler.answer(200, BOMB, Content_Encoding="gzip"),
    "gzip-as-is": lambda handler: handler.answer(200, BOMB),
    "bad-safetensors": lambda handler: handler.answer(200, safetensors(b"{}", length=1 << 62)),
}
URLS = ("http://", "http://127.0.0.1:99999/x.pth", "http://[::1/x.pth", "http://127.0.0.1:x/x.pth")
URLS += ("http://127.0.0.1:1/", "http://127.0.0.1:1/..", "http://127.0.0.1:1/\x1b[2J\nx.pth")
URLS += ("http://127.0.0.1:1/\udcff.pth", "http://127.0.0.1:1/" + "n" * 300 + ".pth")


@contextlib.contextmanager
def hostile_server() -> Iterator[str]:
    """Serve the answers from a thread; yield the address."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads, server.ended = True, threading.Event()
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.ended.set()
        server.shutdown()


FINAL = ("no-content", "410", "gzip", "gzip-bomb", "to-ftp", "to-data")  # what is not tried again


def impatient() -> None:
    """Let a server be slow for a second only."""
    address.TIMEOUT = 1.0


def cases(rng: random.Random) -> list[Case]:
    """Return the cases of this class."""
    found, start = [], rng.randrange(10**6)

    def add(name: str, number: int, url: str, named: str) -> None:
        programs = [*readers(url), ("load_model", [url])]
        program, words = programs[(start + number) % len(programs)]
        found.append(Case("servers", name, program, words, named=named, around=impatient))

    for i, name in enumerate(ANSWERS):
        add(name, i, f"^{name}/x.pth", "x.pth")
    for i, url in enumerate(URLS):
        add(f"address {i}", i, url, "http://")
    for name in ("404", "403", "page", "loop", "to-file", "nothing", *FINAL):
        data = ["--data-set", "WDS", "--data-path", f"^{name}/a.tar", "--shard-cache", "=cache"]
        words = ["--eval", "--resume", "+mid.pth", *data, *FEW]
        leaves = ("*.lock",)
        found.append(Case("servers", f"shard {name}", "main", words, named="/a.", leaves=leaves))
    return found
