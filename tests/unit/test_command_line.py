"""Command lines: unknown names and their nearest, old spellings, recipes by name, policies."""

import argparse
import contextlib
import io
import itertools
import re

import pytest
from conftest import ROOT, error_of
from timm.data.auto_augment import (
    augment_and_mix_transform,
    auto_augment_transform,
    rand_augment_transform,
)

from main import main
from models.errors import did_you_mean, nearest
from object_detection.torchvision_rcnn import main as rcnn
from pipeline.images import DataError
from pipeline.policies import check_policy
from tools.flops.__main__ import main as flops
from tools.pack_dataset import main as pack
from training.flags import get_args_parser, parse_args
from training.old_flags import ANSWERS
from training.recipes import recipe_path
from utils import UserError

USAGE = 2  # exit status of argparse


def refused(program, *words):
    """The line with which a program refuses its flags."""
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors), pytest.raises(SystemExit) as end:
        program([str(word) for word in words])
    assert end.value.code == USAGE
    assert errors.getvalue().count("\n") == 1, errors.getvalue()
    return errors.getvalue()


@pytest.mark.parametrize("program", [main, rcnn, flops, pack], ids=lambda f: f.__module__)
def test_an_unknown_flag_is_one_line(program):
    error = refused(program, "--nonesuch-xyz=3")
    assert "--nonesuch-xyz" in error and "--help" in error


NEAREST = {  # what the error must name
    ("--lerning-rate", "3"): "--lerning-rate",
    ("--wieght_decay", "3"): "--weight-decay",
    ("--batch", "3"): "--batch-size",
    ("--sched-on-update",): "--sched-on-updates",
    ("--remode", "pixl"): "'pixl'.* pixel",
    ("--mixup-mode", "bach"): "'bach'.* batch",
    ("--loader", "tim"): "'tim'.* timm",
    ("--data-set", "cifar-10"): "'cifar-10'.* CIFAR10",
    ("--data-set", "FLOWER"): "'FLOWER'.*mean FLOWERS",
    ("3",): "3",
    ("/data/imagenet",): "/data/imagenet.* --data-path",
    ("--foo", "--nb_classes", "10"): "--foo.*--nb_classes",
}


@pytest.mark.parametrize("words", NEAREST, ids=" ".join)
def test_nearest_flags_and_choices_are_named(words):
    assert re.search(NEAREST[words], refused(parse_args, *words))


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("--opt adamv", "adamv.* adamw?"),
        ("--opt lookahead_sdg", "lookahead_sdg"),
        ("--sched cosin", "cosin.* cosine"),
        ("--aa rand-x", "'x'.* m9"),
        ("--aa rnd-m9", "'rnd'.* rand"),
        ("-c digitz", "digitz.* digits"),
        ("-c configs/visformer_smal.yaml", "visformer_smal.yaml.* visformer_small"),
    ],
)
def test_nearest_names_are_named_before_anything_begins(words, named, tmp_path):
    error = error_of(main, *words.split(), "--stop-epoch", 0, "--output_dir", tmp_path / "run")
    assert re.search(named, error)
    assert not (tmp_path / "run").exists()


def test_nearest():
    assert nearest("imnet", ["CIFAR10", "IMNET", "IMNET100"])[0] == "IMNET"
    assert nearest("x", ["abc"]) == [] and did_you_mean("x", ["abc"]) == ""
    assert "b-c" in did_you_mean("b-d", ["b-c", "other"])


@pytest.mark.parametrize("name", ["lookahead_adamw", "AdamW", "sgd", "kron"])
def test_optimizers_of_timm_are_known(name):
    assert parse_args(["--opt", name])[0].opt == name


@pytest.mark.parametrize("name", ["cosine", "step", "multistep", "plateau", "poly", "tanh"])
def test_schedules_of_timm_are_known(name):
    assert parse_args(["--sched", name])[0].sched == name


# --- policies -------------------------------------------------------------------------------

GOOD = ["", "rand", "rand-m9-mstd0.5-inc1", "rand-m7-n3-p0.5-mmax20-tweights-mstd101", "v0"]
GOOD += ["original-mstd0.5", "originalr", "v0r", "3a", "augmix-m5-w4-d2", "augmix-a1.5-b1"]
GOOD += ["rand-t3aw-inc0"]
BAD = {  # and the part that is wrong
    "rand-x": "'x'",
    "rand-m9-tnone": "'tnone'",
    "rand-m9-inc": "'inc'",
    "rand-m9.5": "'m9.5'",
    "rand-m9-mstdinf": "'mstdinf'",
    "rand-w3": "'w3'",
    "rand--m9": "''",
    "augmix-n2": "'n2'",
    "augmix-w": "'w'",
    "original-m9": "'m9'",
    "v1": "'v1'",
    "randm9": "'randm9'",
    "None": "'None'",
}


