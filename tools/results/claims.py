"""Claims of the papers, and the trainings that test them."""

from dataclasses import dataclass, field

SHARES = (0.05, 0.1, 0.3, 1.0)


@dataclass(frozen=True)
class Arm:
    """One training.

    Attributes:
        name: Of its folder and of its file of results.
        flags: Added to the common recipe.
        teacher: Arm whose run with the same seed is the teacher.
        share: Fraction of the training set. The number of epochs is divided by it, so that every
            arm sees as many images (ConViT, section 3).
        figure: Name of its accuracy in ``log.txt``.
        config: Recipe instead of the suite's.
    """

    name: str
    flags: tuple[str, ...]
    teacher: "Arm | None" = None
    share: float = 1.0
    figure: str = "test_acc1"
    config: str = ""


@dataclass(frozen=True)
class Pair:
    """Two arms that differ in the claim's subject; the second is claimed to be better.

    Attributes:
        base, other: The arms.
        published: The published figures of both.
    """

    base: Arm
    other: Arm
    published: str = ""


@dataclass(frozen=True)
class Claim:
    """A statement of a paper.

    Attributes:
        title: What is compared.
        paper: What the paper says.
        pairs: The trainings that test it.
        is_better: The paper claims a gain; otherwise, that nothing is lost.
    """

    title: str
    paper: str
    pairs: tuple[Pair, ...]
    is_better: bool = True

    @property
    def arms(self) -> tuple[Arm, ...]:
        """The arms of all pairs, once each."""
        return tuple(dict.fromkeys(arm for pair in self.pairs for arm in (pair.base, pair.other)))


@dataclass(frozen=True)
class Board:
    """Runs beside the best public figures.

    Attributes:
        title: What is trained.
        rules: How, and whose the public figures are.
        public: The best public accuracy of each arm.
    """

    title: str
    rules: str
    public: dict[Arm, str]

    @property
    def arms(self) -> tuple[Arm, ...]:
        """The arms in order."""
        return tuple(self.public)


@dataclass(frozen=True)
class Suite:
    """Claims and boards, with the networks of them.

    Attributes:
        about: What is trained, for the page.
        config: Recipe of the runs.
        claims, boards: By name.
        flags: Of all runs, beside the recipe's.
    """

    about: str
    config: str
    claims: dict[str, Claim]
    boards: dict[str, Board] = field(default_factory=dict)
    flags: tuple[str, ...] = ()

    @property
    def parts(self) -> dict[str, Claim | Board]:
        """Claims and boards by name."""
        return {**self.claims, **self.boards}


def _arm(name: str, model: str, *kwargs: str, flags: tuple[str, ...] = (), **options) -> Arm:
    words = ("--model-kwargs", *kwargs) if kwargs else ()
    return Arm(name, ("--model", model, *words, *flags), **options)


HARD = ("--distillation-type", "hard")
HALF = ("--amp", "--qk-scale-factor", "-0.5", "--amp-dtype")
GROWING = ("--progressive-sizes", "16", "24", "32")
AVERAGE = ("--model-ema", "--model-ema-decay", "0.998", "--model-ema-warmup")


def _claims(nets: dict[str, tuple[str, ...]], halves: tuple[str, ...]) -> dict[str, Claim]:
    """Return the claims with these networks: of each name, the model and its arguments."""

    def arm(net: str, suffix: str = "", **options) -> Arm:
        return _arm(net + suffix, *nets[net], **options)

    deit, visformer, v2 = arm("deit"), arm("visformer"), arm("visformer_v2")
    shares = [("" if share == 1 else f"_{share:g}", share) for share in SHARES]
    return {
        "visformer": Claim(
            "Visformer against DeiT, equal epochs and cost",
            "Visformer (arXiv 2104.12533), table 1: ahead on ImageNet",
            (Pair(deit, visformer, "72.2, 78.6"),),
        ),
        "few_data": Claim(
            "ConViT against DeiT, shares of the training set",
            "ConViT (arXiv 2103.10697), table 3: ahead, and the more so the fewer the images",
            tuple(
                Pair(
                    arm("deit", suffix, share=share),
                    arm("convit", suffix, share=share),
                    {0.05: "34.8, 47.8", 0.1: "48.0, 59.6", 0.3: "66.1, 73.7"}.get(
                        share, "79.9, 81.4"
                    ),
                )
                for suffix, share in shares
            ),
        ),
        "v2": Claim(
            "Visformer V2 against Visformer",
            "README of danczs/Visformer: ahead on ImageNet",
            (Pair(visformer, v2, "78.6, 79.6"),),
        ),
        "branches": Claim(
            "FastViT with and without overparameterised branches",
            "FastViT (arXiv 2303.14189), section 3.2.2: better with them",
            (
                Pair(
                    _arm("fastvit_plain", *nets["fastvit"], "overparameterize=False"),
                    arm("fastvit"),
                ),
            ),
        ),
        "distillation": Claim(
            "DeiT alone and taught by Visformer",
            "DeiT (arXiv 2012.12877), section 4: better with a teacher that convolves",
            (
                Pair(
                    deit,
                    arm("deit", "_distilled", flags=HARD, teacher=visformer),
                    "72.2, 74.5",
                ),
            ),
        ),
        "half": Claim(
            "Exponent -0.5 in half precision against float32",
            "README of danczs/Visformer: V2 trains so",
            tuple(
                Pair(v2, arm("visformer_v2", f"_{dtype}", flags=(*HALF, dtype))) for dtype in halves
            ),
            is_better=False,
        ),
        "progressive": Claim(
            "Resolution that grows over the epochs against the full one",
            "EfficientNetV2 (arXiv 2104.00298), section 4: as good in less time",
            (Pair(visformer, arm("visformer", "_growing", flags=GROWING)),),
            is_better=False,
        ),
        "ema": Claim(
            "The moving average of the weights against the weights",
            "Common practice, such as DeiT's: better",
            (
                Pair(
                    arm("visformer", "_averaged", flags=AVERAGE),
                    arm("visformer", "_averaged", flags=AVERAGE, figure="test_ema_acc1"),
                ),
            ),
        ),
    }


