"""tools.flops: costs against closed formulas, and the papers' figures."""

import csv
import math

import pytest
import timm
import torch
from torch import nn

from tools import flops
from tools.flops.__main__ import PAPER, main, table
from tools.flops.counting import PartCost, Request, run, total, trace
from tools.flops.stages import by_stage

FAMILIES = ["visformer_tiny", "swin_visformer_tiny_v2", "convit_tiny", "fastvit_sa12"]
FAMILIES += ["vit_b_32_224"]


def counted(name, size, device="meta", **options):
    """Totals of a model at a size, for a batch of 2."""
    request = Request(name, size, 2, **options)
    model, taken = request.build(device)
    assert taken == size
    return total(model, trace(model, size, 2))


def layers(model, size):
    """Products of an image's convolutions and linear layers, and elements of their outputs.

    By the modules' own geometry, and the shapes that they give.
    """
    products, elements = 0, 0

    def add(module, inputs, out):
        nonlocal products, elements
        weights = module.weight[0].numel()  # of one output element
        products += out.numel() * weights
        elements += out.numel()

    hooks = [
        module.register_forward_hook(add)
        for module in model.modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
    ]
    with torch.no_grad():
        model(torch.zeros(1, 3, *size, device="meta"))
    for hook in hooks:
        hook.remove()
    return products, elements


