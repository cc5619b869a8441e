"""tools.validate: which outputs names of classes stand for, and how they are shown."""

import re
from importlib import resources

import pytest

from pipeline.images import DataError
from tools.validate.classes import find_class, imagenet_wnids, match_classes, read_names
from tools.validate.text import labels, shortened, shown

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
    # numbers that a network was trained on in this very order
    twelve = sorted(map(str, range(12)))
    assert match_classes(twelve, 12).outputs == tuple(range(12))
    assert match_classes(twelve, 12, rule="number").outputs == tuple(map(int, twelve))
    assert match_classes(["a", "b"], 2).rule == "position"
    assert match_classes(["b", "a"], 2, ["a", "b"]).outputs == (1, 0)
    # a network of this project, trained on ImageNet's folders
    assert match_classes(["7", "11"], 1000, imagenet_wnids()).outputs == (7, 11)
    assert match_classes(["n01443537"], 1000, imagenet_wnids()).outputs == (1,)


@pytest.mark.parametrize(
    ("names", "num_outputs", "known", "rule", "message"),
    [
        (["n01440764", "cats"], 1000, None, "auto", "'cats' is no wnid"),
        (["n99999999"], 1000, None, "auto", "'n99999999' is no wnid"),
        (["n01440764", "n01443537"], 3, None, "auto", "knows 3 classes, the set has 2"),
        (["n01440764"], 10, None, "wnid", "knows 10 classes"),
        (["3", "1000"], 1000, None, "auto", "no class 1000"),
        (["3", "cat"], 12, None, "number", "'cat' is no number"),
        (["1", "01"], 1000, None, "auto", "'1' and '01' are the same class 1"),
        (["a", "b", "c"], 2, None, "auto", "knows 2 classes, the set has 3"),
        (["a", "x"], 3, ["a", "b", "c"], "auto", "'x' is not among the 3"),
        (["n01440764", "x"], 1000, imagenet_wnids(), "auto", "'x' is no wnid"),
    ],
)
def test_classes_that_do_not_fit(names, num_outputs, known, rule, message):
    with pytest.raises(DataError, match=re.escape(message)):
        match_classes(names, num_outputs, known, rule)


def test_finding_a_class():
    names = list(imagenet_wnids())
    assert find_class("n01443537", names) == 1
    assert find_class("Tinca tinca", names) == 0
    assert find_class("goldfish", names) == 1
    assert find_class("harp", names) == 594  # and a synonym of the harmonica
    assert (find_class("999", names), find_class("007", names), find_class("0", names)) == (
        *(999, 7, 0),
    )
    assert find_class("2", ["0", "2", "1"]) == 1  # a name goes before an index
    assert find_class("CAT", ANIMALS) == 2
    assert find_class("cat, black", ["cat, white", "cat, black"]) == 1


@pytest.mark.parametrize(
    ("asked", "names", "message"),
    [
        ("1000", None, "--class 1000 is beyond the classes, 0 to 999"),
        ("9" * 5000, None, f"--class {'9' * 20} is beyond the classes, 0 to 999"),
        ("goldfisch", None, "such as goldfish"),
        ("zzz", ANIMALS, "no --class 'zzz'; such as ant, bee, cat, or 0 to 6"),
        ("", ANIMALS, "no --class ''"),
        ("crane", None, "--class crane is 134 (crane), 517 (crane): give a number"),
        ("a", ["a", "b", "a"], "--class a is 0 (a), 2 (a): give a number"),
        ("cat", ["cat, black", "cat, white"], "no --class 'cat'; such as cat, "),
        ("a", ["a"] * 7, "4 (a), ...: give a number"),
    ],
)
def test_classes_that_are_not_found(asked, names, message):
    with pytest.raises(DataError, match=re.escape(message)):
        find_class(asked, names or imagenet_wnids())


def test_a_file_of_names(tmp_path):
    file = tmp_path / "names.txt"
    file.write_bytes("\ufeffant\r\nbee\x0cwasp\r\ncat\u2028kitten\r\n".encode())
    assert read_names(file) == ["ant", "bee\x0cwasp", "cat\u2028kitten"]
    for text, line in (("ant\n\ncat\n", 2), ("ant\ncat\n \n", 3), ("", 1)):
        file.write_text(text)
        with pytest.raises(DataError, match=f"line {line} is empty"):
            read_names(file)
    file.write_bytes(b"\xff")
    with pytest.raises(DataError, match="cannot read --classes"):
        read_names(file)


def test_how_names_are_shown():
    assert shown("a\tb\nc\x7fd\u2028e") == "a b c d e"
    assert shown("\udcff.jpg\ud800 猫") == "�.jpg� 猫"
    assert (shortened("abcdef", 6), shortened("abcdefg", 6)) == ("abcdef", "abcde…")
    wnids = ["n02012849", "n03126707", "n01440764"]
    assert labels(wnids, [134, 517, 0]) == ["crane (134)", "crane (517)", "tench"]
    # only ImageNet's names are several
    names = ["cat, black", "cat, white", "tench, Tinca tinca", "x" * 30 + "a", "x" * 30 + "b"]
    cut = "x" * 23 + "…"
    assert labels(names, range(5)) == [*names[:2], "tench", f"{cut} (3)", f"{cut} (4)"]
