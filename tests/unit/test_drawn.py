"""What is drawn in the pictures of tools.visualize are the numbers that belong there."""

import json

import numpy as np
import pytest
import timm
import torch
from conftest import write_images
from matplotlib.colors import to_rgb
from PIL import Image
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from visualizing import TINY, randomize

from tools.visualize import __main__ as visualize
from tools.visualize import distances
from tools.visualize.branches import Kernels
from tools.visualize.kernels import draw as draw_kernels
from tools.visualize.loading import Subject, find_images, load_pictures, load_subject
from tools.visualize.measures import cosine_similarities, gates, position_embeddings


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Images, and checkpoints of two epochs of a small ConViT."""
    folder = tmp_path_factory.mktemp("drawn")
    write_images(folder / "images", train=3, val=1, size=40)
    kwargs = {"num_classes": 3, "img_size": 16, **TINY}
    for epoch in (3, 8):
        torch.manual_seed(epoch)
        model = randomize(timm.create_model("convit_tiny", **kwargs), 0.3)
        with torch.no_grad():
            model.blocks[0].attn.gating_param.copy_(torch.randn(4))
        state = {"model": model.state_dict(), "model_name": "convit_tiny", "epoch": epoch}
        state |= {"model_kwargs": kwargs, "input_size": 16, "args": {"eval_crop_ratio": 0.5}}
        torch.save(state, folder / f"{epoch}.pth")
    return folder


@pytest.fixture
def draw(root):
    """``draw(*words) -> Picture``, not written; @ stands for the folder of the files."""

    def make(*words):
        words = [str(root / word[1:]) if word.startswith("@") else word for word in words]
        args = visualize.get_parser().parse_args(words)
        return visualize.KINDS[args.kind].make(args)

    return make


def panels(picture):
    """Axes by row and column, as they were laid out; colour bars left out."""
    axes = [ax for ax in picture.figure.axes if ax.get_subplotspec() and ax.axison]
    return {
        (ax.get_subplotspec().rowspan.start, ax.get_subplotspec().colspan.start): ax for ax in axes
    }


def as_map(rows, value, **chosen):
    """The numbers of the rows that are chosen, as a square map."""
    rows = [row for row in rows if all(row[key] == wanted for key, wanted in chosen.items())]
    y, x = ("dy", "dx") if "dy" in rows[0] else ("y", "x")
    first = min(row[y] for row in rows)
    side = max(row[y] for row in rows) - first + 1
    out = np.full((side, side), np.nan)
    for row in rows:
        out[row[y] - first, row[x] - first] = row[value]
    return out


def test_attention_panels(draw):
    words = ["attention", "--checkpoint", "@3.pth", "--image", "@images/val", "--part", "all"]
    picture = draw(*words, "--layers", "0", "--heads", "1", "3", "--query", "13,6")
    found = panels(picture)
    assert sorted(found) == [(0, column) for column in range(7)]
    for column in range(1, 7):
        ax = found[0, column]
        part, head = ("full", "content", "position")[(column - 1) // 2], (1, 3)[(column - 1) % 2]
        weights = as_map(picture.rows, "weight", part=part, head=head)
        assert ax.get_title() == f"{part}\nhead {head}"
        _, shown = ax.images
        np.testing.assert_allclose(shown.get_array(), weights / weights.max(), rtol=1e-6)
        assert shown.get_alpha() > 0.5 and ax.get_xlabel().startswith(f"max {weights.max():.2g}")
    for ax in found.values():  # x = 13 and y = 6 of 16 pixels: column 3 and row 1 of 4
        (frame,) = ax.patches
        assert (frame.get_xy(), frame.get_width(), frame.get_height()) == ((12, 4), 4, 4)
        assert frame.get_edgecolor()[:3] == to_rgb("red")
        assert (ax.get_xlim(), ax.get_ylim()) == ((0, 16), (16, 0))


def test_bias_panels(draw):
    picture = draw("bias", "swin_visformer_tiny_v2", "--input-size", "64", "--layers", "0", "8")
    for (row, head), ax in panels(picture).items():
        layer = picture.rows[-1 if row else 0]["layer"]
        bias = as_map(picture.rows, "bias", layer=layer, head=head)
        (shown,) = ax.images
        np.testing.assert_array_equal(shown.get_array(), bias.astype(np.float32))
        reach = len(bias) / 2
        assert shown.get_extent() == [-reach, reach, reach, -reach]
    layer = (
        load_subject(
            "swin_visformer_tiny_v2",
            visualize.get_parser().parse_args(["gates", "x", "--input-size", "64"]),
        )
        .model.stage2[0]
        .attn
    )
    with torch.no_grad():  # the key is one column to the right of its query: dx = -1, dy = 0
        bias = layer.relative_position_bias_table[layer.relative_position_index[0, 1], 2].item()
    (row,) = (
        row
        for row in picture.rows
        if (row["layer"], row["head"], row["dy"], row["dx"]) == ("stage2.0.attn", 2, 0, -1)
    )
    assert row["bias"] == bias


def test_positional_panels(draw):
    picture = draw("bias", "@3.pth")
    for (row, head), ax in panels(picture).items():
        weights = as_map(picture.rows, "weight", layer=f"blocks.{row}.attn", head=head)
        np.testing.assert_array_equal(ax.images[0].get_array(), weights.astype(np.float32))
        (mark,) = ax.lines
        assert (mark.get_xdata()[0], mark.get_ydata()[0]) == (2, 2)


def test_tiles_of_embeddings(draw, root):
    picture = draw("bias", "@3.pth", "--show", "embedding")
    args = visualize.get_parser().parse_args(["gates", "x"])
    ((_, embedding),) = position_embeddings(load_subject(str(root / "3.pth"), args).model).items()
    similar = cosine_similarities(embedding).numpy()
    (ax,) = panels(picture).values()
    tiles = ax.images[0].get_array()
    for row in range(4):
        for column in range(4):
            y, x = 5 * row, 5 * column  # tiles of 4 with a gap of 1
            np.testing.assert_allclose(tiles[y : y + 4, x : x + 4], similar[row, column])


def test_points_and_means_of_gates(draw, root):
    args = visualize.get_parser().parse_args(["gates", "x"])
    by_epoch = {
        epoch: gates(load_subject(str(root / f"{epoch}.pth"), args).model) for epoch in (3, 8)
    }
    (ax,) = draw("gates", "@3.pth").figure.axes
    *heads, mean = ax.lines
    wanted = torch.stack([*by_epoch[3].values()]).numpy()  # L h
    np.testing.assert_allclose(mean.get_ydata(), wanted.mean(1), rtol=1e-6)
    for head, points in enumerate(heads):
        np.testing.assert_allclose(points.get_ydata(), wanted[:, head], rtol=1e-6)
        np.testing.assert_allclose(np.round(points.get_xdata()), [0, 1])
    several = panels(draw("gates", "@8.pth", "@3.pth"))
    for index, name in enumerate(by_epoch[3]):
        mean, *heads = several[0, index].lines
        values = np.stack([by_epoch[epoch][name].numpy() for epoch in (3, 8)])
        np.testing.assert_allclose(mean.get_ydata(), values.mean(1), rtol=1e-6)
        for head, points in enumerate(heads):
            assert list(points.get_xdata()) == [3, 8]
            np.testing.assert_allclose(points.get_ydata(), values[:, head], rtol=1e-6)


def test_curves(draw, tmp_path):
    keys = ("train_loss", "train_lr", "test_loss", "test_acc1", "test_acc5", "ema_loss")
    logs = {}
    for run in ("a", "b"):
        (tmp_path / run).mkdir()
        generator = np.random.default_rng(len(run) + ord(run))
        logs[run] = [
            {"epoch": epoch} | {key: float(generator.random()) for key in keys} | ema
            for epoch, ema in enumerate([{"ema_loss": 9.0}, {"ema_loss": 3.0}, {"ema_loss": -1.0}])
        ]
        text = "".join(json.dumps(line) + "\n" for line in logs[run])
        (tmp_path / run / "log.txt").write_text(text)
    picture = draw("curves", str(tmp_path / "a"), str(tmp_path / "b"))
    found, (drawn_legend,) = panels(picture), picture.figure.legends
    wanted = {
        (0, 0): (("train_loss", ":"), ("test_loss", "-"), ("ema_loss", "--")),
        (0, 1): (("test_acc1", "-"),),
        (1, 0): (("test_acc5", "-"),),
        (1, 1): (("train_lr", "-"),),
    }
    for place, ax in found.items():
        drawn = [(line.get_linestyle(), line.get_color()) for line in ax.lines]
        assert len(set(drawn)) == len(drawn) == 2 * len(wanted[place])
        curves = [(log, *curve) for log in logs.values() for curve in wanted[place]]
        for line, (log, key, style) in zip(ax.lines, curves, strict=True):
            assert line.get_linestyle() == style
            assert list(line.get_xdata()) == [0, 1, 2]
            assert list(line.get_ydata()) == [row[key] for row in log]
    low, high = found[0, 0].get_ylim()
    losses = [row[key] for log in logs.values() for row in log for key in keys[:3:2]]
    assert low < -1 and max(losses) < high < max(losses) + 1  # the lowest is the average's
    legend = [text.get_text() for text in drawn_legend.get_texts()]
    assert legend == ["a", "b", "training", "test", "EMA"]


def test_feature_panels(draw, root):
    picture = draw("features", "@3.pth", "--image", "@images/val", "--pick", "variance")
    for (row, column), ax in panels(picture).items():
        pixels = ax.images[0].get_array()
        if column == 0:
            assert pixels.shape == (16, 16, 3)
        elif column == 1:
            assert pixels.shape == (4, 4, 3)
            assert all(np.ptp(pixels[..., i]) == pytest.approx(1.0) for i in range(3))
        else:
            channel = int(ax.get_title().removeprefix("channel "))
            wanted = as_map(picture.rows, "value", stage=row, channel=channel)
            np.testing.assert_allclose(pixels, wanted, rtol=1e-6)


@pytest.mark.parametrize("by_panel", [False, True])
def test_kernel_panels(by_panel):
    branches = {"one": torch.randn(2, 1, 3, 3), "other": torch.randn(2, 1, 3, 3)}
    fused = torch.randn(2, 1, 3, 3)
    slices = {**branches, "sum": sum(branches.values()), "fused": fused}
    slices = {name: part[:, 0] for name, part in slices.items()}
    kernels = Kernels(branches=branches, total=slices["sum"], fused=fused, difference=0.25)
    figure = draw_kernels(slices, kernels, "layer", by_panel)
    axes = [ax for ax in figure.axes if ax.get_subplotspec() and ax.images and ax.get_xlabel()]
    for ax, (channel, name) in zip(axes, [(c, n) for c in (0, 1) for n in slices], strict=True):
        np.testing.assert_array_equal(ax.images[0].get_array(), slices[name][channel])
        assert channel or ax.get_title() == name
        of_scale = [slices[name]] if by_panel else list(slices.values())
        largest = max(part[channel].abs().max().item() for part in of_scale)
        assert ax.images[0].get_clim() == pytest.approx((-largest, largest))
    assert "2.5e-01" in figure.get_suptitle()


def test_columns_of_kernels(draw):
    picture = draw("kernels", "fastvit_t8", "--input-size", "32", "--channels", "2")
    layer = (
        load_subject(
            "fastvit_t8", visualize.get_parser().parse_args(["gates", "x", "--input-size", "32"])
        )
        .model.stages[0]
        .blocks[0]
        .token_mixer
    )
    layer.reparameterize()
    fused = layer.reparam_conv.weight[1, 0].detach().numpy()
    rows = [row for row in picture.rows if row["channel"] == 1]
    np.testing.assert_array_equal(as_map(rows, "weight", branch="fused"), fused)
    assert not np.array_equal(as_map(rows, "weight", branch="sum"), fused), "that is in float64"
    parts = {row["branch"] for row in rows} - {"sum", "fused"}
    middle = sum(row["weight"] for row in rows if row["branch"] in parts and row["y"] == row["x"])
    assert middle == pytest.approx(np.trace(fused), abs=1e-5)


def test_tensorboard_has_the_picture(root, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out, events = tmp_path / "out.png", tmp_path / "events"
    words = ["gates", str(root / "8.pth"), "--output", str(out), "--tensorboard", str(events)]
    assert visualize.main(words) == 0
    (event,) = EventAccumulator(str(events)).Reload().Images("visualize/gates")
    (tmp_path / "event.png").write_bytes(event.encoded_image_string)
    one, other = (np.asarray(Image.open(p).convert("RGB")) for p in (out, tmp_path / "event.png"))
    np.testing.assert_array_equal(one, other)
    assert event.step == 8


def test_images_are_those_of_evaluation(root, tmp_path):
    args = visualize.get_parser().parse_args(["gates", "x"])
    subject = load_subject(str(root / "3.pth"), args)
    assert (subject.size, subject.crop_ratio, subject.epoch) == (16, 0.5, 3)
    # the crop of 80 % of the side: of 40 pixels, the middle 32
    pixels = np.zeros((40, 40, 3), np.uint8)
    pixels[4:36, 4:36] = 200
    Image.fromarray(pixels).save(tmp_path / "frame.png")
    subject = Subject(subject.model, "convit_tiny", "", None, 40, 0.8)
    (picture,) = load_pictures(subject, [tmp_path / "frame.png"])
    assert picture.shape == (3, 40, 40) and picture[:, 3:-3, 3:-3].min() > 0.75
    assert (picture[:, 0] < 0.75).any(), "of a smaller crop, nothing of the frame would be there"
    wanted = (picture[0] - IMAGENET_DEFAULT_MEAN[0]) / IMAGENET_DEFAULT_STD[0]
    assert torch.allclose(subject.normalized(picture[None])[0, 0], wanted)
    larger = visualize.get_parser().parse_args(["gates", "x", "--input-size", "24"])
    assert load_subject(str(root / "3.pth"), larger).size == 24


def test_images_of_a_folder_are_spread(root):
    every = find_images(root / "images", 8)
    assert every == sorted(every) and len(set(every)) == 8
    assert find_images(root / "images", 2) == [every[0], every[4]]


def test_nonlocality_is_the_mean_over_images(root, monkeypatch):
    args = visualize.get_parser().parse_args(["gates", "x"])
    subject = load_subject(str(root / "3.pth"), args)
    paths = find_images(root / "images", 3)
    monkeypatch.setattr(distances, "BATCH", 2)
    together = distances.measure(subject, paths)
    single = [distances.measure(subject, [path]) for path in paths]
    for name, values in together.items():
        mean = torch.stack([one[name] for one in single]).mean(0)
        torch.testing.assert_close(values, mean)
    assert not torch.allclose(single[0]["blocks.2.attn"], single[1]["blocks.2.attn"])
