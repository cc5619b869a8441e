"""Data without a validation folder: held-out images and folds."""

import json
import re
import shutil
import signal
import unicodedata
from argparse import Namespace
from functools import partial

import numpy as np
import pytest
import torch
import yaml
from conftest import accuracy_lines, call, error_of, run_main, same_run, succeed
from loading import flags, refused
from PIL import Image

import datasets
import main
from pipeline.sources.folder import open_image_folder
from pipeline.sources.shards import open_shards
from pipeline.sources.split import HoldOut
from tools import pack_dataset, predict
from tools.validate import __main__ as validate
from training import agreement
from training.data import data_record

UNEVEN = {"ant": 12, "bee": 7, "cat": 4, "dog": 1}
FIFTH = HoldOut(0.2)
FEW = ("--num_workers", 0, "--batch-size", 2, "--input-size", 32, "--model", "visformer_tiny")
RUN = (*FEW, "--epochs", 2, "--no-repeated-aug", "--class-weights", "balanced")
RUN += ("--balanced-sampling", "--no-model-ema", "--log-interval", 1)


def write(root, counts):
    """Images of classes, all different."""
    number = 0
    for name, count in counts.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        for index in range(count):
            number += 1
            Image.new("RGB", (32, 32), (number * 9 % 256, number, 99)).save(
                root / name / f"{name}{index}.png"
            )
    return root


@pytest.fixture(scope="module")
def flat(tmp_path_factory):
    return write(tmp_path_factory.mktemp("flat"), UNEVEN)


@pytest.fixture(scope="module")
def trained(flat, tmp_path_factory):
    """Output folder and output of a run on three quarters of the images."""
    folder = tmp_path_factory.mktemp("run")
    run = (*RUN, "--data-path", flat, "--val-split", 0.25, "--output_dir", folder)
    return folder, succeed(*run), run


def both(root, held_out):
    return [open_image_folder(root, is_train, held_out=held_out) for is_train in (True, False)]


# the choice


def test_the_share_of_every_class(flat):
    train, val = both(flat, HoldOut(0.25))
    assert np.bincount(val.targets, minlength=4).tolist() == [3, 2, 1, 0]
    assert np.bincount(train.targets).tolist() == [9, 5, 3, 1]
    assert train.classes == val.classes == [*UNEVEN]
    names = {*train.names(), *val.names()}
    assert len(names) == len(train) + len(val) == sum(UNEVEN.values())
    share, missing = val.notices
    assert "0.25" in share and " 6 " in share and " 24 " in share and "dog" in missing
    assert train.notices == ()
    most = both(flat, HoldOut(0.99))
    assert np.bincount(most[0].targets).tolist() == [1, 1, 1, 1]


def test_the_choice_is_that_of_every_machine():
    """Values of another program: SHA-256 of the paths, sorted."""
    names = [f"ant/{number}.jpg" for number in range(10)]
    held = FIFTH.mask(names, np.zeros(10, np.int64), ["ant"])
    assert np.flatnonzero(held).tolist() == [3, 7]
    order = np.random.default_rng(0).permutation(10)
    again = FIFTH.mask([names[i] for i in order], np.zeros(10, np.int64), ["ant"])
    assert again.tolist() == held[order].tolist()
    for form in ("NFC", "NFD"):  # of file systems
        accents = [unicodedata.normalize(form, f"é/ü{number}") for number in range(10)]
        found = FIFTH.mask(accents, np.zeros(10, np.int64), ["é"])
        assert np.flatnonzero(found).tolist() == [3, 4]


def test_the_layout_does_not_matter(flat, tmp_path):
    shutil.copytree(flat, tmp_path / "data" / "train")
    listings = [
        [source.names() for source in both(root, FIFTH)]
        for root in (flat, tmp_path / "data", tmp_path / "data" / "train")
    ]
    assert listings[0] == listings[1] == listings[2]
    write(tmp_path / "vehicles", {"train": 5, "car": 5})  # a class, not a split
    assert both(tmp_path / "vehicles", FIFTH)[1].classes == ["car", "train"]


def test_images_that_are_added_leave_the_order_of_the_others():
    old = [f"ant/{number}.jpg" for number in range(50)]
    new = old + [f"ant/more{number}.jpg" for number in range(50)]
    held = [FIFTH.mask(names, np.zeros(len(names), np.int64), ["ant"]) for names in (old, new)]
    before, after = ({*np.flatnonzero(mask[:50])} for mask in held)
    assert (held[0].sum(), held[1].sum()) == (10, 20)
    assert before <= after or after <= before  # the end of the part moves, and nothing else
    assert len(before & after) >= 7