@pytest.mark.parametrize("policy", GOOD)
def test_policies_of_timm_are_known(policy):
    check_policy(policy)
    hparams = {"translate_const": 1, "img_mean": (0, 0, 0)}
    if policy.startswith("rand"):
        assert rand_augment_transform(policy, hparams)
    elif policy.startswith("augmix"):
        assert augment_and_mix_transform(policy, hparams)
    elif policy:
        assert auto_augment_transform(policy, hparams)


@pytest.mark.parametrize("policy", BAD)
def test_the_wrong_part_of_a_policy_is_named(policy):
    with pytest.raises(DataError, match=re.escape(BAD[policy])) as caught:
        check_policy(policy)
    assert f"--aa {policy}" in str(caught.value)


# --- recipes --------------------------------------------------------------------------------


def test_recipes_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = str(ROOT / "configs" / "digits.yaml")
    assert recipe_path("digits") == recipe_path("digits.yaml") == path
    assert parse_args(["-c", "digits"]) == parse_args(["-c", path])
    (tmp_path / "digits").mkdir()  # as an output folder
    assert recipe_path("digits") == path
    (tmp_path / "digits.yaml").write_text("epochs: 77\n")
    assert recipe_path("digits.yaml") == "digits.yaml"
    assert parse_args(["-c", "digits.yaml"])[0].epochs == 77
    for name in ("other/digits", "/digits.yaml", "..", ""):
        with pytest.raises(UserError, match=re.escape(f" {name}")):
            recipe_path(name)