def products_of_attention(name, height, width):
    """``2 N N`` products for every channel of every layer of attention, over N tokens."""
    large = (height // 16) * (width // 16)
    small = math.ceil(height / 32) * math.ceil(width / 32)
    if name == "visformer_tiny":
        return 4 * 2 * large**2 * 192 + 4 * 2 * small**2 * 384
    if name == "swin_visformer_tiny_v2":  # one window is as high as the map
        side = height // 32
        windows = math.ceil(width / height)
        return windows * (6 * 2 * (2 * side) ** 4 * 192 + 3 * 2 * side**4 * 384)
    if name == "fastvit_sa12":
        return 2 * 2 * small**2 * 512
    if name == "vit_b_32_224":
        return 12 * 2 * (1 + small) ** 2 * 768
    return 10 * 2 * large**2 * 192 + 2 * 2 * (1 + large) ** 2 * 192  # ConViT-Ti


@pytest.mark.parametrize(
    "size", [pytest.param((224, 224), marks=pytest.mark.slow), (96, 160)], ids=str
)
@pytest.mark.parametrize("name", FAMILIES)
def test_counts_are_those_of_the_formulas(name, size):
    with torch.device("meta"):
        kwargs = {} if name.startswith("fastvit") else {"img_size": size}
        model = timm.create_model(name, **kwargs).eval()
    products, elements = layers(model, size)
    products += products_of_attention(name, *size)
    rows, columns = size[0] // 16, size[1] // 16
    convit = name == "convit_tiny"
    # ten positional layers: along columns and along rows, for all 192 channels of the values
    separable = convit * 10 * rows * columns * (rows + columns) * 192
    # written out: scores of 4 heads of three features of pairs, the same for all images
    scores = convit * 10 * (rows * columns) ** 2 * 4
    parameters = sum(p.numel() for p in model.parameters())
    fused = counted(name, size)
    assert (fused.macs, fused.activations) == (2 * (products + separable), 2 * elements)
    explicit = counted(name, size, fused_attention=False)
    costs = (2 * products + 3 * scores, 2 * elements + scores)
    assert (explicit.macs, explicit.activations) == costs
    assert fused.parameters == explicit.parameters == parameters


@pytest.mark.slow
@pytest.mark.parametrize("name", [*FAMILIES[:4], "test_vit"])
def test_kernels_of_the_cpu_count_as_much(name):
    size = (64, 96) if name != "test_vit" else (160, 160)
    for fuse in (True, False) if name == "visformer_tiny" else (name != "test_vit",):
        assert counted(name, size, "cpu", fuse=fuse) == counted(name, size, fuse=fuse)


def test_folding_costs_nothing():
    # FastViT's branches become one convolution, its classifier and attention stay
    trained, folded = (counted("fastvit_sa12", (256, 256), fuse=fuse) for fuse in (False, True))
    assert folded.macs < trained.macs
    assert folded.activations < trained.activations


def rows_of(name, **options):
    model, counter = run(Request(name, **options))
    rows = by_stage(model, counter)
    whole = total(model, counter)
    for key in ("parameters", "macs", "activations"):
        assert sum(getattr(row, key) for row in rows) == getattr(whole, key)
    assert "rest" not in [row.name for row in rows]
    return rows


def test_stages_of_visformer():
    rows = {row.name: row for row in rows_of("visformer_tiny")}
    assert list(rows) == ["stem", "stage1", "stage2", "stage3", "norm", "head"]
    shapes = [(16, 112), (96, 28), (192, 14), (384, 7), (384, 7)]
    assert [rows[n].shape for n in list(rows)[:-1]] == [(1, c, s, s) for c, s in shapes]
    assert rows["head"].shape == (1, 1000)
    assert rows["stem"].macs == 112**2 * 16 * 3 * 49
    assert rows["head"].macs == 384 * 1000
    # embedding of 2x2 patches; four blocks: attention, norms, and a feed-forward part
    block = 4 * 384**2 + 2 * 4 * 384**2
    attention = 2 * 49**2 * 384
    assert rows["stage3"].macs == 49 * 192 * 4 * 384 + 4 * (49 * block + attention)
    norms = 2 * 2 * 384
    embed = 192 * 4 * 384 + 384 + 2 * 384 + 49 * 384  # bias, norm, positions
    assert rows["stage3"].parameters == embed + 4 * (block + norms)


def test_stages_of_others():
    def names(*args, **options):
        return [row.name for row in rows_of(*args, **options)]

    four = [f"stages.{i}" for i in range(4)]
    assert names("fastvit_t8", fuse=True) == ["stem", *four, "final_conv", "head"]
    assert names("visformer_net1") == ["stem", "stage3", "norm", "head"]
    assert names("convit_tiny") == ["embed", "blocks (12)", "norm", "head"]
    assert names("vit_b_32_224") == ["embed", "blocks (12)", "norm", "head"]
    assert names("test_convnext") == ["stem", *four, "head"]
    layers = [f"layer{i}" for i in range(1, 5)]
    assert names("test_resnet") == ["stem", *layers, "fc"]


def test_blocks_of_a_plain_transformer():
    model, counter = run(Request("convit_tiny"))
    rows = {row.name: row for row in by_stage(model, counter, blocks=True)}
    blocks = [f"blocks.{i}" for i in range(12)]
    assert list(rows) == ["embed", *blocks, "norm", "head"]
    assert rows["blocks.9"].shape == (1, 14, 14, 192)
    assert rows["blocks.10"].shape == (1, 197, 192)
    linear = 12 * 192**2
    assert rows["blocks.11"].macs == 197 * linear + 2 * 197**2 * 192
    assert rows["embed"].parameters == 3 * 256 * 192 + 192 + 196 * 192 + 192  # class token, too


def test_what_parts_share_is_counted_once():
    class Part(nn.Module):
        def __init__(self, shared, channels):
            super().__init__()
            self.shared, self.own = shared, nn.Conv2d(4, channels, 1, bias=False)

        def forward(self, x):
            return self.own(self.shared(x))

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.shared = nn.Conv2d(4, 4, 3, padding=1, bias=False)
            self.first, self.last = Part(self.shared, 4), Part(self.shared, 5)
            self.pretrained_cfg = {"input_size": (4, 8, 8)}

        def forward(self, x):
            return self.last(self.first(x)).mean((2, 3))

    model = Net()
    shared, own = 4 * 4 * 9, 4 * 4
    assert by_stage(model, trace(model, (8, 8))) == [
        PartCost("first", shared + own, 64 * (shared + own), 64 * (4 + 4), (1, 4, 8, 8)),
        PartCost("last", 4 * 5, 64 * (shared + 4 * 5), 64 * (4 + 5), (1, 5, 8, 8)),
    ]
    rows = rows_of("coat_lite_tiny")  # blocks share position encodings, which it holds as well
    assert all(row.macs >= 0 and row.parameters >= 0 for row in rows)


def test_what_is_in_no_part_is_the_rest():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Conv2d(3, 4, 1)
            self.unused = nn.Linear(5, 5)
            self.weight = nn.Parameter(torch.zeros(4, 6))
            self.pretrained_cfg = {"input_size": (3, 8, 8)}

        def forward(self, x):
            return self.first(x).mean((2, 3)) @ self.weight

    model = Net()
    rows = by_stage(model, trace(model, (8, 8)))
    assert rows == [
        PartCost("first", 12 + 4 + 24, 64 * 12, 256, (1, 4, 8, 8)),
        PartCost("rest", 30, 24, 0),
    ]


def test_paper_table(capsys):
    assert main(["visformer_tiny", "swin_visformer_small_v2"]) == 0
    printed = capsys.readouterr().out
    assert "| `visformer_tiny` | 10.3 | 10.3 | 1.27 | 1.3 | 5.00 | 78.6 |" in printed
    assert "| `swin_visformer_small_v2` | 23.6 | 23.6 | 4.27 | 4.3 | 13.80 | 83.0 |" in printed
    assert main(["visformer_tiny", "--no-fused-attention"]) == 0
    assert "| 1.27 |" in capsys.readouterr().out  # two products of attention, either way
    assert table({}).splitlines()[0].count("|") == 8


@pytest.mark.slow
def test_agrees_with_the_papers():
    for name, (parameters, gmacs, _) in PAPER.items():
        model, counter = run(Request(name))
        cost = total(model, counter).cost
        half = 0.5 * 10 ** -len(gmacs.partition(".")[2])  # of the last digit
        if name.startswith("convit"):  # the paper leaves attention's products out
            assert cost.gmacs - 12 * 2 * 197**2 * model.embed_dim / 1e9 == pytest.approx(
                float(gmacs), abs=1.05 * half
            ), name
            assert int(cost.parameters) == pytest.approx(int(parameters), abs=1), name
        elif name.startswith("fastvit"):
            assert cost.gmacs == pytest.approx(float(gmacs), abs=1.5 * half), name
        else:
            for value, printed in zip(cost, (parameters, gmacs), strict=False):
                digits = len(printed.partition(".")[2])
                assert f"{value:.{digits}f}" == printed, name
    # timm's table: ViT-B/16 has 16.49 M activations (results/model_metadata-in1k.csv)
    assert f"{flops.count('vit_base_patch16_224').activations:.2f}" == "16.49"


def test_every_model_is_of_a_family():
    names = flops.our_models()
    some = {"visformer_net7", "convit_base_plus", "fastvit_ma36", "vit_large_patch32_384"}
    assert some < set(names)
    assert "resnet50" not in names
    assert flops.size_options("fastvit_t8", 64) == {}
    assert flops.size_options("visformer_tiny", 224) == {}
    assert flops.size_options("visformer_tiny", (64, 96)) == {"img_size": (64, 96)}


def test_command_by_stage(tmp_path, capsys):
    path = tmp_path / "cost.csv"
    words = ["test_vit", "visformer_tiny", "--input-size", "64", "96", "--batch", "2", "--blocks"]
    assert main([*words, "--csv", str(path)]) == 0
    printed = capsys.readouterr().out
    assert "visformer_tiny, images 2x3x64x96" in printed
    assert "| head | 0.385 | 0.0008 | 0.002 | 2x1000 |" in printed
    with path.open() as file:
        lines = [row for row in csv.DictReader(file) if row["model"] == "test_vit"]
    assert [line["part"] for line in lines][:2] == ["embed", "blocks.0"]
    for key in ("parameters", "macs", "activations"):
        assert sum(int(line[key]) for line in lines[:-1]) == int(lines[-1][key])
    assert lines[-1]["part"] == "total"
    assert lines[-1]["output"] == "2x1000"


def test_models_that_need_no_gradients(capsys):
    assert main(["cait_xxs24_224"]) == 0
    assert "| 2.5" in capsys.readouterr().out


def test_checkpoints_say_what_they_are(tmp_path, capsys):
    kwargs = {"depth": 1, "embed_dim": 16, "num_heads": 2, "num_classes": 7, "img_size": 64}
    model = timm.create_model("vit_b_32_224", **kwargs)
    content = {"model": model.state_dict(), "model_name": "vit_b_32_224"}
    path = tmp_path / "vit.pth"
    torch.save(content | {"model_kwargs": kwargs, "input_size": 64}, path)
    assert main(["--checkpoint", str(path), "--stages"]) == 0
    printed = capsys.readouterr().out
    assert "vit_b_32_224, images 1x3x64x64" in printed
    assert "| blocks.0 |" in printed
    assert "| 1x7 |" in printed


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["visformer_tinyy"], "visformer_tiny"),
        (["resnet18.x"], "resnet18.x"),
        (["visformer_tiny", "--input-size", "50"], "64x64"),
        (["test_convnext", "--input-size", "64", "1"], "--input-size 64x1"),
        (["test_vit", "--fuse"], "--fuse"),
        (["--checkpoint", "none.pth"], "none.pth"),
        (["--checkpoint", "plain.pth"], "NAME"),
        (["visformer_tiny", "--checkpoint", "plain.pth"], "plain.pth"),
        (["visformer_tiny", "--checkpoint", "named.pth"], "test_vit"),
        (["test_vit", "--csv", "none/cost.csv"], "none/cost.csv"),
    ],
)
def test_errors_name_what_is_wrong(words, named, tmp_path, monkeypatch, capsys):
    state = timm.create_model("test_vit").state_dict()
    torch.save(state, tmp_path / "plain.pth")
    torch.save({"model": state, "model_name": "test_vit"}, tmp_path / "named.pth")
    monkeypatch.chdir(tmp_path)
    assert main(words) == 1
    output, printed = capsys.readouterr()
    assert printed.startswith("error: ") and named in printed and output == ""
    assert sorted(p.name for p in tmp_path.iterdir()) == ["named.pth", "plain.pth"]


@pytest.mark.parametrize("words", [["--input-size", "1", "2", "3"], ["--batch", "0"]])
def test_numbers_are_checked(words, capsys):
    with pytest.raises(SystemExit):
        main(["test_vit", *words])
    assert words[0] in capsys.readouterr().err
