"""tools.validate: matching class names to outputs, and showing them."""

from functools import partial
from importlib import resources

import pytest
from loading import refused

from tools.cli import shortened, shown
from tools.validate.classes import find_class, imagenet_wnids, labels, match_classes

ANIMALS = ["ant", "bee", "cat", "dog", "eel", "fox", "gnu"]


def test_wnids_are_those_of_imagenet_a_and_r():
    def lines(name):
        return (resources.files("timm.data") / "_info" / name).read_text().split()

    assert len(imagenet_wnids()) == 1000
    for name in "ar":
        indices = [int(index) for index in lines(f"imagenet_{name}_indices.txt")]
        matched = match_classes(lines(f"imagenet_{name}_synsets.txt"), 1000)
        assert (matched.rule, len(matched.outputs), matched.is_subset) == ("wnid", 200, True)
        assert list(matched.outputs) == indices


def test_rules_of_matching():
    numbers = sorted(map(str, range(1000)))  # as text: 0, 1, 10, 100, 101, ...
    matched = match_classes(numbers, 1000)
    assert matched.outputs == tuple(map(int, numbers))
    assert matched.columns == list(range(1000))
    assert matched.column_names == [str(index) for index in range(1000)]
    # numbers in the order of the training
    twelve = sorted(map(str, range(12)))
    assert match_classes(twelve, 12).outputs == tuple(range(12))
    assert match_classes(twelve, 12, rule="number").outputs == tuple(map(int, twelve))
    assert match_classes(["a", "b"], 2).rule == "position"
    assert match_classes(["b", "a"], 2, ["a", "b"]).outputs == (1, 0)
    # a checkpoint of ours, trained on ImageNet's folders
    assert match_classes(["7", "11"], 1000, imagenet_wnids()).outputs == (7, 11)
    assert match_classes(["n01443537"], 1000, imagenet_wnids()).outputs == (1,)


@pytest.mark.parametrize(
    ("names", "num_outputs", "known", "rule", "values"),
    [
        (["n01440764", "cats"], 1000, None, "auto", ["'cats'", "n01440764"]),
        (["n99999999"], 1000, None, "auto", ["'n99999999'", "1000", " n0"]),
        (["n01440764", "n01443537"], 3, None, "auto", ["3", "2", "n01440764, n01443537"]),
        (["n01440764"], 10, None, "wnid", ["10", "1000"]),
        (["3", "1000"], 1000, None, "auto", ["'1000'", " 100,"]),
        (["3", "cat"], 12, None, "number", ["'cat'", "12", "0, 1, 2"]),
        (["1", "01"], 1000, None, "auto", ["'1'", "'01'"]),
        (["a", "b", "c"], 2, None, "auto", ["2", "3", "a, b, c"]),
        (["a", "x"], 3, ["a", "b", "c"], "auto", ["'x'", "3", "a, b, c", "--classes position"]),
        (["n01440764", "x"], 1000, imagenet_wnids(), "auto", ["'x'"]),
    ],
)
def test_classes_that_do_not_fit(names, num_outputs, known, rule, values):
    message = refused(
        partial(match_classes, names, num_outputs, known, rule, "SET", "NET"), *values
    )
    assert "SET" in message or "NET" in message


def test_finding_a_class():
    names = list(imagenet_wnids())
    assert find_class("n01443537", names) == 1
    assert find_class("Tinca tinca", names) == 0
    assert find_class("goldfish", names) == 1
    assert find_class("harp", names) == 594  # and a synonym of the harmonica
    assert [find_class(asked, names) for asked in ("999", "007", "0")] == [999, 7, 0]
    assert find_class("2", ["0", "2", "1"]) == 1  # a name goes before an index
    assert find_class("CAT", ANIMALS) == 2
    assert find_class("cat, black", ["cat, white", "cat, black"]) == 1


@pytest.mark.parametrize(
    ("asked", "names", "values"),
    [
        ("1000", None, ["--class 1000 ", "0 to 999"]),
        ("9" * 5000, None, [f"--class {'9' * 20} ", "0 to 999"]),
        ("goldfisch", None, ["'goldfisch'", "goldfish,"]),
        ("zzz", ANIMALS, ["'zzz'", "ant, bee, cat,", "0 to 6"]),
        ("", ANIMALS, ["--class ''"]),
        ("crane", None, ["--class crane ", "134 (crane), 517 (crane)"]),
        ("a", ["a", "b", "a"], ["--class a ", "0 (a), 2 (a)"]),
        ("cat", ["cat, black", "cat, white"], ["'cat'", "cat, "]),
        ("a", ["a"] * 7, ["4 (a), ..."]),
    ],
)
def test_classes_that_are_not_found(asked, names, values):
    refused(partial(find_class, asked, names or imagenet_wnids()), *values)


def test_how_names_are_shown():
    assert shown("a\tb\nc\x7fd\u2028e") == "a b c d e"
    assert shown("\udcff.jpg\ud800 猫") == "�.jpg� 猫"
    assert (shortened("abcdef", 6), shortened("abcdefg", 6)) == ("abcdef", "abcde…")
    wnids = ["n02012849", "n03126707", "n01440764"]
    assert labels(wnids, [134, 517, 0]) == ["crane (134)", "crane (517)", "tench"]
    # only ImageNet's names have synonyms
    names = ["cat, black", "cat, white", "tench, Tinca tinca", "x" * 30 + "a", "x" * 30 + "b"]
    cut = "x" * 23 + "…"
    assert labels(names, range(5)) == [*names[:2], "tench", f"{cut} (3)", f"{cut} (4)"]
