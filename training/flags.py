"""Flags of ``main.py``: spellings and defaults of DeiT and Visformer, then our own."""

import argparse
from argparse import BooleanOptionalAction as OnOff
from collections.abc import Sequence

from models.data_config import INTERPOLATIONS
from pipeline.augmentation import CROP_MODES
from pipeline.sources.fine_grained import INAT_CATEGORIES
from pipeline.sources.named import DATA_SETS, HUB, data_set_named
from training import compilation
from training.existing_run import check_overwrite
from training.flag_checks import check_flags
from training.old_flags import ANSWERS
from training.parser import PIXELS, Parser, add_input_size, flags_of, given_flags, usable_cpus
from training.recipes import recipe_argv
from training.tracking import TRACKERS
from utils import UserError

AMP_DTYPES = ("float16", "bfloat16")


def get_args_parser() -> Parser:
    """Return the parser of all flags."""
    parser = Parser(
        "main.py",
        description="Train and evaluate image classifiers.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.answers = ANSWERS
    config = "recipe: YAML file of flags, or its name in configs/; the command line wins"
    parser.add_argument("-c", "--config", metavar="RECIPE", help=config)
    _add_run(parser.add_argument_group("run"))
    _add_model(parser.add_argument_group("model"))
    _add_finetuning(parser.add_argument_group("fine-tuning and distillation"))
    _add_optimisation(parser.add_argument_group("optimisation"))
    _add_augmentation(parser.add_argument_group("augmentation"))
    _add_data(parser.add_argument_group("data"))
    add_processes(parser.add_argument_group("processes"))
    return parser


def _add_run(group: argparse._ArgumentGroup) -> None:
    add = flags_of(group)
    add("--batch-size", "-b", type=int, default=64, help="images per process and step")
    add("--epochs", type=int, default=300)
    add("--output_dir", default="", help="folder of checkpoints and logs; empty for none")
    add(
        "--resume",
        default="",
        help="weights as of --finetune, or auto: newest of --output_dir",
    )
    add("--overwrite", action="store_true", help="remove a run that --output_dir holds")
    add("--start_epoch", type=int, default=0)
    add("--stop-epoch", type=int, help="stop before this epoch; the schedule still spans --epochs")
    add("--val-interval", type=int, default=1, metavar="N", help="epochs between evaluations")
    add(
        "--eval",
        action="store_true",
        help="evaluate --resume or --pretrained and exit",
    )
    add("--seed", type=int, default=0)
    add("--save-every-steps", type=int, metavar="N", help="also save within an epoch")
    add("--save-every-minutes", type=float, metavar="M", help="also save within an epoch")
    add(
        *("--keep-checkpoints", "--checkpoint-hist"),
        **{"type": int, "default": 1, "metavar": "K", "help": "keep the last K and best K"},
    )
    add("--deterministic", action="store_true", help="bitwise reproducible on CUDA as well; slower")
    add("--max-nonfinite", type=int, default=10, help="consecutive nonfinite losses that end it")
    add("--log-interval", type=int, default=50, help="steps between readings of the loss")
    add("--log-to", nargs="+", choices=TRACKERS, default=[], help="trackers next to TensorBoard")
    add("--experiment", default="", metavar="NAME", help="name of the run for --log-to")


def _add_model(group: argparse._ArgumentGroup) -> None:
    add = flags_of(group)
    add(
        "--model",
        default="visformer_small",
        help="any model name of timm, hf-hub:ORG/NAME or local-dir:FOLDER",
    )
    add("--pretrained", action="store_true", help="start from the published weights of --model")
    size = f"{PIXELS}; default: that of the weights, else 224, or 32 for DIGITS"
    add_input_size(group, help=size)
    channels = "1: grey images; default: that of the weights, else 3"
    add("--in-chans", type=int, choices=[1, 3], help=channels)
    add(
        "--progressive-sizes",
        type=int,
        nargs="+",
        metavar="PIXELS",
        help="sizes of training images, each for an equal span of the epochs; the last is "
        "--input-size",
    )
    add("--drop", type=float, default=0.0, metavar="RATE", help="dropout")
    add("--drop-path", type=float, default=0.1, metavar="RATE", help="stochastic depth")
    add(
        "--qk-scale-factor",
        type=float,
        metavar="EXPONENT",
        help="scale queries and keys by head_dim ** EXPONENT each (model default: -0.25)",
    )
    add("--model-kwargs", nargs="+", default=[], metavar="KEY=VALUE", help="model arguments")
    add("--locality-strength", type=float, help="ConViT: initial locality (model default: 1)")
    add("--local-up-to-layer", type=int, metavar="N", help="ConViT: GPSA blocks (default: 10)")
    add("--model-ema", action=OnOff, default=True, help="keep a moving average of the weights")
    add("--model-ema-decay", type=float, default=0.99996)
    add("--model-ema-warmup", action=OnOff, default=False, help="ramp up the decay")
    add("--model-ema-force-cpu", action="store_true")
    add("--fuse", action="store_true", help="with --eval: fuse the model for inference first")
    add("--train-mode", action=OnOff, default=True, help="off: train in evaluation mode")


def _add_finetuning(group: argparse._ArgumentGroup) -> None:
    add = flags_of(group)
    add(
        *("--finetune", "--initial-checkpoint"),
        default="",
        help="start from these weights: a file, an address, hf-hub:ORG/NAME, local-dir:FOLDER, or "
        "a model name for timm's; new classifier for other classes",
    )
    add("--layer-decay", type=float, metavar="RATE", help="learning-rate decay per layer")
    add("--freeze-stages", type=int, metavar="N", help="freeze the stem (0) and the first N stages")
    add("--linear-probe", action="store_true", help="train only the classifier")
    add(
        "--attn-only",
        action="store_true",
        help="train only attention, position embeddings and the classifier (DeiT III)",
    )
    add("--teacher-model", help="as --model, with its published weights")
    add("--teacher-path", default="", help="weights of the teacher, as for --finetune")
    add("--distillation-type", choices=["none", "soft", "hard"], default="none")
    add("--distillation-alpha", type=float, default=0.5, help="weight of the distillation loss")
    add("--distillation-tau", type=float, default=1.0, help="temperature of soft distillation")


def add_precision(group: argparse._ArgumentGroup) -> None:
    add = flags_of(group)
    add("--amp", action=OnOff, default=False, help="automatic mixed precision")
    default = "default: that of the run to resume, else bfloat16 on the CPU, float16 elsewhere"
    add("--amp-dtype", choices=AMP_DTYPES, help=default)
    add("--tf32", action=OnOff, default=True, help="on CUDA, multiply float32 in TF32")


def _add_optimisation(group: argparse._ArgumentGroup) -> None:
    add = flags_of(group)
    add("--opt", default="adamw", help="any optimizer of timm")
    add("--opt-eps", type=float, default=1e-8)
    add("--opt-betas", type=float, nargs="+")
    add("--opt-kwargs", nargs="+", default=[], metavar="KEY=VALUE", help="optimizer arguments")
    add("--clip-grad", type=float, metavar="NORM", help="maximum gradient norm")
    add("--momentum", type=float, default=0.9)
    add("--weight-decay", type=float, default=0.05)
    steps = ("--accum-iter", "--grad-accum-steps")
    add(*steps, type=int, default=1, help="batches per optimizer step")
    add_precision(group)
    add("--channels-last", action=OnOff, help="memory format; default: chosen by the model")
    add(
        *("--compile", "--torchcompile"),
        nargs="?",
        const="inductor",
        metavar="BACKEND",
        help="compile the model with torch.compile (default backend: inductor)",
    )
    add(
        *("--compile-mode", "--torchcompile-mode"),
        choices=compilation.MODES,
        help="mode of torch.compile; reduce-overhead and max-autotune replay CUDA graphs",
    )
    add(
        "--compile-blocks",
        action="store_true",
        help="compile block by block: a shorter start; equal blocks share one graph",
    )
    add("--grad-checkpointing", action="store_true", help="recompute blocks to save memory")
    add("--fsdp", action="store_true", help="shard weights and optimizer state over the processes")
    add("--bce-loss", action="store_true", help="binary cross-entropy per class")
    add("--cosub", action="store_true", help="co-train two submodels by stochastic depth (DeiT)")
    add("--smoothing", type=float, default=0.1, help="label smoothing")
    add(
        "--class-weights",
        metavar="FILE",
        help="weights of the classes in the loss: balanced (inverse to their number of images), "
        "or a file of lines CLASS,WEIGHT",
    )
    add("--sched", default="cosine", help="any schedule of timm")
    add("--sched-on-updates", action=OnOff, default=False, help="step per update, not per epoch")
    add("--lr", type=float, default=5e-4, help="for 512 images per step, scaled linearly")
    add("--unscale-lr", action="store_true", help="do not scale --lr, --min-lr, --warmup-lr")
    add("--lr-noise", type=float, nargs="+", metavar="PART")
    add("--lr-noise-pct", type=float, default=0.67)
    add("--lr-noise-std", type=float, default=1.0)
    add("--lr-cycle-mul", type=float, default=1.0, help="length of a cycle, by the one before")
    add("--lr-cycle-decay", type=float, default=0.5, help="peak of a cycle, by the one before")
    add("--lr-cycle-limit", type=int, default=1, help="cycles of --epochs each, one after another")
    add("--lr-k-decay", type=float, default=1.0, help="exponent of time (cosine, poly)")
    scaled = "for 512 images per step or more, below scaled linearly"
    add("--warmup-lr", type=float, default=1e-6, help=scaled)
    add("--min-lr", type=float, default=1e-5, help=scaled)
    add("--decay-epochs", type=float, default=30, help="interval (step), last part (wsd, rsqrt)")
    add("--decay-milestones", type=int, nargs="+", default=[90, 180, 270], metavar="EPOCH")
    add("--warmup-epochs", type=int, default=5)
    add("--warmup-prefix", action="store_true", help="add the warm-up to --epochs")
    add("--cooldown-epochs", type=int, default=10, help="has no effect, as in DeiT")
    add("--patience-epochs", type=int, default=10)
    add("--decay-rate", "--dr", type=float, default=0.1, help="factor; of poly, the power")


def _add_augmentation(group: argparse._ArgumentGroup) -> None:
    add = flags_of(group)
    add("--color-jitter", type=float, default=0.4, help="used without --aa")
    add("--aa", default="rand-m9-mstd0.5-inc1", help="timm's auto-augment policy; empty for none")
    add("--std-aug", action="store_true", help="random resized crop and horizontal flip only")
    add("--ThreeAugment", action="store_true", help="grey, solarise or blur (DeiT III)")
    add("--src", action="store_true", help="resize and padded crop instead of random resized crop")
    add(
        "--train-crop-mode",
        choices=list(CROP_MODES),
        help="timm's crops: random resized, or resized by the short side and cropped at the centre "
        "or at random; default: rrc, or a padded crop of at most 32 pixels",
    )
    add(
        "--scale", type=float, nargs="+", metavar="AREA", help="MIN MAX; default: 0.08 1, rkr 0.8 1"
    )
    add("--ratio", type=float, nargs="+", metavar="RATIO", help="MIN MAX; default: 3/4 4/3")
    add("--hflip", type=float, metavar="P", help="default: 0.5, or 0 for DIGITS")
    add("--vflip", type=float, default=0.0, metavar="P")
    add("--train-interpolation", default="bicubic", choices=["random", "bilinear", "bicubic"])
    add("--repeated-aug", action=OnOff, default=True, help="three repeats of a third of the images")
    add("--reprob", type=float, default=0.25, help="probability of random erasing")
    add("--remode", default="pixel", choices=["const", "rand", "pixel"])
    add("--recount", type=int, default=1)
    add("--resplit", action="store_true", help="accepted for old command lines; has no effect")
    add("--mixup", type=float, default=0.8, metavar="ALPHA")
    add("--cutmix", type=float, default=1.0, metavar="ALPHA")
    add("--cutmix-minmax", type=float, nargs="+", metavar="RATIO")
    add("--mixup-prob", type=float, default=1.0)
    add("--mixup-switch-prob", type=float, default=0.5)
    add("--mixup-mode", default="batch", choices=["batch", "pair", "elem"])
    add("--mixup-off-epoch", type=int, default=0, metavar="N", help="mix before it only; 0: always")


def _data_set(name: str) -> str:
    try:
        data_set_named(name)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return name


def _share(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} must be the part of each class to hold out, such as 0.2"
        ) from None