# top-1 in % of github.com/fastai/imagenette's leaderboards, by pixels and epochs
FASTAI = {
    "IMAGENETTE": {128: ("87.4", "91.6", "93.6"), 256: ("86.9", "93.5", "94.9")},
    "IMAGEWOOF": {128: ("", "", ""), 256: ("", "", "")},
}


def _imagenettes() -> dict[str, Board]:
    boards = {}
    for data_set, figures in FASTAI.items():
        public = {}
        for size, best in figures.items():
            for epochs, figure in zip((5, 20, 80), best, strict=True):
                flags = ("--data-set", data_set, "--data-path", "data", "--epochs", str(epochs))
                name, config = f"{data_set.lower()}_{size}_{epochs}", f"imagenette_{size}.yaml"
                public[Arm(name, flags, config=f"configs/{config}")] = figure
        boards[data_set.lower()] = Board(
            data_set.title(),
            "Visformer-Ti from scratch by fastai's rules, at 128 and 256 pixels, 5, 20 and 80 "
            "epochs",
            public,
        )
    return boards


CIFAR10 = Arm("cifar10_scratch", (), config="configs/cifar10_scratch.yaml")
CIFAR100 = Arm(
    "cifar100_scratch",
    ("--data-set", "CIFAR100", "--data-path", "data"),
    config="configs/cifar10_scratch.yaml",
)
SUITES = {
    "cpu": Suite(
        "Networks of the papers' designs, narrow and of few strides, so that images of 32 pixels "
        "have 64 positions: DeiT-Ti, ConViT-Ti, Visformer-Ti and V2-Ti of about 95 million "
        "multiply-accumulates each, FastViT-T8 of 42. Without the arguments of `--model-kwargs` "
        "they are the papers'",
        "configs/cifar10_claims.yaml",
        _claims(
            {
                "deit": ("deit_tiny_patch16_224", "patch_size=4", "embed_dim=96"),
                "convit": ("convit_tiny", "patch_size=4", "embed_dim=96"),
                "visformer": ("visformer_tiny", "patch_sizes=[2,2,1]", "width=0.75"),
                "visformer_v2": (
                    "swin_visformer_tiny_v2",
                    "stem_stride=1",
                    "patch_sizes=[2,2,2,1]",
                    "width=0.75",
                ),
                "fastvit": ("fastvit_t8", "stem_stride=2"),
            },
            ("bfloat16",),
        ),
    ),
    "gpu": Suite(
        "The papers' networks, of few strides, so that images of 32 pixels have 64 positions, and "
        "100 epochs of all of CIFAR-10",
        "configs/cifar10_claims.yaml",
        _claims(
            {
                "deit": ("deit_tiny_patch16_224", "patch_size=4"),
                "convit": ("convit_tiny", "patch_size=4"),
                "visformer": ("visformer_tiny", "patch_sizes=[2,2,1]"),
                "visformer_v2": (
                    "swin_visformer_tiny_v2",
                    "stem_stride=1",
                    "patch_sizes=[2,2,2,1]",
                ),
                "fastvit": ("fastvit_t8", "stem_stride=2"),
            },
            ("bfloat16", "float16"),
        ),
        {
            "cifar": Board(
                "CIFAR-10 and CIFAR-100 from scratch",
                "Visformer-Ti at 32 pixels by `configs/cifar10_scratch.yaml`",
                {CIFAR10: "", CIFAR100: ""},
            ),
            **_imagenettes(),
        },
        ("--epochs", "100", "--warmup-epochs", "5"),
    ),
}