def test_a_recipe_has_the_spellings_of_the_command_line(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("workers: 3\nimg-size: 64\n")
    args, given = parse_args(["-c", str(path)])
    assert (args.num_workers, args.input_size) == (3, 64)
    assert {"num_workers", "input_size"} <= given
    for text, named in {
        "workers: 3\nnum_workers: 3": "'num_workers'.*'workers'",
        "nb_classes: 10": "'nb_classes'.*dataset",
        "wieght-decay: 0": "'wieght-decay'.* --weight-decay",
    }.items():
        path.write_text(text)
        with pytest.raises(UserError, match=named):
            parse_args(["-c", str(path)])


# --- command lines of DeiT, ConViT, Visformer and timm --------------------------------------

# their flags, but for those that are declared elsewhere under their own names
THEIRS = """
--batch-size --epochs --bce-loss --unscale-lr --model --input-size --drop --drop-path --model-ema
--no-model-ema --model-ema-decay --model-ema-force-cpu --opt --opt-eps --opt-betas --clip-grad
--momentum --weight-decay --sched --lr --lr-noise --lr-noise-pct --lr-noise-std --warmup-lr --min-lr
--decay-epochs --warmup-epochs --cooldown-epochs --patience-epochs --decay-rate --dr --color-jitter
--aa --smoothing --train-interpolation --repeated-aug --no-repeated-aug --train-mode --no-train-mode
--ThreeAugment --src --reprob --remode --recount --resplit --mixup --cutmix --cutmix-minmax
--mixup-prob --mixup-switch-prob --mixup-mode --teacher-model --teacher-path --distillation-type
--distillation-alpha --distillation-tau --finetune --data-path --data-set --inat-category
--output_dir --device --seed --resume --start_epoch --eval --eval-crop-ratio --dist-eval
--num_workers --pin-mem --no-pin-mem --distributed --world_size --dist_url --pretrained --embed_dim
--drop-block --sampling_ratio --nb_classes --save_every --local_up_to_layer --locality_strength
--qk-scale-factor --amp --skip_test --std-aug -c --config --data-dir --dataset --train-split
--train-num-samples --val-num-samples --dataset-download --class-map --input-img-mode --input-key
--target-key --dataset-trust-remote-code --pretrained-path --initial-checkpoint --no-resume-opt
--num-classes --gp --img-size --crop-pct --mean --std -b -vb --validation-batch-size --channels-last
--fuser --grad-accum-steps --grad-checkpointing --fast-norm --model-kwargs --head-init-scale
--head-init-bias --torchcompile-mode --torchscript --torchcompile --amp-dtype --model-dtype
--no-ddp-bb --synchronize-step --local_rank --device-modules --clip-mode --layer-decay
--layer-decay-min-scale --layer-decay-no-opt-scale --sched-on-updates --lr-base --lr-base-size
--lr-base-scale --lr-cycle-mul --lr-cycle-decay --lr-cycle-limit --lr-k-decay --epoch-repeats
--start-epoch --warmup-prefix --no-aug --color-jitter-prob --grayscale-prob --gaussian-blur-prob
--aug-repeats --aug-splits --jsd-loss --bce-sum --bce-target-thresh --bce-pos-weight --drop-connect
--bn-momentum --bn-eps --sync-bn --dist-bn --split-bn --model-ema-warmup --worker-seeding
--log-interval --recovery-interval --checkpoint-hist -j --workers --save-images --no-prefetcher
--output --experiment --eval-metric --tta --use-multi-epochs-loader --log-wandb --wandb-project
--wandb-tags --wandb-resume-id --train-img-sizes --train-batch-sizes --train-size-probs
--train-size-schedule --train-size-schedule-spread --train-size-random-mix --train-batches-per-epoch
--train-steps-per-epoch --variable-batch-loss-scale --naflex-loader --naflex-train-seq-lens
--naflex-max-seq-len --naflex-patch-sizes --naflex-patch-size-probs --naflex-loss-scale
--naflex-patchify-channels-first --kd-model-name --kd-distill-type --kd-loss-type
--distill-loss-weight --task-loss-weight --kd-temperature --kd-student-feature-dim
--kd-teacher-feature-dim --kd-token-distill-type --amp-impl --native-amp --apex-amp
"""


def test_every_flag_of_old_command_lines_is_accepted_or_answered():
    parser = get_args_parser()
    ours = {name.replace("_", "-") for name in parser._option_string_actions}
    wanted = {name.replace("_", "-") for name in THEIRS.split()}
    assert not wanted - ours - ANSWERS.keys()
    assert not ours & ANSWERS.keys()
    assert not ANSWERS.keys() - wanted - {""}


def test_answers_name_flags_that_exist():
    ours = get_args_parser()._option_string_actions.keys()
    named = {name for text in ANSWERS.values() for name in re.findall(r"--[\w-]+", text)}
    assert named <= ours


@pytest.mark.parametrize("flag", [flag for flag in ANSWERS if flag])
def test_an_old_flag_is_answered(flag):
    error = refused(parse_args, flag, "0.1")
    assert f" {flag} " in error and ANSWERS[flag] in error
    underscored = f"--{flag.lstrip('-').replace('-', '_')}"
    if flag.startswith("--"):
        assert ANSWERS[flag] in refused(parse_args, f"{underscored}=0.1")


OTHER_SPELLINGS = {
    "-b 8": ("batch_size", 8),
    "-j 3": ("num_workers", 3),
    "--workers 3": ("num_workers", 3),
    "--checkpoint-hist 4": ("keep_checkpoints", 4),
    "--img-size 64": ("input_size", 64),
    "--initial-checkpoint x.pth": ("finetune", "x.pth"),
    "--grad-accum-steps 2": ("accum_iter", 2),
    "--torchcompile": ("compile", "inductor"),
    "--torchcompile-mode default --compile": ("compile_mode", "default"),
    "--data-dir data": ("data_path", "data"),
    "--dataset_download": ("download", True),
    "--crop-pct 0.9": ("eval_crop_ratio", 0.9),
}


@pytest.mark.parametrize("words", OTHER_SPELLINGS)
def test_another_spelling(words):
    args, given = parse_args(words.split())
    name, value = OTHER_SPELLINGS[words]
    assert getattr(args, name) == value and name in given


def test_the_page_lists_all_of_them():
    page = (ROOT / "docs" / "RECIPES.md").read_text().partition("Old command lines")[2]
    rows = re.findall(r"^\| (`-.*?) \| (?:.*?) \|$", page, re.M)
    listed = set(itertools.chain(*(re.findall(r"`(--?[\w-]+)`", row) for row in rows)))
    spellings = {words.split()[0].replace("_", "-") for words in OTHER_SPELLINGS}
    assert listed == spellings | {flag for flag in ANSWERS if flag}


def test_flags_keep_their_first_spelling():
    for action in get_args_parser()._actions:
        if isinstance(action, argparse._HelpAction):
            continue
        assert action.option_strings[0].startswith("--") or action.dest == "config"


def test_every_flag_has_a_help_text():
    missing = [a.dest for a in get_args_parser()._actions if not a.help or a.help[:7] == "default"]
    assert not missing


def test_help_shows_defaults_as_they_are_given():
    text = get_args_parser().format_help()
    for default in ("300", "on", "off", "90 180 270", "rand-m9-mstd0.5-inc1"):
        assert f"(default: {default})" in " ".join(text.split())
    for value in ("None", "True", "False", "[]", ""):
        assert f"(default: {value})" not in text
