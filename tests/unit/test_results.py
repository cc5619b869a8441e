"""tools.results: the runs, their order, their results, and the page."""

import json
import shlex

import pytest
from conftest import ROOT, read_log
from validating import caller, refuses

from tools.results import __main__ as results
from tools.results.claims import SHARES, SUITES
from training.flags import parse_args
from utils import UserError

CLAIMS = SUITES["cpu"].claims
DEIT, VISFORMER = CLAIMS["visformer"].arms


def arguments(tmp_path, *words):
    flags = ["--output_dir", str(tmp_path / "runs"), "--results", str(tmp_path / "results")]
    return results.get_parser().parse_args([*flags, *map(str, words)])


def finish(args, arm, seed, **figures):
    """Write the results of a run."""
    path = results.result_of(args, arm, seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    line = {"run": arm.name, "seed": seed, "seconds": 5, "torch": "2", "threads": 1}
    line |= {"device": "CPU", "command": "python main.py", **figures}
    path.write_text(json.dumps(line) + "\n")


@pytest.mark.parametrize("name", CLAIMS)
def test_arms_parse_and_differ(name, tmp_path):
    args = arguments(tmp_path)
    for pair in CLAIMS[name].pairs:
        base, other = (
            parse_args(results.flags_of(args, arm, 7))[0] for arm in (pair.base, pair.other)
        )
        assert base.seed == other.seed == 7
        differing = {key for key in vars(base) if vars(base)[key] != vars(other)[key]}
        assert differing - {"output_dir"} or pair.base.figure != pair.other.figure


@pytest.mark.parametrize("suite", SUITES)
def test_names_belong_to_one_run_each(suite):
    arms = {arm for part in SUITES[suite].parts.values() for arm in part.arms}
    runs = {(arm.name, arm.flags, arm.share) for arm in arms}
    assert len({name for name, _, _ in runs}) == len(runs)


def test_every_share_sees_as_many_images(tmp_path):
    for arm in CLAIMS["few_data"].arms:
        flags, _ = parse_args(results.flags_of(arguments(tmp_path, "--epochs", 20), arm, 0))
        assert flags.epochs * flags.sampling_ratio == pytest.approx(20, rel=0.01)
        assert round(50_000 * flags.sampling_ratio) % flags.batch_size == 0, "none is left out"
    shares = [arm.share for arm in CLAIMS["few_data"].arms]
    assert sorted(shares) == sorted(2 * SHARES)


def test_teachers_come_first_and_nothing_twice(tmp_path):
    made = []
    args = arguments(tmp_path, "--seeds", 3, 4)
    arms = [arm for name in ("distillation", "visformer", "ema") for arm in CLAIMS[name].arms]
    results.train_all(args, arms, lambda args, arm, seed: made.append((arm.name, seed)))
    assert len(made) == len(set(made)) == 8
    (student,) = (arm for arm in arms if arm.teacher)
    for seed in (3, 4):
        assert made.index((student.teacher.name, seed)) < made.index((student.name, seed))
        flags, _ = parse_args(results.flags_of(args, student, seed))
        assert flags.teacher_path.endswith(f"visformer-{seed}/checkpoint.pth")


@pytest.mark.parametrize(
    ("differences", "better", "equal"),
    [
        ([], "not tried", "not tried"),
        ([5.0], "one pair", "one pair"),
        ([5.0, 5.1, 5.2], "holds", "holds"),
        ([-5.0, -5.1, -5.2], "fails", "fails"),
        # the mean is 2.5 standard errors, and 4.3 are needed for three pairs
        ([1.0, 3.0, 5.0], "not resolved", "holds: no loss resolved"),
    ],
)
def test_verdicts_follow_the_error_of_paired_differences(differences, better, equal):
    assert results.verdict(differences, True) == better
    assert results.verdict(differences, False) == equal


def test_the_table_pairs_runs_by_seed(tmp_path):
    args = arguments(tmp_path)
    for seed, (base, other) in enumerate([(20.0, 30.0), (24.0, 35.0), (22.0, 34.0)]):
        finish(args, DEIT, seed, test_acc1=base)
        finish(args, VISFORMER, seed, test_acc1=other)
    finish(args, DEIT, 3, test_acc1=90.0)  # without its pair
    text = "\n".join(results.tables(args, ["visformer"]))
    (line,) = [line for line in text.splitlines() if line.startswith("| deit")]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[0] == "deit: 39.00" and cells[1] == "visformer: 33.00"
    assert cells[2] == "+11.00 ± 0.58"  # 1 / sqrt(3)
    assert cells[3] == "+10.00, +11.00, +12.00" and cells[5] == "holds"
    assert "not run" in "\n".join(results.tables(args, ["v2"]))


def test_pictures_show_the_finished_runs(tmp_path, monkeypatch):
    args = arguments(tmp_path)
    for seed in (0, 1):
        finish(args, DEIT, seed, test_acc1=20.0, test_acc1_by_epoch=[10.0, 20.0])
        finish(args, VISFORMER, seed, test_acc1=30.0 + seed, test_acc1_by_epoch=[5.0, 30.0 + seed])
    results.draw(args, ["visformer", "half"], tmp_path)
    for name in ("curves", "differences"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    drawn = {}
    for name in ("curves", "differences"):
        monkeypatch.setattr(results.pictures, name, lambda found, path: drawn.update({path: found}))
    results.draw(args, ["visformer", "half"], tmp_path)
    (claim,) = drawn[tmp_path / "curves.png"].values()
    assert claim == {"deit": [[10.0, 20.0]] * 2, "visformer": [[5.0, 30.0], [5.0, 31.0]]}
    ((label, mean, error),) = drawn[tmp_path / "differences.png"]
    assert "visformer" in label and (mean, error) == (10.5, 0.5)


def test_the_page_is_made_of_the_results(tmp_path):
    args = arguments(tmp_path, "--no-train", "visformer", "--page", tmp_path / "page.md")
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- results -->\nold\n<!-- end of results -->\nafter\n")
    finish(args, DEIT, 0, test_acc1=20.0)
    words = ["--output_dir", args.output_dir, "--results", args.results, "--no-train"]
    assert results.main([*words, "visformer", "--page", str(page)]) == 0
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n")
    assert "old" not in text and "deit: 20.00" in text


def test_the_committed_page_is_that_of_the_committed_results(tmp_path):
    page = ROOT / "docs" / "RESULTS.md"
    copy = tmp_path / "page.md"
    copy.write_text(page.read_text())
    words = ["--results", str(ROOT / "docs" / "results"), "--no-train", "--page", str(copy)]
    assert results.main(words) == 0
    assert copy.read_text() == page.read_text()


def test_boards_show_the_time_to_an_accuracy(tmp_path):
    args = arguments(tmp_path, "--suite", "gpu", "--no-train", "cifar")
    (arm, _) = SUITES["gpu"].boards["cifar"].arms
    finish(args, arm, 0, test_acc1=95.5, seconds=1000, epoch=199, epochs_to_94=50)
    text = "\n".join(results.tables(args, ["cifar"]))
    assert "| cifar10_scratch | 95.50 | 1 |  | 94 %: 250 s |" in text
    assert "| cifar100_scratch | not run |" in text


@pytest.mark.parametrize("name", SUITES["gpu"].boards)
def test_boards_parse(name, tmp_path):
    args = arguments(tmp_path, "--suite", "gpu")
    for arm in SUITES["gpu"].boards[name].arms:
        flags, _ = parse_args(results.flags_of(args, arm, 0))
        words = arm.name.split("_")
        if words[0].startswith("image"):
            assert flags.data_set == words[0].upper() and flags.data_path == "data"
            assert (flags.input_size, flags.epochs) == tuple(map(int, words[1:]))


@pytest.mark.slow
def test_runs_are_real_resume_and_are_not_repeated(image_folder, tmp_path, capsys):
    small = "--input-size 32 --batch-size 4 --warmup-epochs 0"
    words = ["--data-path", image_folder, "--epochs", 1, "--seeds", 0]
    args = arguments(tmp_path, *words, "--flags", small)
    results.train(args, VISFORMER, 0)
    (logged,) = read_log(results.folder_of(args, VISFORMER, 0))
    line = json.loads(results.result_of(args, VISFORMER, 0).read_text())
    assert line["test_acc1"] == logged["test_acc1"] and line["run"] == VISFORMER.name
    parse_args(shlex.split(line["command"])[2:])
    assert "$ python main.py -c" in capsys.readouterr().err
    results.train(args, VISFORMER, 0)
    assert capsys.readouterr().err == ""
    bad = arguments(tmp_path, *words, "--flags", "--model none")
    with pytest.raises(UserError, match=r"deit.*stdout\.txt"):
        results.train(bad, DEIT, 1)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["nonsense"], "nonsense"),
        (["--seeds", "1", "1"], "--seeds [1, 1]"),
        (["--jobs", "0"], "--jobs 0"),
        (["--output_dir", __file__], __file__),
    ],
)
def test_bad_input_is_named(tmp_path, capsys, words, named):
    base = ["--data-path", "data", "--output_dir", str(tmp_path)]
    refuses(caller(capsys, results, more=())(*base, *words), named)
