"""tools.results: the runs, their order, and the table."""

import json
import shlex

import pytest
from conftest import ROOT, read_log
from validating import caller, refuses

from tools.results import __main__ as results
from tools.results.claims import CLAIMS, SHARES
from training.flags import parse_args
from utils import UserError

RECIPE = str(ROOT / "configs/cifar10_claims.yaml")


def arguments(tmp_path, *words):
    flags = ["--data-path", "data", "--output_dir", str(tmp_path), "--config", RECIPE]
    return results.get_parser().parse_args([*flags, *map(str, words)])


def finish(args, arm, seed, accuracies=(10.0, 30.0, 20.0)):
    folder = results.folder_of(args, arm, seed)
    folder.mkdir(parents=True)
    lines = [json.dumps({"epoch": i, "test_acc1": value}) for i, value in enumerate(accuracies)]
    (folder / "log.txt").write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize("name", CLAIMS)
def test_arms_parse_and_differ(name, tmp_path):
    args = arguments(tmp_path)
    parsed = [parse_args(results.flags_of(args, arm, 7))[0] for arm in CLAIMS[name].arms]
    assert len(parsed) > 1 and {flags.seed for flags in parsed} == {7}
    assert len({flags.output_dir for flags in parsed}) == len(parsed)
    for one in parsed[1:]:
        assert {k for k in vars(one) if vars(one)[k] != vars(parsed[0])[k]} - {"output_dir"}


def test_every_share_sees_as_many_images(tmp_path):
    for arm in CLAIMS["few_data"].arms:
        flags, _ = parse_args(results.flags_of(arguments(tmp_path, "--epochs", 20), arm, 0))
        assert flags.epochs * flags.sampling_ratio == pytest.approx(20, rel=0.01)
        assert flags.warmup_epochs * flags.sampling_ratio == pytest.approx(2, rel=0.1)
        assert round(2000 * flags.sampling_ratio) % flags.batch_size == 0, "none is left out"
    shares = [arm.share for arm in CLAIMS["few_data"].arms]
    assert sorted(shares) == sorted(2 * SHARES)


def test_teachers_come_first_and_nothing_twice(tmp_path):
    made = []
    args = arguments(tmp_path, "--seeds", 3, 4)
    arms = [arm for name in ("distillation", "visformer") for arm in CLAIMS[name].arms]
    results.train_all(args, arms, lambda args, arm, seed: made.append((arm.name, seed)))
    assert len(made) == len(set(made)) == 6
    (student,) = (arm for arm in arms if arm.teacher)
    for seed in (3, 4):
        assert made.index((student.teacher.name, seed)) < made.index((student.name, seed))
        flags, _ = parse_args(results.flags_of(args, student, seed))
        assert flags.teacher_path == str(tmp_path / f"visformer_tiny-{seed}" / "checkpoint.pth")


def test_the_table_has_the_last_epoch_and_the_spread(tmp_path):
    args = arguments(tmp_path, "--epochs", 3, "--seeds", 0, 1)
    deit, visformer = CLAIMS["visformer"].arms
    for seed, last in ((0, 20.0), (1, 24.0)):
        finish(args, deit, seed, (90.0, 1.0, last))
        finish(args, visformer, seed, (0.0, 0.0, 2 * last))
    text = "\n".join(results.tables(args, ["visformer"]))
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| deit")]
    assert [row[1] for row in rows] == ["22.0 ± 2.8"] and rows[0][2] == "0: 20.0, 1: 24.0"
    assert "| visformer_tiny | 44.0 ± 5.7 |" in text
    command = rows[0][3].strip(" |`").removeprefix("python main.py ")
    assert "--seed N" in command and command.endswith("/deit_tiny_patch16_224-N")
    finish(args, CLAIMS["v2"].arms[1], 0, (50.0, 60.0))  # of 3 epochs
    text = "\n".join(results.tables(args, ["v2"]))
    assert "| visformer_tiny | 44.0 ± 5.7 |" in text
    assert "| swin_visformer_tiny_v2 | not run |  |" in text
    parse_args(shlex.split(command.replace("N", "1")))


@pytest.mark.slow
def test_runs_are_real_resume_and_are_not_repeated(image_folder, tmp_path, capsys):
    words = ["--data-path", str(image_folder), "--output_dir", str(tmp_path), "--config", RECIPE]
    words += ["--epochs", "1", "--seeds", "0"]
    small = "--model visformer_tiny --input-size 32 --batch-size 4 --warmup-epochs 0"
    args = results.get_parser().parse_args([*words, "--flags", small])
    arm = CLAIMS["visformer"].arms[1]
    results.train(args, arm, 0)
    assert len(read_log(results.folder_of(args, arm, 0))) == 1
    assert "$ python main.py -c" in capsys.readouterr().err
    results.train(args, arm, 0)
    assert capsys.readouterr().err == ""
    bad = results.get_parser().parse_args([*words, "--flags", "--model none", "--seeds", "1"])
    with pytest.raises(UserError, match=r"visformer_tiny.*stdout\.txt"):
        results.train(bad, arm, 1)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["nonsense"], "nonsense"),
        (["--seeds", "1", "1"], "--seeds [1, 1]"),
        (["--jobs", "0"], "--jobs 0"),
        (["--config", "none.yaml"], "none.yaml"),
        (["--output_dir", __file__], __file__),
    ],
)
def test_bad_input_is_named(tmp_path, capsys, words, named):
    base = ["--data-path", "data", "--output_dir", str(tmp_path)]
    refuses(caller(capsys, results, more=())(*base, *words), named)