def _add_data(group: argparse._ArgumentGroup) -> None:
    add = flags_of(group)
    names = ", ".join(DATA_SETS)
    add(
        "--data-set",
        type=_data_set,
        metavar="NAME",
        help=f"{names}, or {HUB}NAME for the Hugging Face Hub; IMNET with --data-path, else DIGITS",
    )
    add(
        "--data-path",
        "--data-dir",
        help="folder of the dataset; for WDS, also a pattern of shards, or a URL",
    )
    val_split = "hold out this part of every class of a folder without a validation set"
    add("--val-split", type=_share, metavar="SHARE", help=val_split)
    add("--k-folds", type=int, metavar="K", help="divide every class into K folds instead")
    add("--fold", type=int, metavar="I", help="fold to validate on, from 0 to K - 1")
    labels = "table (CSV, TSV) of file and label, instead of a folder for each class"
    add("--labels", metavar="FILE", help=labels)
    add("--val-path", help="for WDS: validation shards, if stored elsewhere")
    add("--shard-cache", metavar="FOLDER", help="for WDS: cache folder of remote shards")
    download = ("--download", "--dataset-download")
    add(*download, action="store_true", help="download the dataset into --data-path")
    add("--inat-category", choices=INAT_CATEGORIES, default="name", help="level of the classes")
    add("--input-key", default="image", help=f"for {HUB}NAME: column of the images")
    add("--target-key", default="label", help=f"for {HUB}NAME: column of the classes")
    add("--balanced-sampling", action="store_true", help="draw every class equally often")
    add("--sampling-ratio", type=float, default=1.0, help="fraction of every class to train on")
    add("--loader", choices=["fast", "timm"], default="fast", help="timm: the slow reference")
    where = ["auto", "workers", "device"]
    add("--augment-on", choices=where, default="auto", help="auto: the device if it is CUDA")
    add("--decode-on-device", action="store_true", help="decode training JPEGs on the device")
    add("--on-corrupt", choices=["error", "skip"], default="error", help="unreadable images")
    add(
        "--eval-crop-ratio",
        "--crop-pct",
        type=float,
        help="default: that of the weights, else 0.875",
    )
    add(
        "--interpolation",
        choices=INTERPOLATIONS,
        help="resize of evaluation; default: that of the weights, else bicubic",
    )
    turned = "turn images by their EXIF orientation; default: as the weights, else off"
    add("--exif", action=OnOff, help=turned)
    add("--dist-eval", action=OnOff, default=True, help="distribute evaluation over the processes")
    workers = min(10, usable_cpus())
    names = ("--num_workers", "--workers", "-j")
    add(*names, type=int, default=workers, help="loader workers per process")
    add("--pin-mem", action=OnOff, default=True)


