"""tools.validate: its pictures."""

import warnings

import numpy as np
import pytest
from PIL import Image

from tools import plots
from tools.validate import __main__ as validate
from tools.validate import metrics, pictures
from tools.validate.classes import ClassMap

CLASSES = ["ant", "bee", "cat"]


def pixels_of(figure, folder):
    """Return a figure as it is saved, ``H W 3`` of uint8."""
    plots.save(figure, folder / "figure.png")
    with Image.open(folder / "figure.png") as picture:
        return np.asarray(picture.convert("RGB"))


def test_picture_of_a_few_classes():
    confusion = np.array([[3, 1], [0, 8]])
    figure = pictures.confusion_figure(confusion, ["tench", "a $ sign"], "title")
    axes, _ = figure.axes
    assert [text.get_text() for text in axes.texts] == ["3", "1", "8"]
    assert [text.get_position() for text in axes.texts] == [(0, 0), (1, 0), (1, 1)]
    for labels in (axes.get_xticklabels(), axes.get_yticklabels()):
        assert [label.get_text() for label in labels] == ["tench", r"a \$ sign"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("prediction", "true class")
    assert axes.get_images()[0].get_array().tolist() == [[0.75**0.5, 0.5], [0, 1]]
    assert axes.get_title() == "title"


def test_picture_of_many_classes():
    confusion = np.diag(np.full(40, 50))
    confusion[2, 1] = 50  # half of the class, and of the predictions of the other
    names = [f"class {index}" for index in range(40)]
    figure = pictures.confusion_figure(confusion, names, "title")
    axes, _, listed = figure.axes
    assert not len(axes.get_xticks())
    shares = axes.get_images()[0].get_array() ** 2
    assert (shares[2, 1], shares[2, 2], shares[1, 1]) == (pytest.approx(0.5), pytest.approx(0.5), 1)
    assert "50  class 2 → class 1" in listed.texts[0].get_text()


@pytest.mark.parametrize("count", [31, 500])
def test_equal_shares_have_equal_colours(count, tmp_path):
    confusion = np.zeros((count, count), int)
    confusion[:, ::3], confusion[:, 1::3] = 3, 1
    names = [str(index) for index in range(count)]
    figure = pictures.confusion_figure(confusion, names, "title")
    pixels = pixels_of(figure, tmp_path)
    side = count * (1000 // count)
    matrix = pixels[-60 - side :][:side, 60 : 60 + side]
    cells = matrix.reshape(count, side // count, count, side // count, 3)
    assert (cells == cells[:, :1, :, :1]).all()  # every cell is of one colour
    colours = [np.unique(cells[:, 0, column, 0], axis=0) for column in range(count)]
    assert [len(one) for one in colours] == [1] * count
    colours = np.concatenate(colours)
    for start in range(3):
        assert (colours[start::3] == colours[start]).all()
    assert len(np.unique(colours, axis=0)) == 3


def test_picture_of_more_classes_than_it_has_cells(monkeypatch):
    monkeypatch.setattr(pictures, "CELLS", 20)
    confusion = np.zeros((50, 50), int)
    confusion[7, 31] = 4
    figure = pictures.confusion_figure(confusion, [""] * 50, "title")
    shares = figure.axes[0].get_images()[0].get_array()
    assert (shares.shape, shares[2, 10], shares.sum()) == ((17, 17), 1, 1)
    assert "3 × 3" in figure.axes[1].get_ylabel()


def test_picture_of_the_reliability():
    numbers = np.zeros(15, np.int64)
    numbers[[3, 14]] = 10, 30
    # of the first, 9 are right; the confidence is 0.3 there, and 0.9 in the other
    hits, confidence = np.zeros(15, np.int64), np.zeros(15)
    hits[[3, 14]], confidence[[3, 14]] = (9, 24), (3.0, 27.0)
    figure = pictures.reliability_figure(metrics.Bins(numbers, hits, confidence), "title")
    upper, lower = figure.axes
    accuracy, gap = ([bar.get_height() for bar in group] for group in upper.containers)
    assert (accuracy[3], accuracy[14], sum(accuracy)) == pytest.approx((90, 80, 170))
    # down to the confidence where it is below the accuracy, up where it is above
    assert (gap[3], gap[14]) == pytest.approx((-60, 10))
    assert [bar.get_y() for bar in upper.containers[1]] == accuracy
    shares = [bar.get_height() for bar in lower.containers[0]]
    assert (shares[3], shares[14]) == (25, 75)
    assert "ECE 22.50%" in figure.get_suptitle()


def test_gaps_are_seen_on_bars():
    """Contrast of the hatch of a gap with what is below it, as WCAG 2 defines it."""
    bins = metrics.Bins(np.full(15, 10), np.full(15, 9), np.full(15, 5.0))
    upper = pictures.reliability_figure(bins, "title").axes[0]
    bar, gap = (group[0] for group in upper.containers)

    def luminance(colour):
        parts = np.array(colour[:3])
        linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
        return linear @ (0.2126, 0.7152, 0.0722)

    dark, light = sorted(map(luminance, (gap.get_edgecolor(), bar.get_facecolor())))
    assert (light + 0.05) / (dark + 0.05) > 4


def test_a_set_without_a_finite_output_has_a_picture(tmp_path):
    none = np.zeros(15, np.int64)
    figure = pictures.reliability_figure(metrics.Bins(none, none, none * 1.0), "title")
    assert "ECE nan%" in figure.get_suptitle()
    assert pixels_of(figure, tmp_path).size


def test_letters_missing_in_the_font_do_not_warn(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pixels_of(pictures.confusion_figure(np.eye(2, dtype=int), ["猫", "犬"], "動物"), tmp_path)


def test_names_and_titles_of_rows(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(plots, "save", lambda figure, path: figures.append(figure))
    matched = ClassMap("wnid", (517, 134), ("n03126707", "n02012849"), 1000)
    row = {"checkpoint": f"runs/{'long' * 30}.pth", "weights": "ema", "size": 224}
    row |= {"matched": matched, "confusion": np.eye(2, dtype=int)}
    validate.save_confusion(tmp_path / "c.png", row)
    axes = figures[0].axes[0]
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels == ["crane (134)", "crane (517)"]
    assert axes.get_title() == f"runs/{'long' * 6}lo…, ema, 224 pixels"
