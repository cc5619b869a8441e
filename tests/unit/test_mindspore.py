"""MindSpore's files: read right or refused, and MindCV's names converted."""

import random
import tracemalloc
import zlib
from functools import partial

import numpy as np
import pytest
import safetensors.torch
import timm
import torch

import models
from models.checkpoint.mindcv_names import fill_missing_bias_tables, to_original_names
from models.checkpoint.mindspore import looks_like_mindspore, read_mindspore
from models.convit import ConViT
from models.visformer import Stage, Visformer
from models.vit import ViT

BOTTLENECK = {"mlp_ratio": 2.0, "spatial_groups": 8}
V1 = (Stage(2, 8, 4, **BOTTLENECK), Stage(1, 16, num_heads=2), Stage(1, 32, num_heads=2))
V2 = (
    Stage(1, 4, **BOTTLENECK),
    Stage(1, 8, **BOTTLENECK),
    Stage(2, 16, num_heads=2, window=14),
    Stage(1, 32, num_heads=4, window=7),
)


@pytest.fixture(scope="module")
def folder(shared):
    return shared / "goldens" / "mindspore"


def varint(value):
    digits = []
    while value >= 0x80:
        digits.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*digits, value])


def field(number, value):
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def tensor(dims, kind=b"Float32", content=b""):
    return b"".join(field(1, d) for d in dims) + field(2, kind) + field(3, content)


def record(tag, *arguments):
    return field(1, field(1, tag) + field(2, tensor(*arguments)))


def read_bytes(tmp_path, content):
    path = tmp_path / "file.ckpt"
    path.write_bytes(content)
    return read_mindspore(path)


def crc_trailer(content):
    return b"crc_num" + zlib.crc32(content).to_bytes(10, "big")


def ends_of_records(content):
    ends = [0]
    while ends[-1] < len(content):
        at, length, shift = ends[-1] + 1, 0, 0
        while True:
            length |= (content[at] & 0x7F) << shift
            shift, at = shift + 7, at + 1
            if content[at - 1] < 0x80:
                break
        ends.append(at + length)
    return ends


def test_every_type_reads_as_mindspore_wrote_it(folder):
    tensors = read_mindspore(folder / "format" / "tiny.ckpt")
    expected = dict(np.load(folder / "format" / "tiny.npz"))
    assert {*tensors, "note", "jp"} == set(expected)  # two are texts
    assert tensors["bf16.weight"].dtype == torch.bfloat16
    for name, value in tensors.items():
        array = (value.float() if value.dtype == torch.bfloat16 else value).numpy()
        assert array.dtype == expected[name].dtype, name
        assert array.shape == expected[name].shape, name
        assert array.tobytes() == expected[name].tobytes(), name
    assert read_mindspore(folder / "format" / "empty0.ckpt") == {"z": torch.tensor([1.25])}


def test_trailer_is_verified_and_left_out(folder, tmp_path):
    expected = np.load(folder / "format" / "tiny.npz")
    content = (folder / "format" / "tiny_crc.ckpt").read_bytes()
    tensors = read_bytes(tmp_path, content)
    assert len(tensors) == 4 and all(
        np.array_equal(value.numpy(), expected[name]) for name, value in tensors.items()
    )
    assert read_bytes(tmp_path, content[:-17]).keys() == tensors.keys()  # an older MindSpore's
    for at in (5, 3000, len(content) - 1):
        broken = bytearray(content)
        broken[at] ^= 1
        with pytest.raises(models.CheckpointError, match=f"CRC.*{zlib.crc32(broken[:-17]):#010x}"):
            read_bytes(tmp_path, bytes(broken))


@pytest.mark.parametrize(
    ("name", "named"),
    [
        *((f"tiny_{kind.lower()}", kind) for kind in ("AES-CBC", "AES-GCM", "SM4-CBC")),
        ("c64", "'c64'.*'complex64'.*int8, .*str"),
    ],
)
def test_what_cannot_be_read_is_refused(folder, name, named):
    path = folder / "format" / f"{name}.ckpt"
    assert looks_like_mindspore(path.read_bytes()[:256], path.stat().st_size)
    with pytest.raises(models.CheckpointError, match=f"{path}: .*{named}"):
        read_mindspore(path)


