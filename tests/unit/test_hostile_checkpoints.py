"""Hostile and broken checkpoint files: what each leads to, and that memory and disk stay as are."""

import io
import json
import os
import pickle
import re
import struct
import tarfile
import zipfile
from argparse import Namespace

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import run_python

MEMORY = 200 << 20  # bytes that reading any of the files may take
GIB = 1 << 30
FLOATS = struct.pack("<8f", *range(8))
MAGIC = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03.\x80\x02}."

# reads every file of a folder into a model of one layer, and says how it went
READER = """
import json, resource, sys, warnings
from pathlib import Path
import torch
from models import CheckpointError, load_checkpoint

warnings.simplefilter("error")


def status(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(key))


good, *others = sys.argv[1:]
load_checkpoint(torch.nn.Linear(4, 2), good)  # what the first reading imports is no file's fault
for path in others:
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before, outcome = status("VmRSS"), "loaded"
    try:
        load_checkpoint(torch.nn.Linear(4, 2), path)
    except CheckpointError as error:
        outcome = str(error)
    print(json.dumps([outcome, status("VmHWM") - before]), flush=True)
"""


# --- pickles by hand ------------------------------------------------------------------------


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


def record(tag, dims, content, claimed=None):
    """A parameter as MindSpore writes it."""

    def field(key, data, length=None):
        return bytes([key << 3 | 2]) + varint(len(data) if length is None else length) + data

    def varint(value):
        return bytes([value & 127 | 128]) + varint(value >> 7) if value > 127 else bytes([value])

    sizes = b"".join(b"\x08" + varint(dim) for dim in dims)
    value = field(1, tag) + field(2, sizes + field(2, b"Float32") + field(3, content, claimed))
    return field(1, value)


class Trap:
    def __init__(self, function, *arguments):
        self.reduced = function, arguments

    def __reduce__(self):
        return self.reduced


class Remade(Namespace):
    def __setstate__(self, state):
        raise AssertionError("ran")


def patched(data, what, other, count=-1):
    assert what in data and len(what) == len(other)
    return data.replace(what, other, count)


def state(**extra):
    return {"weight": torch.ones(2, 4), "bias": torch.zeros(2)} | extra


ASKS, CUT = "is refused: it asks for ", "is damaged or cut short"
ENDS = "nested more than 100 deep"