def test_every_image_is_in_one_fold(flat):
    counts_of = {name: count for name, count in UNEVEN.items() if name != "dog"}
    names = [f"{name}/{i}" for name, count in counts_of.items() for i in range(count)]
    targets = np.repeat(np.arange(3), [*counts_of.values()])
    folds = [HoldOut(k_folds=4, fold=i).mask(names, targets, [*counts_of]) for i in range(4)]
    assert np.sum(folds, 0).tolist() == [1] * len(names)
    for fold in folds:
        counts = np.bincount(targets[fold], minlength=3)
        assert all(n // 4 <= c <= -(-n // 4) for n, c in zip((12, 7, 4), counts, strict=True))
    refused(partial(both, flat, HoldOut(k_folds=3, fold=0)), "dog", 1, 3)


@pytest.mark.parametrize("split", ["0", "1", "nan", "-0.5", "inf"])
def test_shares_out_of_range(flat, split):
    status, _, errors = run_main("--data-path", flat, *FEW, f"--val-split={split}")
    assert status == 1 and errors.count("\n") == 1 and split in errors


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("--k-folds 1 --fold 0", "1"),
        ("--k-folds 3 --fold 3", r"3.*0 to 2"),
        ("--k-folds 3 --fold -1", r"-1.*0 to 2"),
        ("--k-folds 3", r"--fold.*0 to 2"),
        ("--fold 1", "--k-folds"),
        ("--val-split 0.2 --k-folds 3 --fold 0", "--val-split 0.2.*--k-folds 3"),
        ("--k-folds 2 --fold 0", r"dog.*\b1\b"),
        ("--val-split 0.01", r"0.01.*\b12\b"),
        ("--val-split 0.2 --data-set CIFAR10", "CIFAR10"),
        ("--labels x.csv --data-set WDS", "WDS"),
        ("--labels none.csv --val-split 0.2", "none.csv"),
    ],
)
@pytest.mark.parametrize("program", ["main", "pack"])
def test_flags_that_do_not_fit_are_one_line(flat, tmp_path, words, named, program):
    words = words.split()
    if program == "main":
        errors = error_of(main.main, "--data-path", flat, *FEW, *words)
    elif "--data-set" in words:
        return
    else:
        output = tmp_path / "out"
        errors = error_of(pack_dataset.main, "--data-path", flat, "--output", output, *words)
        assert not list(tmp_path.rglob("*.tar"))
    assert re.search(named, errors)


def test_a_validation_folder_is_named(tmp_path):
    for name in ("val", "valid"):
        root = tmp_path / name
        write(root / "train", {"ant": 2, "bee": 2})
        write(root / name, {"ant": 1, "bee": 1})
        refused(partial(open_image_folder, root, False, held_out=FIFTH), root / name, "0.2")


def test_folders_that_need_a_flag_are_counted(flat, tmp_path):
    total = sum(UNEVEN.values())
    refused(partial(open_image_folder, flat, False), flat, total, 4, "--val-split")
    write(tmp_path / "train", {"ant": 2, "bee": 3})
    place = tmp_path / "train"
    refused(partial(open_image_folder, tmp_path, False), place, 5, 2, "--val-split", "val/")
    for held_out in (None, FIFTH):
        ants = partial(open_image_folder, flat / "ant", False, held_out=held_out)
        refused(ants, flat / "ant", "ant0.png", "--labels")
    assert "--val-split" not in error_of(main.main, "--data-path", tmp_path / "x", *FEW)


# runs


def test_training_records_the_split(flat, trained):
    folder, output, _ = trained
    _, val = both(flat, HoldOut(0.25))
    content = json.loads((folder / "data.json").read_text())["splits"]
    assert content["validation"]["files"] == sorted(val.names())
    assert (content["validation"]["images"], content["train"]["images"]) == (6, 18)
    assert "files" not in content["train"] and len(content["validation"]["files_sha256"]) == 64
    assert yaml.safe_load((folder / "args.yaml").read_text())["val_split"] == 0.25
    saved = torch.load(folder / "checkpoint.pth", weights_only=True)
    assert (saved["args"]["val_split"], saved["classes"]) == (0.25, [*UNEVEN])
    lines = output.splitlines()
    assert any(line.startswith("train: 18 images in 4") for line in lines)
    assert any(line.startswith("validation: 6 images in 3 of 4") for line in lines)
    source = both(flat, HoldOut(0.25))[1]
    assert set(source.listing()) <= {
        f"{name}, {(flat / name).stat().st_size} bytes" for name in source.names()
    }


def test_a_weighted_and_balanced_run_resumes_within_an_epoch(flat, trained, tmp_path):
    whole, output, run = trained
    assert "epoch 0 step 9/9" in output
    parts = [*run[:-1], tmp_path]
    succeed(*parts, line="epoch 1 step 3/9", act=signal.SIGTERM)
    saved = torch.load(tmp_path / "checkpoint.pth", weights_only=True)
    assert saved["epoch"] == 0 and 3 <= saved["step"] < 9
    without = [word for word in parts if word not in ("--val-split", 0.25)]
    output = succeed(*without, "--resume", "auto", "--seed", 0)
    assert "--val-split 0.25" in output
    assert same_run(whole, tmp_path)
    assert yaml.safe_load((tmp_path / "args.yaml").read_text())["val_split"] == 0.25