def test_every_cut_is_seen_but_those_between_records(folder, tmp_path):
    content = (folder / "format" / "tiny.ckpt").read_bytes()
    whole = read_bytes(tmp_path, content)
    ends = ends_of_records(content)
    assert ends[-1] == len(content)
    readable = {}
    cuts = {*ends, *(end + 1 for end in ends), *(end - 1 for end in ends), *range(0, ends[-1], 5)}
    for cut in cuts & set(range(len(content))):
        try:
            readable[cut] = read_bytes(tmp_path, content[:cut])
        except models.CheckpointError:
            continue
    assert set(readable) <= set(ends)
    assert len(readable) == len(ends) - 2 - 3  # not at 0, not whole, not within sliced ones
    for tensors in readable.values():
        assert list(tensors) == list(whole)[: len(tensors)]
        assert all(torch.equal(value, whole[name]) for name, value in tensors.items())


def test_flipped_bytes_raise_or_read(folder, tmp_path):
    content = (folder / "format" / "tiny_crc.ckpt").read_bytes()[:-17]
    small = content[: ends_of_records(content)[3]]
    small += record(b"x", [2, 3], b"Float16", b"12" * 6) + record(b"n", [0], b"str", b"a\0\0\0")
    small += record(b"y", [2], b"Float64", b"12345678") * 2
    assert len(read_bytes(tmp_path, small)) == 5
    chance = random.Random(0)
    refused = 0
    for _ in range(1000):
        broken = bytearray(small)
        for _ in range(chance.choice([1, 1, 2, 8])):
            # headers are few, contents long: aim at the ends, which hold more of them
            at = chance.choice([chance.randrange(len(small)), chance.randrange(30), -1])
            broken[at if at >= 0 else -chance.randrange(1, 160)] = chance.randrange(256)
        looks_like_mindspore(bytes(broken[:256]), len(broken))
        try:
            tensors = read_bytes(tmp_path, bytes(broken))
        except models.CheckpointError:
            refused += 1
        else:
            assert sum(v.numel() * v.itemsize for v in tensors.values()) <= len(small)
    assert 250 < refused < 1000


HUGE = 1 << 62
FOUR = b"Int32", b"1234"
EIGHT = b"Int32", b"12345678"
w = partial(record, b"w")
other = record(b"v", [], b"Bool", b"1")


def message(*fields):
    return field(1, b"".join(field(number, value) for number, value in fields))


