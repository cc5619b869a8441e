"""Ranks that differ end at their start, with one line that names what differs and the rank."""

import re
import shutil

import pytest
import torch
from conftest import (
    ROOT,
    accuracy_lines,
    read_log,
    run_main,
    run_ranks,
    start_python,
    start_rank,
    succeed,
)
from ranks import free_port, group

import datasets
import engine
import utils
from pipeline.reference import Batch
from training import agreement
from training.flags import parse_args

SMALL = ["--model", "test_resnet", "--input-size", 32, "--num_workers", 0, "--device", "cpu"]
SMALL += ["--batch-size", 4, "--epochs", 1, "--no-repeated-aug", "--dist-timeout", 30]


def end_of(first, *others, start=start_rank, program="main.py", sizes=()):
    """Exit statuses and lines of errors of ranks with flags of their own."""
    flags = [first, *others]
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    sizes = sizes or [len(flags)] * len(flags)
    processes = [
        (start_rank if rank == 0 else start)(
            *(["main.py"] if rank == 0 else [program]),
            *(*SMALL, *own),
            **(meeting | {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": sizes[rank]}),
        )
        for rank, own in enumerate(flags)
    ]
    errors = [process.communicate(timeout=120)[1] for process in processes]
    return [p.returncode for p in processes], "".join(errors).splitlines()


def difference(*flags, **options):
    """The one line with which ranks of these flags end."""
    codes, lines = end_of(*flags, **options)
    assert (set(codes), len(lines)) == ({1}, 1), lines
    return lines[0]


def assert_named(line, *parts):
    for part in parts:
        assert part in line


@pytest.fixture
def other(images, tmp_path):
    """A copy of the images, to be changed."""
    return shutil.copytree(images, tmp_path / "other")


@pytest.mark.parametrize(
    ("flags", "others", "named"),
    [
        (["--lr", 0.1], ["--lr", 0], ("rank 0 has --lr 0.1", "rank 1 has --lr 0.0")),
        ([], ["--seed", 3], ("rank 0 has --seed 0", "rank 1 has --seed 3")),
        (["--epochs", 2], [], ("rank 0 has --epochs 2", "rank 1 has --epochs 1")),
        (["--fsdp"], [], ("rank 0 has --fsdp True", "rank 1 has --fsdp False")),
        ([], ["--model-kwargs", "a=1"], ("--model-kwargs []", "--model-kwargs ['a=1']")),
    ],
)
def test_flags(images, tmp_path, flags, others, named):
    folder = tmp_path / "run"
    data = ["--data-path", images, "--output_dir", folder]
    line = difference([*data, *flags], [*data, *others])
    assert_named(line, "error on rank 1: ", *named)
    assert not folder.exists()


def test_only_one_rank_has_an_output_folder(images, tmp_path):
    data = ["--data-path", images]
    line = difference([*data, "--output_dir", tmp_path / "a"], data)
    assert_named(line, "--output-dir none", "rank 1")


def test_flags_of_the_third_rank(images):
    data = ["--data-path", images]
    line = difference(data, data, [*data, "--opt", "sgd"])
    assert_named(line, "error on rank 2: ", "rank 2 has --opt sgd", "rank 0 has --opt adamw")


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_missing_image(images, other, split):
    (other / split / "cat" / "2.jpg").unlink()
    line = difference(["--data-path", images], ["--data-path", other])
    count = {"train": 24, "val": 10}[split]
    assert_named(line, "rank 1", "rank 0", "cat/2.jpg", f"({count - 1} ", f"({count} ")


def test_an_evaluation_with_a_missing_image(images, other, tmp_path):
    run_main(*SMALL, "--data-path", images, "--output_dir", tmp_path / "run")
    flags = ["--eval", "--resume", tmp_path / "run" / "checkpoint.pth", "--data-path"]
    (other / "val" / "dog" / "4.jpg").unlink()
    line = difference([*flags, images], [*flags, other])
    assert_named(line, "rank 1", "dog/4.jpg", "(9 ", "(10 ")


def test_an_image_of_another_size(images, other):
    with (other / "val" / "dog" / "3.jpg").open("ab") as file:
        file.write(b"more")
    size = (images / "val" / "dog" / "3.jpg").stat().st_size
    line = difference(["--data-path", images], ["--data-path", other])
    assert_named(line, f"rank 0 has dog/3.jpg, {size} ", f"rank 1 has dog/3.jpg, {size + 4} ")


def test_other_classes(images, other):
    for split in ("train", "val"):
        (other / split / "dog").rename(other / split / "wolf")
    line = difference(["--data-path", images], ["--data-path", other])
    assert_named(line, "rank 0 has dog", "rank 1 has wolf")


def test_tables_of_labels(images, tmp_path):
    data = ["--data-path", images / "train", "--val-split", 0.25, "--labels"]
    for name in ("a.csv", "b.csv", "c.csv"):
        label = "x" if name == "c.csv" else "dog"
        rows = [f"cat/{i}.jpg,cat\ndog/{i}.jpg,{label}\n" for i in range(8)]
        (tmp_path / name).write_text("".join(rows))
    line = difference([*data, tmp_path / "a.csv"], [*data, tmp_path / "c.csv"])
    assert_named(line, "rank 1", "rank 0", "--labels of SHA-256")
    assert end_of(*[[*data, tmp_path / name] for name in ("a.csv", "b.csv")]) == ([0, 0], [])


def test_no_data_on_a_rank(images, tmp_path):
    missing = tmp_path / "missing"
    assert_named(difference(["--data-path", images], ["--data-path", missing]), str(missing))


def ignored(folder, names):
    return [name for name in names if name.startswith(".") or name in ("tests", "docs")]


def test_other_code(images, tmp_path):
    code = shutil.copytree(ROOT, tmp_path / "code", ignore=ignored)
    with (code / "samplers.py").open("a") as file:
        file.write("# changed\n")
    data = ["--data-path", images]
    line = difference(data, data, start=start_python, program=code / "main.py")
    assert_named(line, "rank 1", "samplers.py")


def test_world_sizes(images):
    codes, lines = end_of([], [], sizes=[2, 3])
    assert codes == [1, 1]
    for line in lines:
        assert re.search(r"rank \d.* 2\b.*rank \d.* 3\b|rank \d.* 3\b.*rank \d.* 2\b", line)


def test_an_unreadable_image_on_one_rank(images, other, tmp_path):
    run_main(*SMALL, "--data-path", images, "--output_dir", tmp_path / "run")
    flags = ["--eval", "--resume", tmp_path / "run" / "checkpoint.pth", "--data-path"]
    broken = other / "val" / "cat" / "0.jpg"
    broken.write_bytes(bytes(broken.stat().st_size))
    assert_named(difference([*flags, other], [*flags, images]), "error on rank 0: ", str(broken))


def test_ranks_that_agree_with_flags_of_their_own(images, other):
    codes, lines = end_of(
        ["--data-path", images],
        ["--data-path", other, "--num_workers", 1, "--no-pin-mem", "--local_rank", 1],
    )
    assert (codes, lines) == ([0, 0], [])


def test_a_restart_that_torchrun_counts_on_one_machine_only(images, tmp_path):
    flags = [*SMALL, "--data-path", images, "--output_dir", tmp_path, "--epochs", 2]
    run_ranks(2, [*flags, "--stop-epoch", 1])
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": 2}
    processes = [
        start_rank(
            *("main.py", *flags),
            **(meeting | {"RANK": rank, "LOCAL_RANK": rank, "TORCHELASTIC_RESTART_COUNT": rank}),
        )
        for rank in range(2)
    ]
    results = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], results
    assert [line["epoch"] for line in read_log(tmp_path)] == [0, 1]
    assert len(accuracy_lines(results[0][0])) == 2  # of one epoch: the run went on


def model_of(rank, world, number):
    """What a rank says of a model, a parameter of which is larger by ``number`` on rank 1."""
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    with torch.no_grad():
        model.bias[1] += rank * number
    facts = {"weights": lambda: agreement.contents(model.state_dict())}
    try:
        agreement.agree(facts, utils.control_group(60))
    except (utils.UserError, utils.PeerError) as error:
        return type(error).__name__, str(error)
    return None


def test_weights():
    assert group(model_of, 2, 0) == [None, None]
    (first, _), (second, message) = group(model_of, 2, 1e-6)
    assert (first, second) == ("PeerError", "UserError")
    assert_named(message, "rank 1", "bias", "(2,)")


def names_of(rank, world, count, changed):
    lines = [f"name {number}" for number in range(count)]
    if rank == 2:
        lines[changed] = "another"
    try:
        agreement.agree({"names": lambda: lines}, utils.control_group(60))
    except (utils.UserError, utils.PeerError) as error:
        return type(error).__name__, str(error)


def test_the_first_of_many_lines_is_found():
    for changed in (0, 61, 99):
        first, second, (kind, message) = group(names_of, 3, 100, changed)
        assert (first[0], second[0], kind) == ("PeerError", "PeerError", "UserError")
        assert_named(message, "rank 2 has another", f"rank 0 has name {changed};")


def test_a_single_process_compares_nothing(images, monkeypatch):
    def fail(lines):
        raise AssertionError("a digest was computed")

    monkeypatch.setattr(agreement, "digest", fail)
    succeed(*SMALL, "--data-path", images)


def open_split(*flags):
    args, _ = parse_args([str(flag) for flag in flags])
    return datasets.build_dataset(True, args)[0].source


@pytest.mark.parametrize("kind", ["folder", "share", "shards", "pixels"])
def test_every_source_lists_its_images_wherever_it_is(kind, to_pack, packed, tmp_path):
    flags = {"folder": [], "share": ["--sampling-ratio", 0.5], "shards": ["--data-set", "WDS"]}
    if kind == "pixels":
        listings = [list(open_split("--data-set", "DIGITS").listing()) for _ in range(2)]
    else:
        first = packed if kind == "shards" else to_pack
        copy = shutil.copytree(first, tmp_path / "copy")
        found = [open_split("--data-path", root, *flags[kind]) for root in (first, copy)]
        listings = [list(source.listing()) for source in found]
        assert len(listings[0]) == len(found[0])
    assert listings[0] == listings[1]
    assert len(set(listings[0])) > 0.9 * len(listings[0]) > 0


@pytest.mark.parametrize("size", [9, 11])
def test_an_evaluation_that_does_not_add_up(size):
    data = [Batch(torch.zeros(4, 3, 1, 1), torch.zeros(4, dtype=torch.long), [])] * 2
    data += [Batch(torch.zeros(1, 3, 1, 1), torch.zeros(1, dtype=torch.long), ["bad"])]
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3, 2))
    device = torch.device("cpu")
    assert engine.evaluate(data, model, device, size=10)["images"] == 9
    with pytest.raises(utils.UserError, match=rf"\b9\b.*\b1\b.*\b{size}\b"):
        engine.evaluate(data, model, device, size=size)


def test_a_run_of_two_ranks_is_evaluated_on_all_images(images):
    output = run_ranks(2, [*SMALL, "--data-path", images])
    assert "10 images" in accuracy_lines(output)[0]
