"""Shards from a server: fetched once, whole; what breaks goes on or is named."""

import errno
import hashlib
import json
import os
import shutil
import threading
import warnings
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from packing import FORK, content, image_folder, pack

import pipeline.sources.shards
from pipeline.images import CorruptImageError, DataError
from pipeline.sources import download
from pipeline.sources.download import Cache
from pipeline.sources.shards import open_shards
from tools import pack_dataset


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return image_folder(tmp_path_factory.mktemp("folder"))


@pytest.fixture(scope="module")
def packed(folder, tmp_path_factory):
    output = tmp_path_factory.mktemp("packed")
    assert pack(folder, output) == 0
    return output


class Server(ThreadingHTTPServer):
    """Serves a folder on the loopback, with the faults it is told of.

    Attributes:
        folder: What is served.
        faults: For each file name, what becomes of the requests for it, in turn: a status,
            ``("cut", N)`` to end the connection after N bytes, ``"drop"`` before any,
            ``"no ranges"``, ``"chunks"`` to end amid the first of unknown number, or a
            function that is called with the handler after half of it.
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
        start = int(wanted[6:-1]) if wanted and fault != "no ranges" else 0
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(data) - start))
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()[:8]}"')
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


EVERY = "train-{000000..000005}.tar"
FIRST = "train-000000.tar"


def cached(cache):
    return sorted(path.name[33:] for path in cache.folder.glob("*.tar"))


def test_remote_shards_are_local_ones(packed, server, cache, monkeypatch, tmp_path):
    truth = content(open_shards(packed, True)), content(open_shards(packed, False))
    for place in (server.url, f"{server.url}/", f"{server.url}/{EVERY}?token=1"):
        assert content(open_shards(place, True, cache=cache)) == truth[0]
        assert content(open_shards(place, False, cache=cache)) == truth[1]
    assert set(server.count().values()) == {1}
    monkeypatch.setattr(download.tempfile, "gettempdir", lambda: str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    mine = open_shards(f"{server.url}/{EVERY}", False, val_path=str(packed))
    assert content(mine) == truth[1]
    assert content(open_shards(server.url, False)) == truth[1]
    (folder,) = (tmp_path / "temporary").iterdir()
    assert folder.stat().st_mode & 0o777 == 0o700
    (server.folder / "val.json").unlink()
    with pytest.raises(DataError, match=r"has no val\.json"):
        open_shards(server.url, False, cache=cache)
    with pytest.raises(DataError, match="no validation shards beside"):
        open_shards(f"{server.url}/{EVERY}", False, cache=cache)
    secret = open_shards(f"{server.url}/{EVERY}?token=1", True, cache=Cache(tmp_path / "other"))
    assert secret.name(0).startswith(f"{server.url}/{FIRST}/")
    (server.folder / FIRST).unlink()
    with pytest.raises(DataError, match=rf"{server.url}/{FIRST}: the server says 404"):
        secret.read(0)


def test_remote_shards_without_an_index(packed, server, cache, tmp_path):
    truth = content(open_shards(packed, True))
    assert pack_dataset.main(["--index", f"{server.url}/{EVERY}"]) == 1  # where to write it
    flags = ["--output", str(tmp_path / "index"), "--shard-cache", str(cache.folder)]
    assert pack_dataset.main(["--index", f"{server.url}/{EVERY}", *flags]) == 0
    index = [(tmp_path / "index" / f"train.{kind}").read_bytes() for kind in ("json", "npz")]
    reference = json.loads((packed / "train.json").read_text())["shards"]
    assert json.loads(index[0])["shards"] == reference
    for path in server.folder.glob("*.json"):
        path.unlink()
    whole = (server.folder / FIRST).read_bytes()
    (server.folder / FIRST).write_bytes(whole[:-2000].rstrip(b"\0"))
    other = Cache(tmp_path / "other", pause=0.0)
    with pytest.raises(DataError, match=r"train-000000\.tar is (cut off|no whole)"):
        open_shards(f"{server.url}/{EVERY}", True, cache=other)
    assert cached(other) == []
    (server.folder / FIRST).write_bytes(whole)
    assert content(open_shards(f"{server.url}/{EVERY}", True, cache=other)) == truth


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
def test_transfers_that_break_go_on(packed, server, cache, faults):
    truth = content(open_shards(packed, True))
    server.faults[FIRST] = faults
    server.faults["train.json"] = [500, ("cut", 100)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert content(open_shards(server.url, True, cache=cache)) == truth
    messages = [str(warning.message) for warning in caught if FIRST in str(warning.message)]
    broken = [fault for fault in faults if fault != "no ranges"]
    assert len(messages) == len(broken)
    assert all(f"(try {i} of 6); trying again" in text for i, text in enumerate(messages, 1))
    ranges = [wanted for name, wanted in server.requests if name == FIRST]
    assert len(ranges) == len(broken) + 1
    if faults[0] == ("cut", 3000):
        assert ranges[1] == "bytes=3000-"


def fill_with(byte):
    def change(path):
        path.write_bytes(byte * path.stat().st_size)

    return change


@pytest.mark.parametrize(
    ("change", "faults", "message"),
    [
        (lambda path: os.truncate(path, 4000), [], "does not match its index: it has 4,000 bytes,"),
        (fill_with(b"x"), [], "does not match its index: its SHA-256 is another"),
        (Path.unlink, [], "cannot fetch .*: the server says 404"),
        (None, [401], "cannot fetch .*: the server says 401"),
        (None, [500] * 6, r"the server says 500 .* after 0 bytes \(try 6 of 6\)"),
        (None, [("cut", 7)] + ["drop"] * 5, r"after 7 bytes \(try 6 of 6\)"),
        (None, [("cut", 9)] * 6, "the connection ended before .* after 9 bytes"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*trying again")
def test_shards_that_cannot_be_had_are_named(packed, server, cache, change, faults, message):
    if change:
        change(server.folder / FIRST)
    server.faults[FIRST] = faults
    shards = open_shards(server.url, True, cache=cache)
    assert len(shards.read(8)) > 0
    with pytest.raises(DataError, match=message) as error:
        shards.read(0)
    assert f"{server.url}/{FIRST}" in str(error.value)
    assert not isinstance(error.value, CorruptImageError)  # --on-corrupt skip must not hide it
    assert cached(cache) == ["train-000001.tar"]
    shutil.copy(packed / FIRST, server.folder)
    server.faults.clear()
    assert content(shards) == content(open_shards(packed, True))


@pytest.mark.filterwarnings("ignore:.*trying again")
def test_a_file_that_changes_under_way_is_not_mixed(packed, server, cache):
    def change(handler):
        fill_with(b"x")(server.folder / FIRST)
        handler.connection.close()

    server.faults[FIRST] = [change, "no ranges"]  # If-Range: the tag is another, so all of it
    with pytest.raises(DataError, match="its SHA-256 is another"):
        open_shards(server.url, True, cache=cache).read(0)
    assert cached(cache) == []


@pytest.mark.filterwarnings("ignore:.*trying again")
def test_a_server_that_vanishes(server, cache):
    shards = open_shards(server.url, True, cache=cache)
    server.shutdown()
    server.server_close()
    with pytest.raises(DataError, match=r"Connection refused.* after 0 bytes \(try 6 of 6\)"):
        shards.read(0)


def test_processes_fetch_a_shard_once(packed, server, cache):
    truth = content(open_shards(packed, True))

    def read():
        os._exit(content(open_shards(server.url, True, cache=cache)) != truth)

    processes = [FORK.Process(target=read) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert len(server.count()) == 6 and set(server.count().values()) == {1}
    assert set(server.count(".npz").values()) == {1}


def test_a_killed_fetcher_leaves_nothing_whole(packed, server, cache):
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
    assert [path.name[33:] for path in cache.folder.glob("*.part")] == [f"{FIRST}.part"]
    assert content(shards) == content(open_shards(packed, True))
    assert len(cached(cache)) == 6
    assert list(cache.folder.glob("*.part")) == []


def test_commands(packed, cache):
    truth = content(open_shards(packed, True))
    shards = open_shards(f"pipe:cat {packed}/{EVERY}", True, cache=cache)
    assert content(shards) == truth
    with pytest.raises(DataError, match=r"no validation shards beside pipe:cat"):
        open_shards(f"pipe:cat {packed}/{EVERY}", False, cache=cache)
    val = open_shards(
        f"pipe:cat {packed}/{EVERY}", False, f"pipe:cat {packed}/val-{{000000..000001}}.tar", cache
    )
    assert content(val) == content(open_shards(packed, False))
    half = f"pipe:head -c 3000 {packed}/{FIRST}; echo no more >&2; exit 3"
    with pytest.raises(DataError, match=r"ended with status 3: no more"):
        open_shards(half, True, cache=cache)
    with pytest.raises(DataError, match=r"is (cut off|no whole)"):
        open_shards(half.replace("exit 3", "exit 0"), True, cache=cache)
    assert pack_dataset.main(["--index", f"pipe:cat {packed}/{EVERY}"]) == 1


def test_a_bounded_cache_keeps_what_was_used_last(packed, server, tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline.sources.shards, "OPEN_IN_BOUNDED_CACHE", 1)
    sizes = [(packed / f"train-{i:06d}.tar").stat().st_size for i in range(6)]
    bound = 2 * max(sizes) + (packed / "train.npz").stat().st_size
    cache = Cache(tmp_path / "cache", max_bytes=bound, pause=0.0)
    reader, holder = (open_shards(server.url, True, cache=cache) for _ in range(2))
    holder.read(0)  # and keeps its shard open
    for number in (1, 2, 3, 1):
        reader.read(8 * number)
        assert sum(path.stat().st_size for path in cache.folder.iterdir()) <= bound
        assert FIRST in cached(cache)
    assert cached(cache) == [FIRST, "train-000001.tar"]
    assert server.count() == {FIRST: 1, **{f"train-00000{i}.tar": 2 - (i > 1) for i in (1, 2, 3)}}
    third = open_shards(server.url, True, cache=cache)
    with pytest.warns(UserWarning, match="more than the bound of .* as all of them are in use"):
        third.read(32)
    assert len(cached(cache)) == 3
    remnant, other = cache.folder / f"{'0' * 32}-x.tar.part", cache.folder / "notes.txt"
    for path in (remnant, other):
        path.write_bytes(b"x" * 1000)
        os.utime(path, (0, 0))
    del holder, third
    reader.read(16)
    assert (remnant.exists(), other.exists()) == (False, True)


def test_what_was_opened_last_stays(server, tmp_path, packed):
    bound = 2 * (packed / FIRST).stat().st_size + 5
    cache, names = (
        Cache(tmp_path / "cache", bound, pause=0.0),
        [f"train-00000{i}.tar" for i in range(3)],
    )
    for number in (0, 1, 0, 2):
        os.close(cache.open(f"{server.url}/{names[number]}"))
    assert cached(cache) == [names[0], names[2]]


def test_a_full_disk_and_a_foreign_folder(server, cache, tmp_path, monkeypatch):
    shards = open_shards(server.url, True, cache=cache)

    def fail(download, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(download._Download, "write", fail)
        with pytest.raises(DataError, match=f"cannot keep .* in {cache.folder}: No space left"):
            shards.read(0)
    assert list(cache.folder.glob("*.part")) == []
    monkeypatch.setattr(download.tempfile, "gettempdir", lambda: str(tmp_path))
    (tmp_path / f"shards-{os.getuid()}").symlink_to(tmp_path)
    with pytest.raises(DataError, match="belongs to somebody else: name a folder"):
        open_shards(server.url, True)