BAD = {  # content, and what the message names
    "empty": (b"", ""),
    "text": (b"no checkpoint", "byte 0"),
    "huge record": (b"\n" + varint(HUGE) + b"x", f"{HUGE} bytes.* 1 "),
    "endless number": (b"\n" + b"\xff" * 20, "64 bits"),
    "number of 65 bits": (b"\n" + b"\xff" * 9 + b"\x02", "64 bits"),
    "cut number": (b"\n\xff", ""),
    "huge tag": (field(1, b"\n" + varint(HUGE) + b"ab"), f"field 1 .*{HUGE} bytes of 2"),
    "huge content": (message((1, b"w"), (2, b"\x1a" + varint(HUGE))), f"'w': field 3.*{HUGE}"),
    "huge dimension": (w([HUGE], *FOUR), f"'w': .*{HUGE}"),
    "overflowing dimensions": (w([1 << 32] * 4, b"Int8", b"1"), f"'w': .*{1 << 32}"),
    "overflow to one": (w([1 << 63, 2], b"Int8", b"1"), f"'w': dimension 0 .*-{1 << 63}"),
    "huge and zero": (w([0, HUGE], b"Int8"), f"'w': .*{HUGE}"),
    "negative dimension": (w([1, (1 << 64) - 3], *FOUR), "'w': dimension 1 .*-3"),
    "many dimensions": (w([1] * 33, *FOUR), "'w': .* 32 "),
    "packed dimensions": (w([b"\x01"], *FOUR), "'w': field 1 "),
    "too long": (w([1], *EIGHT), "'w': 8 bytes .* 4 "),
    "too short": (w([2], *FOUR), "'w': 4 .* 8 bytes"),
    "no content": (w([1]), "'w': 0 bytes .* 4 "),
    "scalar of two": (w([0], *EIGHT), "'w': 8 bytes .* 4 "),
    "long scalar": (w([], *EIGHT), "'w': 8 bytes .* 4 "),
    "unknown type": (w([1], b"Float8", b"1"), "'w': .*'float8'"),
    "type no text": (w([1], b"\xff", b"1"), "'w': .* type"),
    "no type": (message((1, b"w"), (2, field(3, b"1"))), "'w': .* type"),
    "no value": (message((1, b"w")), "'w': .* value"),
    "no name": (message((2, tensor([1], *FOUR))), " name"),
    "name no text": (record(b"\xff\xfe", [1], *FOUR), " name"),
    "two names": (message((1, b"a"), (1, b"b")), "field 1 "),
    "map": (message((1, b"w"), (3, b"")), "map tensor"),
    "unknown field": (message((1, b"w"), (4, b"")), "field 4 "),
    "number for text": (message((1, 5)), "field 1 "),
    "wire type": (field(1, b"\x0d1234"), "wire type 5"),
    "twice": (w([1], *FOUR) * 2, "'w'"),
    "twice, apart": (w([1], *FOUR) + other + w([1], *FOUR), "'w'"),
    "slices apart": (w([2], *FOUR) + other + w([2], *FOUR), "'w': 4 .* 8 bytes"),
    "slices of two shapes": (w([2], *FOUR) + w([1, 2], *FOUR), "'w'"),
    "text among slices": (w([2], *FOUR) + w([0], b"str", b"a\0\0\0"), "'w'"),
    "last slice too long": (w([2], *FOUR) + w([2], *EIGHT), "'w': 8 bytes .* 4 "),
    "text of bad UTF-32": (w([0], b"str", b"\xff" * 4), "'w': .* value"),
    "text with a shape": (w([3], b"str", b"a\0\0\0" * 3), r"'w': .*\(3,\)"),
    "text twice": (w([0], b"str", b"a\0\0\0") * 2, "'w'"),
}


@pytest.mark.parametrize("kind", BAD)
def test_lies_are_named(tmp_path, kind):
    content, named = BAD[kind]
    for trailer in (b"", crc_trailer(content)) if content else (b"",):
        with pytest.raises(models.CheckpointError, match=f"file.ckpt: .*{named}"):
            read_bytes(tmp_path, content + trailer)


def test_lies_cost_no_memory(tmp_path):
    lies = [b"\n" + varint(1 << 30), w([1 << 30], b"Int8", b"1")]
    lies.append(message((1, b"w"), (2, b"\x1a" + varint(1 << 30))))
    tracemalloc.start()
    for lie in lies:
        with pytest.raises(models.CheckpointError):
            read_bytes(tmp_path, other + lie)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 20


def test_unusual_forms(tmp_path):
    content = record(b"a", [0], b"FLOAT32", b"\0\0\x80?") + record(b"b", [0, 3], b"Int8")
    content += record(b"c", [3], b"bool", b"\0\1\2") + record(b"d", [0], b"str", b"")
    content += message((2, tensor([1], b"Int8", b"7")), (1, "é".encode()))
    tensors = read_bytes(tmp_path, content)
    assert tensors["a"].shape == () and tensors["a"] == 1.0
    assert tensors["b"].shape == (0, 3) and tensors["b"].dtype == torch.int8
    assert tensors["c"].tolist() == [False, True, True]
    assert tensors["é"].tolist() == [ord("7")]


