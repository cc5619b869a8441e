"""tools.visualize draws the numbers that belong in each place of its figures."""

import json

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from PIL import Image
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from visualizing import gate, in_folder, model_of, picture_of, write_files

from models import DataConfig
from tools.visualize import __main__ as visualize
from tools.visualize.heads import mean_nonlocality
from tools.visualize.kernels import Kernels
from tools.visualize.kernels import draw as draw_kernels
from tools.visualize.loading import LoadedModel, find_images, load_images
from tools.visualize.positions import cosine_similarities, position_embeddings


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_files(tmp_path_factory.mktemp("drawn"))


@pytest.fixture
def draw(root):
    """``draw(*words) -> Picture``, not written; @ stands for the folder of the files."""
    return lambda *words: picture_of(*in_folder(root, words))


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
    words = ["attention", "@1.pth", "--image", "@images/val", "--part", "all"]
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
    picture = draw("bias", "drawn_visformer")
    for (row, head), ax in panels(picture).items():
        layer = picture.rows[-1 if row else 0]["layer"]
        bias = as_map(picture.rows, "bias", layer=layer, head=head)
        (shown,) = ax.images
        np.testing.assert_array_equal(shown.get_array(), bias.astype(np.float32))
        reach = len(bias) / 2
        assert shown.get_extent() == [-reach, reach, reach, -reach]
    layer = model_of("drawn_visformer").module.stage2[0].attn
    with torch.no_grad():  # the key is one column to the right of its query: dx = -1, dy = 0
        bias = layer.relative_position_bias_table[layer.relative_position_index[0, 1], 2].item()
    (row,) = (
        row
        for row in picture.rows
        if (row["layer"], row["head"], row["dy"], row["dx"]) == ("stage2.0.attn", 2, 0, -1)
    )
    assert row["bias"] == bias


def test_positional_panels(draw):
    picture = draw("bias", "@1.pth")
    for (row, head), ax in panels(picture).items():
        weights = as_map(picture.rows, "weight", layer=f"blocks.{row}.attn", head=head)
        np.testing.assert_array_equal(ax.images[0].get_array(), weights.astype(np.float32))
        (mark,) = ax.lines
        assert (mark.get_xdata()[0], mark.get_ydata()[0]) == (2, 2)


def test_tiles_of_embeddings(draw, root):
    picture = draw("bias", "@1.pth", "--show", "embedding")
    ((_, embedding),) = position_embeddings(model_of(root / "1.pth").module).items()
    similar = cosine_similarities(embedding).numpy()
    (ax,) = panels(picture).values()
    tiles = ax.images[0].get_array()
    for row in range(4):
        for column in range(4):
            y, x = 5 * row, 5 * column  # tiles of 4 with a gap of 1
            np.testing.assert_allclose(tiles[y : y + 4, x : x + 4], similar[row, column])


def test_points_and_means_of_gates(draw):
    wanted = torch.tensor([[gate(epoch, head) for head in range(4)] for epoch in range(3)])
    wanted = wanted.sigmoid().numpy()  # E h, of both layers
    (ax,) = draw("gates", "@1.pth").figure.axes
    *heads, mean = ax.lines
    np.testing.assert_allclose(mean.get_ydata(), [wanted[1].mean()] * 2, rtol=1e-6)
    for head, points in enumerate(heads):
        np.testing.assert_allclose(points.get_ydata(), [wanted[1, head]] * 2, rtol=1e-6)
        np.testing.assert_allclose(np.round(points.get_xdata()), [0, 1])
    several = panels(draw("gates", "@2.pth", "@0.pth"))
    assert sorted(several) == [(0, 0), (0, 1)]
    for ax in several.values():
        mean, *heads = ax.lines
        np.testing.assert_allclose(mean.get_ydata(), wanted[[0, 2]].mean(1), rtol=1e-6)
        for head, points in enumerate(heads):
            assert list(points.get_xdata()) == [0, 2]
            np.testing.assert_allclose(points.get_ydata(), wanted[[0, 2], head], rtol=1e-6)


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
    picture = draw("features", "@1.pth", "--image", "@images/val", "--pick", "variance")
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
    picture = draw("kernels", "drawn_fastvit", "--channels", "2")
    layer = model_of("drawn_fastvit").module.stages[0].blocks[0].token_mixer
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
    words = ["gates", str(root / "2.pth"), "--output", str(out), "--tensorboard", str(events)]
    assert visualize.main(words) == 0
    (event,) = EventAccumulator(str(events)).Reload().Images("visualize/gates")
    (tmp_path / "event.png").write_bytes(event.encoded_image_string)
    one, other = (np.asarray(Image.open(p).convert("RGB")) for p in (out, tmp_path / "event.png"))
    np.testing.assert_array_equal(one, other)
    assert event.step == 2


def test_images_are_those_of_evaluation(root, tmp_path):
    model = model_of(root / "1.pth")
    assert (model.size, model.images.crop_mode, model.epoch) == (16, "squash", 1)
    # the crop of 80 % of the side: of 40 pixels, the middle 32
    pixels = np.zeros((40, 40, 3), np.uint8)
    pixels[4:36, 4:36] = 200
    Image.fromarray(pixels).save(tmp_path / "frame.png")
    images = DataConfig((40, 40), crop_pct=0.8)
    model = LoadedModel(model.module, "convit_tiny", "", None, images)
    (picture,) = load_images(model, [tmp_path / "frame.png"])
    assert picture.shape == (3, 40, 40) and picture[:, 3:-3, 3:-3].min() > 0.75
    assert (picture[:, 0] < 0.75).any(), "of a smaller crop, nothing of the frame would be there"
    wanted = (picture[0] - IMAGENET_DEFAULT_MEAN[0]) / IMAGENET_DEFAULT_STD[0]
    assert torch.allclose(model.normalized(picture[None])[0, 0], wanted)
    assert model_of(root / "1.pth", "--input-size", "24").size == 24


def test_images_of_a_folder_are_spread(root):
    every = find_images(root / "images", 6)
    assert every == sorted(every) and len(set(every)) == 6
    assert find_images(root / "images", 2) == [every[0], every[3]]


def test_nonlocality_is_the_mean_over_images(root):
    model, paths = model_of(root / "1.pth"), find_images(root / "images", 3)
    together = mean_nonlocality(model, paths, batch=2)
    single = [mean_nonlocality(model, [path]) for path in paths]
    for name, values in together.items():
        mean = torch.stack([one[name] for one in single]).mean(0)
        torch.testing.assert_close(values, mean)
    assert not torch.allclose(single[0]["blocks.2.attn"], single[1]["blocks.2.attn"])