def test_evaluation_takes_the_split_of_the_checkpoint(flat, trained, tmp_path):
    folder, output, _ = trained
    file = folder / "checkpoint.pth"
    words = ("--eval", "--resume", file, "--data-path", flat, *FEW[:4])
    found = succeed(*words, "--seed", 5)
    assert accuracy_lines(found) == accuracy_lines(output)[-1:]
    assert "on 6 images" in found and str(file) in found
    assert "warning" not in succeed(*words, "--val-split", 0.25)
    (line,) = (
        line for line in succeed(*words, "--val-split", 0.5).splitlines() if "warning" in line
    )
    assert "0.25" in line and "0.5" in line
    write(tmp_path / "val", {"ant": 2, "cat": 1})
    other = succeed("--eval", "--resume", file, "--data-path", tmp_path, *FEW[:4])
    assert "on 3 images" in other and "--val-split" not in other


def test_tools_take_the_split_of_the_checkpoint(flat, trained, tmp_path):
    folder, output, _ = trained
    file, table = folder / "checkpoint.pth", tmp_path / "t.csv"
    words = (file, "--num_workers", 0, "--csv", table, "--per-class", tmp_path / "c.csv")
    status, found, errors = call(validate.main, *words, "--data-path", flat)
    assert (status, errors) == (0, "") and "--val-split 0.25" in found
    assert re.search(r"\b6 images", found)
    row = table.read_text().splitlines()
    top1 = float(dict(zip(row[0].split(","), row[1].split(","), strict=True))["top1"])
    assert f"{top1:.3f}" in accuracy_lines(output)[-1]
    shutil.copytree(flat, tmp_path / "test")  # a test set: all of it
    status, found, _ = call(validate.main, *words, "--data-path", tmp_path / "test")
    assert status == 0 and re.search(r"\b24 images", found)
    for other in (("--val-split", 0.5), ("--k-folds", 2, "--fold", 0)):
        status, found, errors = call(validate.main, *words, "--data-path", flat, *other)
        assert "warning" in found and (status == 0) == (other[0] == "--val-split"), errors
    status, found, _ = call(predict.main, flat / "ant", "--checkpoint", file)
    assert status == 0 and "12 images" in found


def test_records_of_others_are_checked(flat, trained, tmp_path):
    saved = torch.load(trained[0] / "checkpoint.pth", weights_only=True)
    for value in (0.0, "x", [1], float("nan")):
        saved["args"]["val_split"] = value
        torch.save(saved, tmp_path / "c.pth")
        words = ("--eval", "--resume", tmp_path / "c.pth", "--data-path", flat, *FEW[:4])
        assert "c.pth" in error_of(main.main, *words)


def test_shards_hold_the_split(flat, tmp_path):
    words = ("--data-path", flat, "--output", tmp_path / "out", "--num_workers", 0)
    assert call(pack_dataset.main, *words, "--val-split", 0.25)[0] == 0
    for is_train, source in zip((True, False), both(flat, HoldOut(0.25)), strict=True):
        shards = open_shards(tmp_path / "out", is_train)
        names = [shards.name(index).partition(".tar/")[2] for index in range(len(shards))]
        assert sorted(names) == sorted(source.names())
        assert np.bincount(shards.targets).tolist() == np.bincount(source.targets).tolist()
    assert "train.json" in error_of(pack_dataset.main, *words, "--val-split", 0.5)
    run = (*RUN, "--data-set", "WDS", "--data-path", tmp_path / "out", "--epochs", 1)
    assert "on 18 images" in succeed(*run)


def test_ranks_compare_the_table_and_the_split(flat, tmp_path):
    facts = []
    for name, text in (("1.csv", "a,x"), ("2.csv", "a,x"), ("3.csv", "a,y")):
        (tmp_path / name).write_text(text)
        facts.append(agreement.label_facts(Namespace(labels=str(tmp_path / name))))
    digests = [agreement.digest(each["labels"]()) for each in facts]
    assert digests[0] == digests[1] != digests[2]
    assert not agreement.label_facts(flags())
    listed = []
    for words in (("--val-split", 0.2), ("--val-split", 0.5)):
        dataset, _ = datasets.build_dataset(True, flags("--data-path", flat, *words))
        (_, images) = agreement.image_facts("training", dataset).values()
        listed.append(agreement.digest(images()))
    assert listed[0] != listed[1]
    lines = {*agreement.flag_lines(flags("--labels", "x.csv", "--val-split", 0.2))}
    assert "--val-split 0.2" in lines and "--labels x.csv" not in lines


def test_large_splits_are_recorded_by_digest(flat, monkeypatch):
    monkeypatch.setattr("pipeline.sources.split.LISTED", 5)
    _, val = both(flat, HoldOut(0.25))
    record = data_record(flags("--data-path", flat), {"validation": val})["splits"]["validation"]
    assert "files" not in record and len(record["files_sha256"]) == 64
    assert record["held_out"] == "--val-split 0.25"