def corpus(folder):
    """Name of a file -> its content, and what its reading says; empty where it loads."""
    sprung = f"touch {folder / 'sprung'}"
    system, line = Trap(os.system, sprung), f"open({str(folder / 'sprung')!r}, 'w')"
    good = saved(state())
    yield "good", saved({"model": state(), "args": Namespace(lr=0.1)}), ""
    yield "good by hand", weights_and(b"N"), ""
    yield "good legacy", legacy(mapping(**OLD)), ""
    yield "not finite", saved(state(bias=torch.tensor([float("nan"), float("inf")]))), ""

    # programs
    for protocol in (0, 1, 2, 3, 4, 5):
        data = pickle.dumps({"model": system}, protocol)
        yield f"bare system {protocol}", data, "is not a checkpoint"
        yield f"zip system {protocol}", archive(records={"data.pkl": data}), " is "
    yield "zip system", saved(system), ASKS + "posix.system"
    yield "legacy system", saved(system, _use_new_zipfile_serialization=False), ASKS + "posix"
    for function in (eval, exec, getattr, __import__):
        yield function.__name__, saved(Trap(function, line)), f"{ASKS}builtins.{function.__name__}"
    for name in ("torch.hub.load", "torch.serialization.load", "torch.load", "pickle.loads"):
        yield name, weights_and(call(name, text(line))), ASKS + name
    yield "numpy objects", saved(np.array([{}, None], dtype=object)), ASKS + "numpy"
    yield "Namespace subclass", saved(Remade(a=1)), ASKS + "test_hostile_checkpoints.Remade"
    blank = named("argparse.Namespace") + b")\x81"
    for attribute in ("__class__", "__dict__", "__setstate__"):
        changed = blank + mapping(**{attribute: named("collections.OrderedDict")}) + b"b"
        yield attribute, weights_and(changed), "no attribute of plain values"
    slots = blank + several(b"N", mapping(__class__=named("collections.OrderedDict"))) + b"b"
    yield "slots", weights_and(slots), "no attribute of plain values"
    yield "calls a value", weights_and(text("os") + b")R"), "calls what is no function"
    parts = {"constants.pkl": program(b"N"), "code/net.py": b"import os"}
    yield "TorchScript", archive(records=parts), "is a TorchScript program"

    # memory and time
    many = call("builtins.bytearray", number(10**11))
    yield "bytearray", weights_and(many), ASKS + "builtins.bytearray"
    yield "Tensor", weights_and(call("torch.Tensor", number(10**11))), ASKS + "torch.Tensor"
    hexed = text("A" * 64)
    for _ in range(40):
        hexed = call("_codecs.encode", hexed, text("hex"))
    yield "codecs", weights_and(hexed), "calls _codecs.encode as torch.save never does"
    laughs = b"]q\x00" + b"](h\x00h\x00eq\x00" * 60
    yield "laughs", weights_and(laughs), "repeat each other"
    yield "laughs called", weights_and(laughs + b")R"), "repeat each other"
    key = b")q\x00" + b"h\x00h\x00\x86q\x00" * 9
    yield "laughs as a key", weights_and(b"}" + key + b"Ns"), "key of a dict or a set"
    yield "deep", weights_and(b"]" * 10**6 + b"a" * (10**6 - 1)), ENDS + "|has more than"
    yield "deep tuple", weights_and(b"N" + b"\x85" * 10**6), ENDS
    yield "deep marks", weights_and(b"(" * 10**6), ENDS
    yield "itself", weights_and(b"]q\x00h\x00a"), "contains itself|changes after"
    yield "itself as state", archive(b"}q\x00" + text("model") + b"h\x00s"), "contains itself"
    yield "long text", weights_and(b"X\xff\xff\xff\xff"), CUT
    yield "long number", weights_and(b"\x8b\xff\xff\xff\x7f"), "is not a checkpoint"
    yield "long bytes", weights_and(b"\x8e" + b"\xff" * 8), "is not a checkpoint"
    yield "far memo", weights_and(b"Nr\xff\xff\xff\xff"), ""
    yield "half a million entries", saved(state() | {str(i): i for i in range(500_000)}), ""
    yield "two million entries", weights_and(b"](" + b"K\0" * 2_000_000 + b"e"), ""
    yield "million lists", weights_and(b"](" + b"]" * 10**6 + b"e"), "has more than"
    yield "no end of opcodes", weights_and(b"](" + b"N" * 3 * 10**6 + b"e"), "more than 2097152"
    yield "no entries", archive(mapping(model=b"}")), "has no weights"

    # archives
    bomb = {"data/0": bytes(100 << 20)}
    yield "bomb", archive(b"N", zipfile.ZIP_DEFLATED, bomb), "is compressed"
    size = struct.pack("<LL", 32, 32)
    for name, other in (("huge", 0xFFFFFFF0), ("longer", 1 << 20), ("shorter", 8)):
        lying = struct.pack("<LL", other, other)
        yield f"{name} record", patched(weights_and(b"N"), size, lying), " is "
    more = archive(mapping(**WEIGHTS), records={"more": bytes(33)})
    into_the_next = patched(more, struct.pack("<LL", 33, 33), struct.pack("<LL", 90, 90))
    yield "record into the directory", into_the_next, "its records overlap"
    twice = weights_and(b"N").replace(b"archive/version", b"archive/data/00", 1)
    yield "another name", twice, "its directory and its records differ"
    with pytest.warns(UserWarning, match="Duplicate name"):
        double = io.BytesIO(weights_and(b"N"))
        with zipfile.ZipFile(double, "a") as file:
            file.writestr("archive/data.pkl", program(b"N"))
    yield "two pickles", double.getvalue(), "there twice"
    upper = archive(mapping(**WEIGHTS), records={"DATA.pkl": program(b"N")})
    yield "two pickles by case", upper, "there twice"
    yield "two directories", weights_and(b"N") + good, "does not end as an archive|overlap"
    directory = good.rindex(b"PK\x01\x02")
    offset = struct.pack("<L", 0)
    lying = good[: directory + 42] + offset + good[directory + 46 :]
    yield "overlapping records", lying, "differ|overlap"
    yield "cut", good[: len(good) // 2], CUT
    yield "only the start", good[:4], CUT
    yield "zip with nothing", b"PK\5\6" + bytes(18), "is not a checkpoint"
    yield "zip of anything", archive(b"N", records={"data.pkl": b"hello"}), "is not a checkpoint"
    yield "comment", good[:-2] + b"\5\0hello", "does not end as an archive"

    # tensors
    huge = {"weight": tensor((10**6, 10**6), (0, 0))}
    yield "no strides", archive(mapping(**huge)), "far too small for a tensor"
    lots = b"".join(text(f"w{i}") + tensor((10**6,), (0,)) for i in range(100))
    yield "no strides, often", archive(b"}(" + lots + b"u"), "far too small for a tensor"
    for name, shape in {
        "beyond its storage": {"size": (10**9,), "strides": (1,)},
        "long stride": {"size": (2, 4), "strides": (10**9, 1)},
        "far offset": {"size": (2, 4), "strides": (4, 1), "offset": 10**9},
        "storage beyond its record": {"size": (10**9,), "strides": (1,), "count": 10**9},
        "storage within its record": {"size": (2,), "strides": (1,), "count": 4},
        "no such record": {"size": (2, 4), "strides": (4, 1), "key": "../1"},
    }.items():
        yield name, archive(mapping(weight=tensor(**shape))), CUT
    for name, shape in {
        "negative size": {"size": (-1,), "strides": (1,)},
        "negative stride": {"size": (2, 4), "strides": (-4, 1)},
        "no bytes, huge shape": {"size": (0, 1 << 61), "strides": (1, 1)},
    }.items():
        yield name, archive(mapping(weight=tensor(**shape))), "is refused"
    swapped = legacy(mapping(weight=tensor((10**9,), (1,), count=10**9, view=b"N")))
    yield "legacy huge storage", swapped, CUT
    yield "legacy lying storage", legacy(mapping(**OLD), length=1 << 40), CUT
    yield "legacy without data", legacy(mapping(**OLD), keys=()), "is not a checkp"
    yield "legacy cut", legacy(mapping(**OLD))[:-1], CUT
    yield "tar", tar(), "is not a checkpoint"
    yield "meta", saved(state(weight=torch.ones(2, 4, device="meta"))), ASKS + "torch._utils"
    yield "sparse", saved(state(weight=torch.ones(2, 4).to_sparse())), ASKS + "torch"
    yield "complex", saved(state(weight=torch.ones(2, 4) + 1j)), "of another kind: weight"
    yield "integers", saved(state(weight=torch.ones(2, 4).int())), "of another kind: weight"
    for other in ("text", 3, [1, 2], torch.ones(3), {}, {"a": 1}):
        yield f"model of {type(other).__name__} {other}", saved({"model": other}), " "
    yield "numbers as keys", saved({"model": {1: torch.ones(1)}}), "under 1, which is no name"
    escapes = saved(state(**{"a\n\x1b[31mb\ud800": torch.ones(1)}))
    yield "escapes", escapes, r"not in the model: a\\n\\x1b\[31mb\\ud800"
    yield "exponent", saved({"model": state(), "qk_scale_factor": 1e308}), "qk_scale_factor must"
    yield "gelu", saved({"model": state(), "gelu": torch.ones(2)}), "gelu must be"
    yield "kwargs", saved({"model": state(), "model_kwargs": [1]}), ""
    yield "mindspore", saved({"mindspore": [1]}), "has no weights"

    # safetensors
    room = entry([2, 4], 0, 32)
    yield "safetensors", safetensors.torch.save(state()), ""
    yield "long header", safe(b"{}", length=1 << 63), CUT
    yield "header of 1 GiB", safe(b"{" + b" " * 1000, length=GIB), CUT
    yield "offsets beyond", safe({"a": entry([GIB], 0, 4 * GIB)}, FLOATS), CUT
    yield "overlap", safe({"a": room, "b": room}, FLOATS), CUT
    yield "huge shape", safe({"a": entry([1 << 40, 1 << 40], 0, 32)}, FLOATS), CUT
    yield "same key", safe(b'{"a":%s,"a":%s}' % ((json.dumps(room).encode(),) * 2), FLOATS), " "
    yield "no UTF-8", safe(b'{"\xff\xfe":1}'), CUT
    yield "deep header", safe(b'{"a":' * 10**5), CUT
    notes = {"__metadata__": {"model_kwargs": "[" * 10**5}}
    yield "deep metadata", safe(notes), CUT

    # MindSpore
    yield "MindSpore", record(b"bias", (2,), bytes(8)) + record(b"weight", (2, 4), FLOATS), " "
    yield "MindSpore long", record(b"a.w", (2,), bytes(8), 1 << 60), "claims 1152921504606846976"
    yield "MindSpore huge", record(b"a.w", (1 << 60,), bytes(8)), "exceeds the file's"

    yield "empty", b"", "is empty"
    yield "zeros", bytes(1000), "is not a checkpoint"
    yield "text", b"hello " * 100, "is not a checkpoint"


def tar():
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as file:
        for name in ("storages", "tensors", "pickle"):
            file.addfile(tarfile.TarInfo(name), io.BytesIO())
    return buffer.getvalue()


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """The folder, and name -> path, what was expected, the outcome, the peak of memory."""
    folder = tmp_path_factory.mktemp("hostile")
    files = folder / "files"
    files.mkdir()
    cases = {}
    for number, (name, data, expected) in enumerate(corpus(folder)):
        path = files / f"{number}.pth"
        path.write_bytes(data)
        assert name not in cases
        cases[name] = path, expected
    os.mkfifo(files / "pipe")
    (files / "loop").symlink_to(files / "loop")
    cases["folder"] = files, "it is no regular file"
    cases["pipe"] = files / "pipe", "it is no regular file"
    cases["loop"] = files / "loop", "Too many levels of symbolic links"
    cases["device"] = "/dev/zero", "it is no regular file"
    paths = [path for path, _ in cases.values()]
    done = run_python("-c", READER, paths[0], *paths, timeout=120)
    assert (done.returncode, done.stderr) == (0, ""), list(cases)[len(done.stdout.splitlines())]
    found = map(json.loads, done.stdout.splitlines())
    for path in files.iterdir():
        path.unlink()
    return folder, {
        name: (*case, *outcome) for (name, case), outcome in zip(cases.items(), found, strict=True)
    }


def test_every_file_leads_where_it_should(outcomes):
    wrong = {
        name: outcome
        for name, (path, expected, outcome, _) in outcomes[1].items()
        if (outcome != "loaded") == (expected == "")
        or (expected and not (re.search(expected, outcome) and str(path) in outcome))
    }
    assert wrong == {}
    assert len(outcomes[1]) > 100


def test_errors_are_one_line_that_a_terminal_can_show(outcomes):
    for name, (_, _, outcome, _) in outcomes[1].items():
        assert outcome.isprintable() and len(outcome) < 2100, name


def test_memory_stays_small(outcomes):
    large = {name: peak >> 20 for name, (*_, peak) in outcomes[1].items() if peak > MEMORY}
    assert large == {}


def test_nothing_ran(outcomes):
    assert [path.name for path in outcomes[0].iterdir()] == ["files"]
