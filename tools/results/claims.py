"""Claims of the papers, and the trainings that test them."""

from dataclasses import dataclass

SHARES = (0.05, 0.1, 0.3, 1.0)


@dataclass(frozen=True)
class Arm:
    """One training of a claim."""

    name: str  # of its folder
    flags: tuple[str, ...]  # added to the common recipe
    teacher: "Arm | None" = None  # its run with the same seed is the teacher
    # Fraction of the training set. The number of epochs is divided by it, so that every arm sees
    # as many images (ConViT, section 3).
    share: float = 1.0


@dataclass(frozen=True)
class Claim:
    """A statement of a paper, and its arms, which differ in its subject."""

    title: str  # what is compared
    paper: str  # what the paper says
    arms: tuple[Arm, ...]


def _model(name: str, *flags: str, suffix: str = "", **options: object) -> Arm:
    return Arm(name + suffix, ("--model", name, *flags), **options)


DEIT, VISFORMER = _model("deit_tiny_patch16_224"), _model("visformer_tiny")
HARD = ("--distillation-type", "hard")
HALF = ("--amp", "--amp-dtype", "float16", "--qk-scale-factor", "-0.5")


def _few_data(name: str) -> tuple[Arm, ...]:
    return tuple(
        _model(name, suffix="" if share == 1 else f"_{share:g}", share=share) for share in SHARES
    )


CLAIMS = {
    "visformer": Claim(
        "Visformer-Ti against DeiT-Ti, equal epochs",
        "Visformer (arXiv 2104.12533), table 1: 78.6 % against 72.2 % on ImageNet",
        (DEIT, VISFORMER),
    ),
    "few_data": Claim(
        "ConViT-Ti against DeiT-Ti, shares of the training set",
        "ConViT (arXiv 2103.10697), section 3: ahead, and the more so the fewer the images",
        (*_few_data("deit_tiny_patch16_224"), *_few_data("convit_tiny")),
    ),
    "v2": Claim(
        "Visformer V2-Ti against Visformer-Ti",
        "README of danczs/Visformer: 79.6 % against 78.6 % on ImageNet",
        (VISFORMER, _model("swin_visformer_tiny_v2")),
    ),
    "half": Claim(
        "float16 with exponent -0.5 against float32",
        "README of danczs/Visformer: V2 trains so",
        (VISFORMER, _model("visformer_tiny", *HALF, suffix="_float16")),
    ),
    "branches": Claim(
        "FastViT-T8 with and without overparameterised branches",
        "FastViT (arXiv 2303.14189), section 3.2.2: better with them",
        (
            _model("fastvit_t8", "--model-kwargs", "overparameterize=False", suffix="_plain"),
            _model("fastvit_t8"),
        ),
    ),
    "distillation": Claim(
        "DeiT-Ti alone and taught by Visformer-Ti",
        "DeiT (arXiv 2012.12877), section 4: better with a teacher that convolves",
        (DEIT, _model(DEIT.name, *HARD, suffix="_distilled", teacher=VISFORMER)),
    ),
}
