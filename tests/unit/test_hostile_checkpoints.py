"""Hostile and broken checkpoint files: what each leads to, without running or filling memory."""

import io
import json
import os
import pickle
import struct
import tarfile
import warnings
import zipfile
from argparse import Namespace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from loading import Trap, refused
from test_mindspore import record

from models import CheckpointError, UnsafeFileError, load_checkpoint

MEMORY = 200 << 20  # bytes that reading any of the files may take
GIB = 1 << 30
FLOATS = struct.pack("<8f", *range(8))
MAGIC = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03.\x80\x02}."


def text(value):
    data = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(data)) + data


def number(value):
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def several(*parts):
    return b"(" + b"".join(parts) + b"t"


def named(name):
    return "c{}\n{}\n".format(*name.rsplit(".", 1)).encode()


def call(name, *arguments):
    return named(name) + several(*arguments) + b"R"


def mapping(**items):
    return b"}(" + b"".join(text(key) + value for key, value in items.items()) + b"u"


def tensor(size, strides, offset=0, count=8, key="0", view=b""):
    kind = named("torch.FloatStorage")
    stored = several(text("storage"), kind, text(key), text("cpu"), number(count), view) + b"Q"
    shape = (several(*map(number, numbers)) for numbers in (size, strides))
    hooks = call("collections.OrderedDict")
    rebuild = "torch._utils._rebuild_tensor_v2"
    return call(rebuild, stored, number(offset), *shape, b"\x89", hooks)


WEIGHTS = {"weight": tensor((2, 4), (4, 1)), "bias": tensor((2,), (1,))}
OLD = {"weight": tensor((2, 4), (4, 1), view=b"N"), "bias": tensor((2,), (1,), view=b"N")}


def program(value):
    return b"\x80\x02" + value + b"."


def archive(value=b"N", compression=zipfile.ZIP_STORED, records=()):
    """A file whose ``data.pkl`` makes ``value``, with eight floats as its storage."""
    buffer = io.BytesIO()
    everything = {"data.pkl": program(value), "data/0": FLOATS, "version": b"3\n"} | dict(records)
    with zipfile.ZipFile(buffer, "w", compression) as file:
        for name, data in everything.items():
            file.writestr(f"archive/{name}", data)
    return buffer.getvalue()


def weights_and(value):
    return archive(mapping(model=mapping(**WEIGHTS), extra=value))


def legacy(value, keys=("0",), length=8, data=FLOATS):
    keys, data = b"](" + b"".join(map(text, keys)) + b"e", struct.pack("<q", length) + data
    return MAGIC + program(value) + program(keys) + data


def saved(content, **kwargs):
    buffer = io.BytesIO()
    torch.save(content, buffer, **kwargs)
    return buffer.getvalue()