def test_recognition_by_content(folder, tmp_path):
    for path in sorted(folder.glob("*/*.ckpt")):
        content = path.read_bytes()
        for known in (16, 64, 256):
            assert looks_like_mindspore(content[:known], len(content)), path
    path = tmp_path / "x"
    state = {"a": torch.zeros(4)}
    others = [b"", b"\n", b"\nno\n\ncheckpoint", b"\n\n\n\n\n\n", b"text" * 90, bytes(300)]
    others.append(b"\n\x04\n\x05abcde\x12")  # a name longer than its record
    for zip_form in (True, False):
        torch.save(state, path, _use_new_zipfile_serialization=zip_form)
        others.append(path.read_bytes())
    for extra in range(0, 600, 2):  # headers of every length, 10 (the record's mark) among them
        header = b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}' + b" " * extra
        others.append(len(header).to_bytes(8, "little") + header)
    others.append((0x0A7B0A).to_bytes(8, "little") + b'{"\x12' + b" " * 0x0A7B08)
    others.append(safetensors.torch.save(state))
    for content in others:
        assert not looks_like_mindspore(content[:256], len(content)), content[:20]


def test_version_2_gets_zero_bias_tables(folder):
    net = Visformer(V2, 8, img_size=64, num_classes=10, qk_scale_factor=-0.5)
    own = net.state_dict()
    weights, dropped = to_original_names(read_mindspore(folder / "nets" / "visformer_v2.ckpt"))
    filled = fill_missing_bias_tables(weights, own)
    tables = [key for key in filled if key not in weights]
    assert tables == [f"stage{i}.attn.relative_position_bias_table" for i in ("2.0", "2.1", "3.0")]
    assert dropped == () and not any(filled[key].any() for key in tables)
    assert {k: v.shape for k, v in filled.items()} == {
        k: v.shape for k, v in own.items() if not k.endswith("num_batches_tracked")
    }
    partial = {key: value for key, value in filled.items() if key != tables[0]}
    assert fill_missing_bias_tables(partial, own).keys() == partial.keys()


def test_convit_s_projections_are_joined(folder):
    state = read_mindspore(folder / "nets" / "convit.ckpt")
    weights, dropped = to_original_names(state)
    assert dropped == ()
    for i in (0, 1):
        q, k, v = (state[f"blocks.{i}.attn.{part}.weight"] for part in "qkv")
        assert torch.equal(weights[f"blocks.{i}.attn.qk.weight"], torch.cat([q, k]))
        assert torch.equal(weights[f"blocks.{i}.attn.v.weight"], v)
        for name in ("gating_param", "pos_proj.weight", "pos_proj.bias"):
            assert weights[f"blocks.{i}.attn.{name}"] is state[f"blocks.{i}.attn.{name}"]
    parts = [state[f"blocks.2.attn.{part}.weight"] for part in "qkv"]
    assert torch.equal(weights["blocks.2.attn.qkv.weight"], torch.cat(parts))
    assert torch.equal(weights["head.weight"], state["classifier.weight"])
    original = timm.models.convit.convit_tiny(  # timm's embed_dim is that of one head
        img_size=28, patch_size=2, embed_dim=4, num_heads=4, depth=3, local_up_to_layer=2
    )
    assert set(weights) == set(original.state_dict())
    with pytest.raises(ValueError, match=r"blocks.2.attn.k.weight"):
        to_original_names(state | {"blocks.2.attn.k.weight": torch.ones(())})
    del state["blocks.2.attn.k.weight"]
    with pytest.raises(ValueError, match=r"blocks.2.attn.q.weight.* blocks.2.attn.k.weight"):
        to_original_names(state)


def old_vit_name(name):
    """A name of MindCV 0.5's ViT -> that of 0.2.2."""
    pieces = name.split(".")
    if pieces[0] == "blocks":
        inner = {
            "norm1": "0.cell.0",
            "attn.qkv": "0.cell.1.qkv",
            "attn.proj": "0.cell.1.out",
            "norm2": "1.cell.0",
            "mlp.fc1": "1.cell.1.dense1",
            "mlp.fc2": "1.cell.1.dense2",
        }[".".join(pieces[2:-1])]
        return f"backbone.transformer.layers.{pieces[1]}.{inner}.{pieces[-1]}"
    if pieces[0] == "head":
        return name.replace("head.", "head.classifier.")
    name = name.replace("pos_embed", "pos_embedding")
    return "backbone." + name.replace("patch_embed.proj", "patch_embedding.conv")


