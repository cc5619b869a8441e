"""Flags of ``main.py``: spellings and defaults of DeiT and Visformer, then our own."""

import argparse
from argparse import BooleanOptionalAction as OnOff
from collections.abc import Sequence

from pipeline.augmentation import CROP_MODES
from training import compilation, schedules
from training.data_flags import add_data
from training.existing_run import check_overwrite
from training.flag_checks import check_flags
from training.old_flags import ANSWERS
from training.parser import PIXELS, Parser, add_input_size, flags_of, given_flags
from training.recipes import recipe_argv
from training.tracking import TRACKERS
from utils import UserError

AMP_DTYPES = ("float16", "bfloat16")
TF32 = "on CUDA, multiply float32 in TF32: faster, less precise"


def get_args_parser() -> Parser:
    """Return the parser of all flags."""
    parser = Parser(
        "main.py",
        description="Train and evaluate image classifiers.",
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
    add_data(parser.add_argument_group("data"))
    add_processes(parser.add_argument_group("processes"))
    return parser


def _add_run(group: argparse._ArgumentGroup) -> None:
    add = flags_of(group)
    batch = "images per process and step"
    add("--batch-size", "-b", type=int, default=64, metavar="N", help=batch)
    add("--epochs", type=int, default=300, metavar="N", help="number of training epochs")
    output = "folder for checkpoints and logs; without it, nothing is saved"
    add("--output_dir", default="", metavar="FOLDER", help=output)
    add(
        "--resume",
        default="",
        metavar="SOURCE",
        help="checkpoint to continue or evaluate, as for --finetune; auto: the newest one in "
        "--output_dir",
    )
    overwrite = "delete the run in --output_dir and start a new one"
    add("--overwrite", action="store_true", help=overwrite)
    start = "epoch to start at, from 0; ignored if --resume has one"
    add("--start_epoch", type=int, default=0, metavar="EPOCH", help=start)
    stop = "stop before this epoch; the schedule still spans --epochs"
    add("--stop-epoch", type=int, metavar="EPOCH", help=stop)
    interval = "evaluate every N epochs, and after the last"
    add("--val-interval", type=int, default=1, metavar="N", help=interval)
    evaluate = "evaluate the weights of --resume or --pretrained, and exit"
    add("--eval", action="store_true", help=evaluate)
    add("--seed", type=int, default=0, metavar="N", help="seed of the random numbers")
    steps = "also save a checkpoint every N steps within an epoch"
    add("--save-every-steps", type=int, metavar="N", help=steps)
    minutes = "also save a checkpoint every M minutes"
    add("--save-every-minutes", type=float, metavar="M", help=minutes)
    keep = "keep the checkpoints of the last K and the best K epochs"
    add("--keep-checkpoints", "--checkpoint-hist", type=int, default=1, metavar="K", help=keep)
    bitwise = "make training bitwise reproducible on CUDA as well; slower"
    add("--deterministic", action="store_true", help=bitwise)
    nonfinite = "stop after N consecutive steps with a nonfinite loss"
    add("--max-nonfinite", type=int, default=10, metavar="N", help=nonfinite)
    add("--log-interval", type=int, default=50, metavar="N", help="steps between log lines")
    trackers = "experiment trackers to log to, next to TensorBoard"
    add("--log-to", nargs="+", choices=TRACKERS, default=[], help=trackers)
    add("--experiment", default="", metavar="NAME", help="name of the run for --log-to")


def _add_model(group: argparse._ArgumentGroup) -> None:
    add = flags_of(group)
    add(
        "--model",
        default="visformer_small",
        metavar="NAME",
        help="any model name of timm, hf-hub:ORG/NAME or local-dir:FOLDER",
    )
    add("--pretrained", action="store_true", help="start from the published weights of --model")
    size = f"{PIXELS}; default: that of the weights, else 224, or 32 for DIGITS"
    add_input_size(group, help=size)
    channels = "input channels: 3 for RGB, 1 for grey; default: those of the weights, else 3"
    add("--in-chans", type=int, choices=[1, 3], help=channels)
    add(
        "--progressive-sizes",
        type=int,
        nargs="+",
        metavar="PIXELS",
        help="sizes of training images, smallest first, each for an equal span of the epochs; the "
        "last is --input-size",
    )
    add("--drop", type=float, default=0.0, metavar="RATE", help="dropout rate")
    add("--drop-path", type=float, default=0.1, metavar="RATE", help="stochastic depth rate")
    add(
        "--qk-scale-factor",
        type=float,
        metavar="EXPONENT",
        help="scale queries and keys by head_dim ** EXPONENT each; default: that of the weights, "
        "else -0.25",
    )
    kwargs = "further arguments of the model, such as depth=6"
    add("--model-kwargs", nargs="+", default=[], metavar="KEY=VALUE", help=kwargs)
    locality = "ConViT: initial locality of the attention (model default: 1)"
    add("--locality-strength", type=float, metavar="STRENGTH", help=locality)
    gpsa = "ConViT: use gated positional attention in the first N blocks (model default: 10)"
    add("--local-up-to-layer", type=int, metavar="N", help=gpsa)
    ema = "keep and evaluate a moving average (EMA) of the weights"
    add("--model-ema", action=OnOff, default=True, help=ema)
    decay = "decay of the moving average per update"
    add("--model-ema-decay", type=float, default=0.99996, metavar="DECAY", help=decay)
    ramp = "start with a smaller decay, which grows to --model-ema-decay"
    add("--model-ema-warmup", action=OnOff, default=False, help=ramp)
    add("--model-ema-force-cpu", action="store_true", help="keep the moving average on the CPU")
    fuse = "with --eval: fuse norms and branches of the model for inference first"
    add("--fuse", action="store_true", help=fuse)
    mode = "off: train in evaluation mode, without dropout and with fixed BatchNorm statistics"
    add("--train-mode", action=OnOff, default=True, help=mode)


def _add_finetuning(group: argparse._ArgumentGroup) -> None:
    add = flags_of(group)
    add(
        *("--finetune", "--initial-checkpoint"),
        default="",
        metavar="SOURCE",
        help="start from these weights: a file, a URL, hf-hub:ORG/NAME, local-dir:FOLDER or the "
        "name of published weights; other classes get a new classifier",
    )
    layers = "multiply the learning rate by RATE for each layer below the classifier"
    add("--layer-decay", type=float, metavar="RATE", help=layers)
    frozen = "freeze the stem and the first N stages; 0: the stem alone"
    add("--freeze-stages", type=int, metavar="N", help=frozen)
    add("--linear-probe", action="store_true", help="train only the classifier")
    add(
        "--attn-only",
        action="store_true",
        help="train only attention, position embeddings and the classifier (DeiT III)",
    )
    teacher = "model to distil from, as for --model, with its published weights"
    add("--teacher-model", metavar="NAME", help=teacher)
    weights = "weights of the teacher, as for --finetune"
    add("--teacher-path", default="", metavar="SOURCE", help=weights)
    kinds = "learn from the teacher's probabilities (soft) or predicted classes (hard)"
    add("--distillation-type", choices=["none", "soft", "hard"], default="none", help=kinds)
    alpha = "weight of the distillation loss, from 0 to 1"
    add("--distillation-alpha", type=float, default=0.5, metavar="ALPHA", help=alpha)
    tau = "temperature of soft distillation"
    add("--distillation-tau", type=float, default=1.0, metavar="TAU", help=tau)


def add_precision(group: argparse._ArgumentGroup) -> None:
    add = flags_of(group)
    add("--amp", action=OnOff, default=False, help="compute in automatic mixed precision")
    dtype = "data type of --amp; default: that of the run to resume, else bfloat16 on the CPU, "
    add("--amp-dtype", choices=AMP_DTYPES, help=f"{dtype}float16 elsewhere")
    add("--tf32", action=OnOff, default=True, help=TF32)


def _add_optimisation(group: argparse._ArgumentGroup) -> None:
    add = flags_of(group)
    add("--opt", default="adamw", metavar="NAME", help="any optimizer of timm, such as sgd or lion")
    add("--opt-eps", type=float, default=1e-8, metavar="EPS", help="epsilon of the optimizer")
    betas = "betas of the optimizer, two or more; default: the optimizer's own"
    add("--opt-betas", type=float, nargs="+", metavar="BETA", help=betas)
    kwargs = "further arguments of the optimizer, such as amsgrad=True"
    add("--opt-kwargs", nargs="+", default=[], metavar="KEY=VALUE", help=kwargs)
    clip = "clip the gradient to this norm; default: no clipping"
    add("--clip-grad", type=float, metavar="NORM", help=clip)
    momentum = "momentum of optimizers that have one, such as sgd"
    add("--momentum", type=float, default=0.9, metavar="M", help=momentum)
    decay = "weight decay; norms and biases have none"
    add("--weight-decay", type=float, default=0.05, metavar="RATE", help=decay)
    steps = ("--accum-iter", "--grad-accum-steps")
    add(*steps, type=int, default=1, metavar="N", help="batches to accumulate per optimizer step")
    add_precision(group)
    layout = "use the channels-last memory format; default: if the model is faster with it"
    add("--channels-last", action=OnOff, help=layout)
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
        metavar="MODE",
        help=f"mode of --compile: {', '.join(compilation.MODES)}",
    )
    add(
        "--compile-blocks",
        action="store_true",
        help="with --compile: block by block, which starts sooner; equal blocks share one graph",
    )
    recompute = "recompute blocks in the backward pass to save memory"
    add("--grad-checkpointing", action="store_true", help=recompute)
    sharded = "shard weights and optimizer state over the processes (FSDP)"
    add("--fsdp", action="store_true", help=sharded)
    add("--bce-loss", action="store_true", help="use binary cross-entropy per class as the loss")
    cosub = "train two submodels, sampled by --drop-path, that learn from each other (DeiT's cosub)"
    add("--cosub", action="store_true", help=cosub)
    smoothing = "label smoothing, from 0 to 1"
    add("--smoothing", type=float, default=0.1, metavar="S", help=smoothing)
    add(
        "--class-weights",
        metavar="FILE",
        help="weights of the classes in the loss: balanced (inverse to their number of images), "
        "or a file of lines CLASS,WEIGHT",
    )
    names = f"learning-rate schedule of timm: {', '.join(schedules.NAMES)}"
    add("--sched", default="cosine", metavar="NAME", help=names)
    updates = "step the schedule per update, not per epoch"
    add("--sched-on-updates", action=OnOff, default=False, help=updates)
    lr = "peak learning rate for 512 images per step, scaled linearly with the global batch"
    add("--lr", type=float, default=5e-4, help=lr)
    add("--unscale-lr", action="store_true", help="do not scale --lr, --min-lr, --warmup-lr")
    noise = "noisy part of the epochs, such as 0.4 (to the end) or 0.4 0.9; default: no noise"
    add("--lr-noise", type=float, nargs="+", metavar="PART", help=noise)
    limit = "limit of the noise relative to the learning rate"
    add("--lr-noise-pct", type=float, default=0.67, metavar="LIMIT", help=limit)
    std = "std of the noise relative to the learning rate"
    add("--lr-noise-std", type=float, default=1.0, metavar="STD", help=std)
    length, peak = (f"{what} of a cycle relative to the one before" for what in ("length", "peak"))
    add("--lr-cycle-mul", type=float, default=1.0, metavar="FACTOR", help=length)
    add("--lr-cycle-decay", type=float, default=0.5, metavar="FACTOR", help=peak)
    cycles = "number of cycles, the first one of --epochs epochs"
    add("--lr-cycle-limit", type=int, default=1, metavar="N", help=cycles)
    k_decay = "cosine, poly: exponent of the time, k of k-decay"
    add("--lr-k-decay", type=float, default=1.0, metavar="K", help=k_decay)
    scaled = "scaled down linearly below 512 images per step"
    first = f"learning rate at the start of the warm-up, {scaled}"
    lowest = f"lowest learning rate, {scaled}"
    add("--warmup-lr", type=float, default=1e-6, metavar="LR", help=first)
    add("--min-lr", type=float, default=1e-5, metavar="LR", help=lowest)
    span = "step: epochs between decays; wsd, rsqrt: length of the decay, in epochs or as a share"
    add("--decay-epochs", type=float, default=30, metavar="N", help=span)
    milestones = {"type": int, "nargs": "+", "default": [90, 180, 270], "metavar": "EPOCH"}
    add("--decay-milestones", **milestones, help="multistep: epochs at which to decay")
    add("--warmup-epochs", type=int, default=5, metavar="N", help="epochs of linear warm-up")
    add("--warmup-prefix", action="store_true", help="add the warm-up to --epochs, not within them")
    unused = "accepted for old command lines; has no effect"
    add("--cooldown-epochs", type=int, default=10, metavar="N", help=unused)
    patience = "plateau: epochs without improvement before a decay"
    add("--patience-epochs", type=int, default=10, metavar="N", help=patience)
    rate = "step, multistep, plateau: factor of a decay; poly: the power"
    add("--decay-rate", "--dr", type=float, default=0.1, metavar="RATE", help=rate)