def safe(header, data=b"", length=None):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def entry(shape, begin, end, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


class Remade(Namespace):
    def __setstate__(self, state):
        raise AssertionError("ran")


def patched(data, what, other):
    assert what in data and len(what) == len(other)
    return data.replace(what, other)


def state(**extra):
    return {"weight": torch.ones(2, 4), "bias": torch.zeros(2)} | extra


def tar():
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as file:
        for name in ("storages", "tensors", "pickle"):
            file.addfile(tarfile.TarInfo(name), io.BytesIO())
    return buffer.getvalue()


def outcome(kind, data, named=""):
    return data, kind, named


KINDS = (None, CheckpointError, UnsafeFileError)
loads, damaged, unsafe = (partial(outcome, kind) for kind in KINDS)


def programs():
    """Pickles that call something."""
    system = Trap(os.system, "touch sprung")
    for protocol in range(6):
        data = pickle.dumps({"model": system}, protocol)
        yield f"bare system {protocol}", damaged(data)
        outcome = unsafe if protocol <= 2 else damaged
        asked = "posix.system" if protocol <= 2 else f" {protocol}"
        yield f"zip system {protocol}", outcome(archive(records={"data.pkl": data}), asked)
    yield "legacy system", unsafe(saved(system, _use_new_zipfile_serialization=False), "posix")
    for function in (eval, exec, getattr, __import__):
        name = f"builtins.{function.__name__}"
        yield name, unsafe(saved(Trap(function, "open('sprung', 'w')")), name)
    for name in ("torch.hub.load", "torch.serialization.load", "torch.load", "pickle.loads"):
        yield name, unsafe(weights_and(call(name, text("sprung"))), name)
    yield "numpy objects", unsafe(saved(np.array([{}, None], dtype=object)), "numpy")
    yield "Namespace subclass", unsafe(saved(Remade(a=1)), f"{__name__}.Remade")
    blank = named("argparse.Namespace") + b")\x81"
    for attribute in ("__class__", "__dict__", "__setstate__"):  # mere entries of its __dict__
        changed = blank + mapping(**{attribute: named("collections.OrderedDict")}) + b"b"
        yield attribute, loads(weights_and(changed))
    slots = blank + several(b"N", mapping(__class__=named("collections.OrderedDict"))) + b"b"
    yield "slots", damaged(weights_and(slots))
    yield "calls a value", damaged(weights_and(text("os") + b")R"))
    parts = {"constants.pkl": program(b"N"), "code/net.py": b"import os"}
    yield "TorchScript", damaged(archive(mapping(**WEIGHTS), records=parts), "TorchScript")


def bombs():
    """Pickles that would take memory or time."""
    for name in ("builtins.bytearray", "torch.Tensor", "torch.FloatTensor"):
        yield name, unsafe(weights_and(call(name, number(10**11))), name)
    calls = "_codecs.encode"
    yield "bytes", loads(saved(state(extra=b"\xff" * 9) | {"more": b"a" * 300}))
    for codec in ("hex", "latin1"):
        data = text("A" * 64)
        for _ in range(40):
            data = call(calls, data, text(codec))
        yield f"codec {codec}", unsafe(weights_and(data), calls)
    data = b"(" + text("A") + text("hex") + b"tq\x01" + named(calls) + b"h\x01R"
    yield "codec of the memo", unsafe(weights_and(data), calls)
    data = named(calls) + b"q\x01" + text("A") + text("latin1") + b"\x86R"
    data += b"h\x01" + text("A") + text("hex") + b"\x86R"
    yield "codec of the second call", unsafe(weights_and(b"](" + data + b"e"), calls)
    yield from numpy_scalars()
    laughs = b"](" * 60 + b"]q\x00" + b"h\x00eq\x00" * 60  # 2 ** 60 lists
    yield "laughs", loads(weights_and(laughs))
    yield "deep", loads(weights_and(b"]" * 10**5 + b"a" * (10**5 - 1)))
    yield "deep tuple", loads(weights_and(b"N" + b"\x85" * 10**5))
    yield "deep marks", damaged(weights_and(b"(" * 10**5))
    yield "itself", loads(weights_and(b"]q\x00h\x00a"))
    yield "itself as state", damaged(archive(b"}q\x00" + text("model") + b"h\x00s"), "model")
    yield "long text", damaged(weights_and(b"X\xff\xff\xff\xff"))
    yield "long number", damaged(weights_and(b"\x8b\xff\xff\xff\x7f"))
    yield "long bytes", damaged(weights_and(b"\x8e" + b"\xff" * 8))
    yield "far memo", loads(weights_and(b"Nr\xff\xff\xff\xff"))
    yield "many entries", loads(saved(state() | {str(i): i for i in range(50_000)}))
    yield "many opcodes", unsafe(weights_and(b"](" + b"N" * (1 << 20) + b"e"), str(1 << 20))
    yield "no entries", damaged(archive(mapping(model=b"}")))


def numpy_scalars():
    """Scalars of NumPy that are not numbers, or have not the bytes of one."""
    dtype, scalar = "numpy.dtype", "numpy._core.multiarray.scalar"

    def kind(code="f8", end=b"\x89\x88\x87R", version=b"K\x03", order=b"X\1\0\0\0<"):
        state = several(version, order, b"NNN", number(-1), number(-1), b"K\x00")
        return named(scalar) + named(dtype) + text(code) + end + state + b"b"

    eight = named("_codecs.encode") + text("\0" * 8) + text("latin1") + b"\x86R"
    good = kind() + eight + b"\x86R"
    yield "numpy by hand", loads(weights_and(good))
    for code in ("O", "V2000000000", "S2000000000", "U8", "M8", "f16", "f8,f8", "(9,)f8", "2f8"):
        made = kind(code) + eight + b"\x86R"
        yield f"numpy {code}", unsafe(weights_and(made), f"{dtype} {code}")
    yield "numpy of other bytes", unsafe(weights_and(kind("f4") + eight + b"\x86R"), "f4")
    for end in (b"\x85R", b"N\x86R", b"K\x08\x86R"):
        yield f"numpy without bytes {end}", unsafe(weights_and(kind() + end), scalar)
    untyped = named(scalar) + text("f8") + eight + b"\x86R"
    yield "numpy without dtype", unsafe(weights_and(untyped), scalar)
    for name, made in (
        ("list", named(scalar) + named(dtype) + b"]\x89\x88\x87R"),
        ("tuple", named(scalar) + named(dtype) + text("f8") + b"\x85R"),
        ("new", kind(end=b"\x89\x88\x87\x81")),
        ("alone", kind().removeprefix(named(scalar))),
        ("again", good.replace(named(dtype), named(dtype) + b"q\x01") + b"h\x01"),
    ):
        yield f"numpy dtype {name}", unsafe(weights_and(b"](" + made + b"e"), dtype)
    for value in (np.str_("b"), np.dtype("f8"), np.zeros(2)):
        asked = "_reconstruct" if isinstance(value, np.ndarray) else dtype
        yield f"numpy {value!r}", unsafe(saved({"a": np.float64(1), "b": value}), asked)
    for order in (text("?"), b"N", tensor((2,), (1,))):
        made = kind(order=order) + eight + b"\x86R"
        yield f"numpy order {order[:9]}", unsafe(weights_and(made), f"{dtype} f8")
    huge = tensor((10**6, 10**6), (0, 0))  # comparing it would fill memory
    yield "numpy version", loads(weights_and(kind(version=huge) + eight + b"\x86R"))


def archives():
    """Zip files with lies in them."""
    good = saved(state())
    stored, packed = zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED
    bomb = archive(b"N", packed, {"data/0": bytes(100 << 20)})
    yield "bomb", unsafe(bomb, "archive/")
    short = dict.fromkeys(("data.pkl", "data/0", "version"), b"1")  # grow when compressed
    yield "compressed", unsafe(archive(b"N", packed, short), "archive/")
    size = struct.pack("<LL", 32, 32)
    for name, other in (("huge", 0xFFFFFFF0), ("longer", 1 << 20)):
        lying = patched(weights_and(b"N"), size, struct.pack("<LL", other, other))
        yield f"{name} record", unsafe(lying, "archive/data/0")
    yield "shorter record", damaged(patched(weights_and(b"N"), size, struct.pack("<LL", 8, 8)))
    more = archive(mapping(**WEIGHTS), stored, {"more": bytes(33)})
    into_the_next = patched(more, struct.pack("<LL", 33, 33), struct.pack("<LL", 90, 90))
    yield "record into the directory", unsafe(into_the_next, "archive/more")
    twice = weights_and(b"N").replace(b"archive/version", b"archive/data/00", 1)
    yield "another name", damaged(twice, "archive/version")
    with warnings.catch_warnings(action="ignore"):
        double = io.BytesIO(weights_and(b"N"))
        with zipfile.ZipFile(double, "a") as file:
            file.writestr("archive/data.pkl", program(b"N"))
    yield "two pickles", unsafe(double.getvalue(), "archive/data.pkl")
    for name in ("DATA.pkl", "dat\u0430.pkl"):
        upper = archive(mapping(**WEIGHTS), records={name: program(b"N")})
        yield f"record {name}", unsafe(upper, "archive/da")
    yield "two archives", damaged(2 * weights_and(b"N"))
    yield "bytes in front", damaged(bytes(9) + good)
    directory = good.rindex(b"PK\x01\x02")
    lying = good[: directory + 42] + bytes(4) + good[directory + 46 :]
    yield "overlapping records", damaged(lying)
    yield "cut", damaged(good[: len(good) // 2])
    yield "only the start", damaged(good[:4])
    yield "zip with nothing", damaged(b"PK\5\6" + bytes(18))
    yield "zip with no record", damaged(b"PK\3\4" + bytes(80) + b"PK\5\6" + bytes(18))
    yield "zip of anything", damaged(archive(b"N", records={"data.pkl": b"hello"}))
    yield "comment", damaged(good[:-2] + b"\5\0hello")
    place = struct.pack("<Q", 9)  # torch looks for the 64-bit end record there
    yield "another 64-bit end", damaged(good[:-34] + place + good[-26:])
    huge = good + b"PK\5\6" + bytes(8) + struct.pack("<L", 1 << 30) + bytes(6)
    yield "huge directory", unsafe(huge, f"{1 << 30}")


def tensors():
    """Tensors and storages that do not fit each other."""
    huge = archive(mapping(weight=tensor((10**6, 10**6), (0, 0))))
    yield "no strides", unsafe(huge, "32")
    lots = b"".join(text(f"w{i}") + tensor((10**6,), (0,)) for i in range(100))
    yield "no strides, often", unsafe(archive(b"}(" + lots + b"u"), "32")
    for shape in (
        {"size": (10**9,), "strides": (1,)},
        {"size": (2, 4), "strides": (10**9, 1)},
        {"size": (2, 4), "strides": (4, 1), "offset": 10**9},
        {"size": (2, 4), "strides": (4, 1), "offset": -1},
        {"size": (10**9,), "strides": (1,), "count": 10**9},
        {"size": (2,), "strides": (1,), "count": 4},
        {"size": (2, 4), "strides": (4, 1), "key": "../1"},
        {"size": (-1,), "strides": (1,)},
        {"size": (2, 4), "strides": (-4, 1)},
        {"size": (1 << 62, 1 << 62), "strides": (1 << 62, 1)},
        {"size": (0, 1 << 61), "strides": (1, 1)},
    ):
        asked = "storage 0" if "count" in shape else ""
        yield f"{shape}", damaged(archive(mapping(weight=tensor(**shape))), asked)
    kind, location = named("torch.FloatStorage"), text("cpu")
    forms = (  # references to storages as torch.save does not write them
        several(text("module"), kind, text("0"), location, number(8)),
        several(text("storage"), kind, text("0"), location, b"G" + struct.pack(">d", 8)),
        several(text("storage"), kind, text("0"), location, number(8), several()),
        number(1),
        text("storage") + kind + text("0") + location + number(8) + b"(t",
    )
    for i, form in enumerate(forms):
        yield f"reference {i}", unsafe(archive(mapping(weight=form + b"Q")))
    legacy_huge = legacy(mapping(weight=tensor((10**9,), (1,), count=10**9, view=b"N")))
    yield "legacy huge storage", damaged(legacy_huge)
    yield "legacy beyond", damaged(legacy(mapping(weight=tensor((10**9,), (1,), view=b"N"))))
    yield "legacy lying storage", damaged(legacy(mapping(**OLD), length=1 << 40))
    yield "legacy without data", damaged(legacy(mapping(**OLD), keys=()))
    yield "legacy without a storage", damaged(legacy(mapping(**OLD), keys=("1",)))
    both = {"weight": OLD["weight"], "bias": tensor((2,), (1,), count=2, view=b"N")}
    yield "legacy storage of two sizes", damaged(legacy(mapping(**both)), "storage 0")
    yield "legacy cut", damaged(legacy(mapping(**OLD))[:-1])
    yield "tar", damaged(tar())
    yield "meta", unsafe(saved(state(weight=torch.ones(2, 4, device="meta"))), "torch._utils")
    yield "sparse", unsafe(saved(state(weight=torch.ones(2, 4).to_sparse())), "torch._utils")
    yield "complex", damaged(saved(state(weight=torch.ones(2, 4) + 1j)), "weight")
    yield "integers", damaged(saved(state(weight=torch.ones(2, 4).int())), "weight")


def contents():
    """Files that are whole, and hold something else than expected."""
    for other in ("text", 3, [1, 2], torch.ones(3), {}, {"a": 1}):
        yield f"model of {type(other).__name__} {other}", damaged(saved({"model": other}))
    yield "list", damaged(saved([1, 2]), "list")
    yield "no weights", damaged(saved({"epoch": 3}), "epoch")
    yield "numbers as keys", damaged(saved({"model": {1: torch.ones(1)}}), "1")
    escapes = saved(state(**{"a\n\x1b[31mb\ud800": torch.ones(1)}))
    yield "escapes", damaged(escapes, r"a\n\x1b[31mb\ud800")
    exponent = saved({"model": state(), "qk_scale_factor": 1e308})
    yield "exponent", damaged(exponent, "qk_scale_factor")
    yield "gelu", damaged(saved({"model": state(), "gelu": torch.ones(2)}), "gelu")
    yield "kwargs", loads(saved({"model": state(), "model_kwargs": [1]}))
    yield "mindspore", damaged(saved({"mindspore": [1]}), "mindspore")

    room = entry([2, 4], 0, 32)
    yield "safetensors", loads(safetensors.torch.save(state()))
    for header, length in (
        (b"{}", 1 << 63),
        (b"{" + b" " * 1000, GIB),
        ({"a": entry([GIB], 0, 4 * GIB)}, None),
        ({"a": room, "b": room}, None),
        ({"a": entry([1 << 40, 1 << 40], 0, 32)}, None),
        (b'{"a":%s,"a":%s}' % ((json.dumps(room).encode(),) * 2), None),
        (b'{"\xff\xfe":1}', None),
        (b'{"a":' * 10**5, None),
        ({"__metadata__": {"model_kwargs": "[" * 10**5}}, None),
    ):
        yield f"safetensors {header}"[:80] + f"{length}", damaged(safe(header, FLOATS, length))

    good = record(b"bias", [2], b"Float32", bytes(8)) + record(
        b"weight", [2, 4], b"Float32", FLOATS
    )
    yield "MindSpore", damaged(good, "weight")

    yield "good", loads(saved({"model": state(), "args": Namespace(lr=0.1)}))
    yield "good by hand", loads(weights_and(b"N"))
    yield "good legacy", loads(legacy(mapping(**OLD)))
    yield "not finite", loads(saved(state(bias=torch.tensor([float("nan"), float("inf")]))))
    yield "empty", damaged(b"")
    yield "zeros", damaged(bytes(1000))
    yield "text", damaged(b"hello " * 100)


FILES = [*programs(), *bombs(), *archives(), *tensors(), *contents()]
CORPUS = dict(FILES)
assert len(CORPUS) == len(FILES)


def memory(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(key))


@pytest.fixture(scope="module", autouse=True)
def imported(tmp_path_factory):
    """What the first reading imports takes memory, too."""
    path = tmp_path_factory.mktemp("first") / "good.pth"
    path.write_bytes(CORPUS["good"][0])
    load_checkpoint(torch.nn.Linear(4, 2), path)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", CORPUS)
def test_file(name, tmp_path, monkeypatch):
    data, kind, named = CORPUS[name]
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "file.pth"
    path.write_bytes(data)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before, error = memory("VmRSS"), None
    try:
        load_checkpoint(torch.nn.Linear(4, 2), path)
    except CheckpointError as caught:
        error = caught
    assert memory("VmHWM") - before < MEMORY
    assert [file.name for file in tmp_path.iterdir()] == ["file.pth"]  # nothing ran
    assert (type(error) if error else None) is kind, error
    if error:
        message = str(error)
        assert message.isprintable() and len(message) < 2100  # one line for a terminal
        assert str(path) in message and named in message


def test_paths_that_are_not_files(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for path in (tmp_path / "none", tmp_path, tmp_path / "pipe", tmp_path / "loop", "/dev/zero"):
        refused(partial(load_checkpoint, torch.nn.Linear(4, 2), path), path, kind=CheckpointError)
