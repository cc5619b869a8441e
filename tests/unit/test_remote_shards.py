"""Shards from a server: fetched once, whole; what breaks is resumed or named."""

import contextlib
import hashlib
import json
import os
import resource
import shutil
import tempfile
import threading
import warnings
from collections import Counter
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from loading import refused
from packing import FORK, content, run_forked

from models import CheckpointError
from models.checkpoint.read import fetch
from pipeline.images import CorruptImageError, DataError
from pipeline.sources.download import Cache
from pipeline.sources.shards import open_shards
from tools import pack_dataset

EVERY = "train-{000000..000005}.tar"
FIRST = "train-000000.tar"


class Server(ThreadingHTTPServer):
    """Serves a folder on the loopback, with faults on request.

    Attributes:
        folder: What is served.
        faults: For each file name, the faults of the requests for it, in turn: a status,
            ``("cut", N)`` to end the connection after N bytes, ``"drop"`` before any,
            ``"no ranges"``, ``"chunks"`` to end within the first of unknown number, or a
            function that is called with the handler after half of the file.
        requests: File name and ``Range`` of each request.
    """

    daemon_threads = True

    def __init__(self, folder):
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.faults, self.requests = folder, {}, []
        self.url = f"http://127.0.0.1:{self.server_port}"

    def count(self, suffix=".tar"):
        return Counter(name for name, _ in self.requests if name.endswith(suffix))


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        name = self.path.partition("?")[0].rpartition("/")[2]
        wanted = self.headers.get("Range")
        self.server.requests.append((name, wanted))
        fault = next(iter(self.server.faults.get(name, ())), None)
        if fault is not None:
            self.server.faults[name] = self.server.faults[name][1:]
        path = self.server.folder / name
        if fault == "drop":
            return
        if isinstance(fault, int) or not path.exists():
            self.send_error(fault or 404)
            return
        data = path.read_bytes()
        if fault == "chunks":
            self.protocol_version = "HTTP/1.1"
            self.send_response(200)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            self.close_connection = True
            self.wfile.write(b"%x\r\n" % len(data) + data[:2000])
            return
        tag = f'"{hashlib.sha256(data).hexdigest()[:8]}"'
        same = self.headers.get("If-Range", tag) == tag
        start = int(wanted[6:-1]) if wanted and same and fault != "no ranges" else 0
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(data) - start))
        self.send_header("ETag", tag)
        self.end_headers()
        if callable(fault):
            self.wfile.write(data[start : len(data) // 2])
            self.wfile.flush()
            return fault(self)
        stop = fault[1] if isinstance(fault, tuple) else len(data)
        self.wfile.write(data[start:stop])


@pytest.fixture
def server(packed, tmp_path, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    shutil.copytree(packed, tmp_path / "served")
    with Server(tmp_path / "served") as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield server
        server.shutdown()


@pytest.fixture
def cache(tmp_path):
    return Cache(tmp_path / "cache", pause=0.0)


@pytest.fixture(scope="module")
def truth(packed):
    """Content of the training and of the validation shards."""
    return content(open_shards(packed, True)), content(open_shards(packed, False))


def cached(cache, ending="tar"):
    return sorted(path.name.partition("-")[2] for path in cache.folder.glob(f"*.{ending}"))


def test_remote_shards_are_local_ones(packed, truth, server, cache, monkeypatch, tmp_path):
    for place in (server.url, f"{server.url}/", f"{server.url}/{EVERY}?token=1"):
        assert content(open_shards(place, True, cache=cache)) == truth[0]
        assert content(open_shards(place, False, cache=cache)) == truth[1]
    assert set(server.count().values()) == {1}
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    mine = open_shards(f"{server.url}/{EVERY}", False, val_path=str(packed))
    assert content(mine) == truth[1]
    assert content(open_shards(server.url, False)) == truth[1]
    (folder,) = (tmp_path / "temporary").iterdir()
    assert folder.stat().st_mode & 0o777 == 0o700
    shutil.rmtree(folder)
    folder.symlink_to(tmp_path)  # as somebody else might, to have the files
    refused(partial(open_shards, server.url, True), folder, "--shard-cache")


def test_remote_shards_that_are_missing(server, cache):
    secret = open_shards(f"{server.url}/{EVERY}?token=1", True, cache=cache)
    assert secret.name(0).startswith(f"{server.url}/{FIRST}/")
    for name in ("val.json", FIRST):
        (server.folder / name).unlink()
    message = refused(partial(secret.read, 0), f"{server.url}/{FIRST}", "404")
    assert "token" not in message
    refused(partial(open_shards, server.url, False, cache=cache), server.url, "val.json")
    pattern = f"{server.url}/{EVERY}"
    refused(partial(open_shards, pattern, False, cache=cache), pattern, "--val-path")


def test_remote_shards_without_an_index(packed, truth, server, cache, tmp_path):
    assert pack_dataset.main(["--index", f"{server.url}/{EVERY}"]) == 1  # where to write it
    flags = ["--output", str(tmp_path / "index"), "--shard-cache", str(cache.folder)]
    assert pack_dataset.main(["--index", f"{server.url}/{EVERY}", *flags]) == 0
    written, reference = (
        json.loads((folder / "train.json").read_text())["shards"]
        for folder in (tmp_path / "index", packed)
    )
    assert written == reference
    for path in server.folder.glob("*.json"):
        path.unlink()
    whole = (server.folder / FIRST).read_bytes()
    (server.folder / FIRST).write_bytes(whole[:-2000].rstrip(b"\0"))
    other = Cache(tmp_path / "other", pause=0.0)
    refused(partial(open_shards, f"{server.url}/{EVERY}", True, cache=other), FIRST)
    assert cached(other) == []
    (server.folder / FIRST).write_bytes(whole)
    assert content(open_shards(f"{server.url}/{EVERY}", True, cache=other)) == truth[0]


@pytest.mark.parametrize(
    "faults",
    [
        [("cut", 3000)],
        [("cut", 3000), ("cut", 5000), ("cut", 5001)],
        [("cut", 3000), "no ranges"],
        [500, 503, 429],
        ["drop", ("cut", 0), 500, ("cut", 99), "drop"],
        ["chunks", ("cut", 99)],
    ],
)
def test_transfers_that_break_are_resumed(truth, server, cache, faults):
    server.faults[FIRST] = faults
    server.faults["train.json"] = [500, ("cut", 100)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert content(open_shards(server.url, True, cache=cache)) == truth[0]
    messages = [str(warning.message) for warning in caught if FIRST in str(warning.message)]
    broken = [fault for fault in faults if fault != "no ranges"]
    assert len(messages) == len(broken)
    assert all(f"{i} of 6" in text for i, text in enumerate(messages, 1))
    ranges = [wanted for name, wanted in server.requests if name == FIRST]
    assert len(ranges) == len(broken) + 1
    if faults[0] == ("cut", 3000):
        assert ranges[1] == "bytes=3000-"


def fill(path):
    path.write_bytes(b"x" * path.stat().st_size)


@pytest.mark.parametrize(
    ("change", "faults", "values"),
    [
        (lambda path: os.truncate(path, 4000), [], ["4,000 bytes"]),
        (fill, [], ["SHA-256"]),
        (Path.unlink, [], ["404"]),
        (None, [401], ["401"]),
        (None, [500] * 6, ["500", " 0 bytes", "6 of 6"]),
        (None, [("cut", 7)] + ["drop"] * 5, [" 7 bytes", "6 of 6"]),
        (None, [("cut", 9)] * 6, [" 9 bytes", "6 of 6"]),
    ],
)
@pytest.mark.filterwarnings("ignore:.*of 6")
def test_shards_that_cannot_be_had_are_named(packed, truth, server, cache, change, faults, values):
    if change:
        change(server.folder / FIRST)
    server.faults[FIRST] = faults
    shards = open_shards(server.url, True, cache=cache)
    assert len(shards.read(8)) > 0
    with pytest.raises(DataError) as error:
        shards.read(0)
    assert all(value in str(error.value) for value in (f"{server.url}/{FIRST}", *values))
    assert not isinstance(error.value, CorruptImageError)  # --on-corrupt skip must not hide it
    assert cached(cache) == ["train-000001.tar"]
    shutil.copy(packed / FIRST, server.folder)
    server.faults.clear()
    assert content(shards) == truth[0]


@pytest.mark.parametrize("size", [10, 100_000])
@pytest.mark.filterwarnings("ignore:.*of 6")
def test_versions_of_a_file_are_not_mixed(server, cache, size):
    def change(handler):
        (server.folder / FIRST).write_bytes(b"x" * size)
        handler.connection.close()

    server.faults[FIRST] = [change]
    with os.fdopen(cache.open(f"{server.url}/{FIRST}"), "rb") as file:
        assert file.read() == (server.folder / FIRST).read_bytes()
    assert [wanted is None for name, wanted in server.requests] == [True, False]


@pytest.mark.filterwarnings("ignore:.*of 6")
def test_a_server_that_vanishes(server, cache):
    shards = open_shards(server.url, True, cache=cache)
    server.shutdown()
    server.server_close()
    refused(partial(shards.read, 0), FIRST, os.strerror(111), " 0 bytes", "6 of 6")


def test_processes_fetch_a_shard_once(truth, server, cache):
    def read():
        os._exit(content(open_shards(server.url, True, cache=cache)) != truth[0])

    processes = [FORK.Process(target=read) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert len(server.count()) == 6 and set(server.count().values()) == {1}
    assert set(server.count(".npz").values()) == {1}


def test_a_killed_fetcher_leaves_nothing_whole(truth, server, cache):
    sent, killed = threading.Event(), threading.Event()

    def stall(handler):
        sent.set()
        killed.wait(60)

    server.faults[FIRST] = [stall]
    shards = open_shards(server.url, True, cache=cache)
    process = FORK.Process(target=shards.read, args=(0,))
    process.start()
    assert sent.wait(60)
    process.kill()
    process.join()
    killed.set()
    assert cached(cache) == []
    assert cached(cache, "part") == [f"{FIRST}.part"]
    assert content(shards) == truth[0]
    assert (len(cached(cache)), cached(cache, "part")) == (6, [])


def test_commands(packed, truth, cache):
    command = f"pipe:cat {packed}/{EVERY}"
    assert content(open_shards(command, True, cache=cache)) == truth[0]
    val = open_shards(command, False, f"pipe:cat {packed}/val-{{000000..000001}}.tar", cache)
    assert content(val) == truth[1]
    refused(partial(open_shards, command, False, cache=cache), command, "--val-path")
    assert pack_dataset.main(["--index", command]) == 1
    half = f"pipe:head -c 3000 {packed}/{FIRST}; echo no more >&2; exit 3"
    refused(partial(open_shards, half, True, cache=cache), half, "status 3", ": no more")
    half = half.replace("exit 3", "exit 0")
    refused(partial(open_shards, half, True, cache=cache), half)


def test_a_full_disk_is_named_at_once(server, cache):
    shards = open_shards(server.url, True, cache=cache)

    def read():
        _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, most))
        refused(partial(shards.read, 0), FIRST, cache.folder, os.strerror(27))
        os._exit(cached(cache, "part") != [])

    assert run_forked(read) == 0
    assert server.count()[FIRST] == 1


def endless(handler):
    with contextlib.suppress(OSError):
        while True:
            handler.wfile.write(bytes(1 << 16))


def test_cached_checkpoints_are_verified_when_used_again(server, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    digits = hashlib.sha256(b"first").hexdigest()[:8]
    for name in ("best.pth", f"best-{digits}.pth", "best", "*[!a].pth"):
        (server.folder / name).write_bytes(b"first")
        url = f"{server.url}/{name}"
        path = fetch(url)
        assert fetch(url) == path and server.count(name)[name] == 1
        for damage in (b"fir", b"other", b""):
            path.write_bytes(damage)
            assert fetch(url) == path and path.read_bytes() == b"first"
        assert server.count(name)[name] == 4
        path.write_bytes(b"other")
        (server.folder / name).unlink()
        refused(partial(fetch, url), url, "404", kind=CheckpointError)


def test_cached_shards_are_verified_when_used_again(truth, server, cache):
    assert content(open_shards(server.url, True, cache=cache)) == truth[0]
    (path,) = cache.folder.glob(f"*{FIRST}")
    os.truncate(path, 4000)
    assert content(open_shards(server.url, True, cache=cache)) == truth[0]
    assert server.count()[FIRST] == 2
    shards = open_shards(server.url, True, cache=cache)
    fill(path)
    refused(partial(shards.read, 0), FIRST, "CRC-32", kind=CorruptImageError)
    for path in cache.folder.glob("*.npz"):
        fill(path)
    refused(partial(open_shards, server.url, True, cache=cache), ".npz")


class Endless(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        endless(self)


@pytest.fixture
def endless_url(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    with ThreadingHTTPServer(("127.0.0.1", 0), Endless) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/x.pth"
        server.shutdown()


def test_bodies_without_end_are_left(endless_url, cache, tmp_path, monkeypatch):
    refused(partial(cache.open, endless_url, 5000), endless_url, "5,000")
    refused(partial(cache.fetch, endless_url, 5000), endless_url, "5,000")
    usage = shutil.disk_usage(tmp_path)._replace(free=10_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    refused(partial(cache.open, endless_url), endless_url, "9,000")
    assert cached(cache, "part") == []
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    refused(partial(fetch, endless_url), endless_url, "9000", kind=CheckpointError)
    assert list(tmp_path.rglob("*x.pth")) == []