def add_processes(group: argparse._ArgumentGroup) -> None:
    add = flags_of(group)
    add("--device", help="default: cuda if available, else cpu")
    add("--world_size", type=int, default=1, help="set by the launcher")
    add("--dist_url", default="env://")
    add("--dist-timeout", type=float, default=600.0, help="seconds to wait for other processes")
    add("--local_rank", type=int, help=argparse.SUPPRESS)


def parse_args(argv: Sequence[str]) -> tuple[argparse.Namespace, set[str]]:
    """Parse a command line, preceded by the flags of ``--config FILE``.

    Returns:
        The flags, and the names of those that were given rather than left at their default.

    Raises:
        UserError: The file cannot be read, has unknown keys, or flags contradict each other.
    """
    parser = get_args_parser()
    recipe, words = parser.parse_args(argv).config, list(argv)
    argv = recipe_argv(parser, recipe) + words if recipe else words
    args = parser.parse_args(argv)
    del args.config, args.overwrite  # nothing of a run
    if args.progressive_sizes and args.input_size is None:
        args.input_size = args.progressive_sizes[-1]
    given, typed = given_flags(get_args_parser(), argv), given_flags(get_args_parser(), words)
    check_flags(args)
    if "overwrite" in given:
        check_overwrite(args)
    resumes = typed.get("resume", "") not in ("", "auto")
    other = "--pretrained" if typed.get("pretrained") else f"--finetune {args.finetune}"
    if resumes and (typed.get("pretrained") or (typed.get("finetune") and not args.eval)):
        raise UserError(
            f"--resume {args.resume} continues from that checkpoint, and {other} would not be "
            f"read: leave one of them out"
        )
    return args, set(given)
