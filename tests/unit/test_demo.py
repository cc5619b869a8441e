"""tools.demo: its picture."""

import json

from conftest import ROOT
from exporting import save
from PIL import Image

from tools import demo_picture

RECIPE = str(ROOT / "configs" / "digits.yaml")


def test_the_picture_of_a_run(tmp_path):
    kwargs = {"img_size": 32, "patch_sizes": [2, 2, 1], "width": 0.25, "num_classes": 10}
    names = [str(digit) for digit in range(10)]
    save(tmp_path / "checkpoint.pth", "visformer_tiny", kwargs, (32, 32), classes=names)
    measured = ("train_loss", "train_lr", "test_loss", "test_acc1", "test_acc5", "ema_acc1")
    lines = [json.dumps(dict.fromkeys(measured, 1.0) | {"epoch": epoch}) for epoch in (0, 1)]
    (tmp_path / "log.txt").write_text("\n".join(lines))
    demo_picture.draw(str(tmp_path), RECIPE, tmp_path / "demo.png")
    with Image.open(tmp_path / "demo.png") as picture:
        assert picture.format == "PNG" and picture.width > 1000


def test_the_digits_of_the_picture_are_of_every_class():
    images, targets = demo_picture.held_out(RECIPE, 12)
    assert images.shape == (12, 3, 32, 32) and set(targets) == set(range(10))