def _add_augmentation(group: argparse._ArgumentGroup) -> None:
    add = flags_of(group)
    jitter = "strength of colour jitter; used if --aa is empty, or with --ThreeAugment"
    add("--color-jitter", type=float, default=0.4, metavar="STRENGTH", help=jitter)
    policy = "timm's RandAugment, AutoAugment or AugMix policy; empty for none"
    add("--aa", default="rand-m9-mstd0.5-inc1", metavar="POLICY", help=policy)
    add("--std-aug", action="store_true", help="augment by crops and flips only")
    three = "make images grey, solarised or blurred instead of --aa (DeiT III)"
    add("--ThreeAugment", action="store_true", help=three)
    simple = "resize and crop with padding instead of a random resized crop (DeiT III)"
    add("--src", action="store_true", help=simple)
    add(
        "--train-crop-mode",
        choices=list(CROP_MODES),
        help="rrc: random resized crop; rkrc, rkrr: resize by the short side, crop at the centre "
        "or at random; default: rrc, or up to 32 pixels a padded crop",
    )
    area = "area of crops relative to the image; default: 0.08 1, for rkrc and rkrr 0.8 1"
    add("--scale", type=float, nargs="+", metavar=("MIN", "MAX"), help=area)
    aspect = "aspect ratio of crops; default: 0.75 1.33, for rkrc and rkrr 0.9 1.11"
    add("--ratio", type=float, nargs="+", metavar=("MIN", "MAX"), help=aspect)
    mirror = "probability of a horizontal flip; default: 0.5, or 0 for DIGITS"
    add("--hflip", type=float, metavar="P", help=mirror)
    add("--vflip", type=float, default=0.0, metavar="P", help="probability of a vertical flip")
    filters = "resize filter of training images; random: bilinear or bicubic"
    names = ["random", "bilinear", "bicubic"]
    add("--train-interpolation", default="bicubic", choices=names, help=filters)
    repeats = "train each epoch on a third of the images, three repeats of each"
    add("--repeated-aug", action=OnOff, default=True, help=repeats)
    erase = "probability of random erasing"
    add("--reprob", type=float, default=0.25, metavar="P", help=erase)
    fill = "fill of erased boxes: const (zeros), rand (one random colour), pixel (noise)"
    add("--remode", default="pixel", choices=["const", "rand", "pixel"], help=fill)
    add("--recount", type=int, default=1, metavar="N", help="most boxes to erase of an image")
    add("--resplit", action="store_true", help="accepted for old command lines; has no effect")
    add("--mixup", type=float, default=0.8, metavar="ALPHA", help="alpha of mixup; 0: no mixup")
    add("--cutmix", type=float, default=1.0, metavar="ALPHA", help="alpha of cutmix; 0: no cutmix")
    sides = "range of the sides of cutmix boxes, relative to the image; replaces --cutmix"
    add("--cutmix-minmax", type=float, nargs="+", metavar=("MIN", "MAX"), help=sides)
    mix = "probability of mixing a batch (or pair, or image: --mixup-mode)"
    add("--mixup-prob", type=float, default=1.0, metavar="P", help=mix)
    switch = "probability of cutmix rather than mixup, if both are on"
    add("--mixup-switch-prob", type=float, default=0.5, metavar="P", help=switch)
    mode = "draw a mixing ratio for each batch, pair of images or image (elem)"
    add("--mixup-mode", default="batch", choices=["batch", "pair", "elem"], help=mode)
    off = "first epoch without mixup and cutmix; 0: none"
    add("--mixup-off-epoch", type=int, default=0, metavar="N", help=off)


def add_processes(group: argparse._ArgumentGroup) -> None:
    add = flags_of(group)
    add("--device", help="cpu, cuda or cuda:N; default: cuda if available, else cpu")
    size = "number of processes; the launcher sets it"
    add("--world_size", type=int, default=1, metavar="N", help=size)
    address = "address where the processes meet; env://: the launcher's"
    add("--dist_url", default="env://", metavar="URL", help=address)
    wait = "seconds to wait for other processes"
    add("--dist-timeout", type=float, default=600.0, metavar="SECONDS", help=wait)
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