def test_older_names_of_vit(folder):
    state = read_mindspore(folder / "nets" / "vit.ckpt")
    expected, _ = to_original_names(state)
    old = {old_vit_name(name): value for name, value in state.items()}
    assert "backbone.transformer.layers.1.1.cell.1.dense2.weight" in old
    weights, dropped = to_original_names(old)
    assert dropped == () and weights.keys() == expected.keys()
    assert all(weights[name] is expected[name] for name in expected)


@pytest.mark.parametrize("name", ["visformer_v1", "visformer_v2", "convit", "vit"])
def test_training_checkpoints(folder, name):
    net = read_mindspore(folder / "nets" / f"{name}.ckpt")
    slots = {
        f"{slot}.{key}": torch.zeros(())
        for slot in ("adam_m", "adam_v", "moment1")
        for key in net
        if "moving" not in key
    }
    average = {f"ema.{key}": value + 1 for key, value in net.items()}
    counters = dict.fromkeys(("epoch_num", "global_step", "scale_sense"), torch.zeros(()))
    counters["learning_rate"] = torch.zeros(50)
    plain, none = to_original_names(net)
    raw, dropped = to_original_names(net | slots | average | counters)
    assert none == ()
    assert {k: v.tolist() for k, v in raw.items()} == {k: v.tolist() for k, v in plain.items()}
    assert set(dropped) == {*slots, *average, *counters}
    smooth, dropped = to_original_names(net | slots | average | counters, ema=True)
    assert smooth.keys() == raw.keys()
    assert all(torch.equal(smooth[key], raw[key] + 1) for key in raw)
    assert set(dropped) == {*slots, *net, *counters}
    with pytest.raises(ValueError, match=r"'ema.'"):
        to_original_names(net | slots, ema=True)


def test_conversion_changes_nothing_and_refuses_names_that_become_one():
    one = torch.ones(1)
    state = {"norm.gamma": one, "unknown.thing": one}
    weights, dropped = to_original_names(state)
    assert list(state) == ["norm.gamma", "unknown.thing"] and dropped == ()
    assert list(weights) == ["norm.weight", "unknown.thing"]  # a strict load names the rest
    with pytest.raises(ValueError, match=r"norm.weight"):
        to_original_names({"norm.gamma": one, "norm.weight": one})


NETS = {
    "visformer_v1": (64, lambda: Visformer(V1, 8, img_size=64, num_classes=10)),
    "visformer_v2": (64, lambda: Visformer(V2, 8, img_size=64, num_classes=10)),
    "convit": (28, lambda: ConViT(28, 2, 3, 10, "token", 16, 3, 4, local_up_to_layer=2)),
    "vit": (32, lambda: ViT(32, 8, num_classes=10, embed_dim=24, depth=2, num_heads=3)),
}


@pytest.mark.parametrize("name", NETS)
def test_files_load_as_checkpoints_and_bring_their_function(folder, tmp_path, name):
    size, build = NETS[name]
    model = build().eval()
    path = folder / "nets" / f"{name}.ckpt"
    report = models.load_checkpoint(model, path)
    assert "tanh" in " ".join(report.notes)
    x = np.random.default_rng(0).standard_normal((2, 3, size, size))
    expected = torch.from_numpy(np.load(path.with_suffix(".logits.npy")))
    with torch.no_grad():
        logits = model(torch.from_numpy(x.astype(np.float32)))
    assert (logits - expected).abs().max() < 1e-5
    cut = tmp_path / "cut.ckpt"
    cut.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(models.CheckpointError, match=f"{cut}: "):
        models.load_checkpoint(model, cut)
