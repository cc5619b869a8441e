"""object_detection.check: what it prints, refuses and draws; and the drawing of objects."""

import numpy as np
import pytest
import torch
from annotation_files import BOXES, HEIGHT, WIDTH, content, write
from conftest import call
from PIL import Image

from object_detection import check
from object_detection.drawing import CELL, contact_sheet, draw, drawn_names

pytest.importorskip("pycocotools")


def checked(*words, status=0):
    found, output, errors = call(check.main, *words)
    assert found == status, errors
    return output if status == 0 else errors


def test_counts_and_a_contact_sheet(tmp_path):
    made = content()
    made["annotations"][0]["iscrowd"] = 1
    made["categories"][0]["name"] = "猫"
    file, sheet = write(tmp_path, made), tmp_path / "sheet.png"
    output = checked(file, "--images", tmp_path, "--output", sheet)
    for text in ("4 images", "7 objects", "1 crowd", "猫: 3", "dog: 4", "0 is 猫", str(sheet)):
        assert text in output
    with Image.open(sheet) as image:
        pixels = np.asarray(image)
    assert image.width > image.height >= CELL  # 4 images in a row
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 100


def test_what_is_refused(tmp_path):
    file, other = write(tmp_path), tmp_path / "other"
    assert "'bird'" in checked(file, "--classes", "cat", "bird", status=1)
    assert str(other / "1.png") in checked(file, "--images", other, status=1)
    Image.new("RGB", (WIDTH, HEIGHT + 1)).save(tmp_path / "3.png")
    assert f"{WIDTH}x{HEIGHT + 1}" in checked(file, "--images", tmp_path, status=1)
    made = content()
    for entry in made["annotations"]:
        del entry["segmentation"]
    file = write(tmp_path, made)
    assert "annotation 1 of image 1.png" in checked(file, status=1)
    assert "8 without a mask" in checked(file, "--boxes")
    nowhere = tmp_path / "none" / "sheet.png"
    words = (file, "--boxes", "--images", tmp_path, "--output", nowhere)
    assert str(nowhere) in checked(*words, status=1)


def test_names_that_the_font_may_lack_are_drawn_by_number():
    names = ["cat", "traffic light 2", "猫", "собака 犬", "🐈"]
    shown, legend = drawn_names(names)
    assert shown == ["cat", "traffic light 2", "2", "3", "4"]
    assert legend == [f"{number} is {names[number]}" for number in (2, 3, 4)]


def test_boxes_and_masks_are_drawn_where_they_are():
    image = Image.new("RGB", (WIDTH, HEIGHT))
    x, y, width, height = BOXES[0]
    boxes = torch.tensor([[x, y, x + width, y + height]], dtype=torch.float32)
    masks = torch.zeros(1, HEIGHT, WIDTH, dtype=torch.bool)
    masks[0, y + 12 : y + height - 3, x + 3 : x + width - 3] = True
    drawn = np.asarray(draw(image, boxes, ["x"], masks)).any(2)
    assert drawn[y + 15, x + 15] and drawn[y + height, x + 10] and not drawn[70, 80]
    assert draw(image, boxes[:0], [], masks[:0]) is image

    sheet = contact_sheet([{"image": image, "boxes": boxes, "labels": ["x"], "masks": masks}] * 5)
    assert sheet.width > 4 * CELL and 2 * CELL < sheet.height < 3 * CELL
