"""Table of this repository's models: ``python -m tools.model_table [NAME ...]``.

Parameters and multiply-accumulates are counted on the model itself at its native size, attention
products included; beside them stand the figures that the papers print.
"""

import argparse
import sys

import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

import models
from models.layers import set_fused_attention

# name: (parameters in M, GMACs, ImageNet top-1 in %) as printed in the paper
PAPER = {
    "visformer_tiny": ("10.3", "1.3", "78.6"),
    "visformer_small": ("40.2", "4.9", "82.2"),
    "swin_visformer_tiny_v2": ("9.4", "1.3", "79.6"),
    "swin_visformer_small_v2": ("23.6", "4.3", "83.0"),
    "convit_tiny": ("6", "1", "73.1"),
    "convit_tiny_plus": ("10", "2", "76.7"),
    "convit_small": ("27", "5.4", "81.3"),
    "convit_small_plus": ("48", "10", "82.2"),
    "convit_base": ("86", "17", "82.4"),
    "convit_base_plus": ("152", "30", "82.5"),
    "fastvit_t8": ("3.6", "0.7", "75.6"),
    "fastvit_t12": ("6.8", "1.4", "79.1"),
    "fastvit_s12": ("8.8", "1.8", "79.8"),
    "fastvit_sa12": ("10.9", "1.9", "80.6"),
    "fastvit_sa24": ("20.6", "3.8", "82.6"),
    "fastvit_sa36": ("30.4", "5.6", "83.6"),
    "fastvit_ma36": ("42.7", "7.9", "83.9"),
}
NOTES = """\
ConViT's paper leaves the two attention products out of its GMACs, and cuts millions of parameters
to whole ones. Its GMACs here are those of the written-out attention; the separable one that runs by
default takes about as many.
FastViT's paper prints fewer parameters than its released code has; ours are the code's, before
reparameterisation. For MA36 it prints 7.9 GMACs, of which 7.83 are counted here."""


def our_models() -> list[str]:
    """Names that are registered by this repository, family by family."""

    def module(name: str) -> str:
        return timm.models.model_entrypoint(name).__module__

    return sorted((n for n in timm.list_models() if module(n).startswith("models.")), key=module)


def size_options(name: str, size: int | None) -> dict[str, int]:
    """Keyword arguments of a model of ours, or timm's of that name, for square images of a size."""
    native = timm.get_pretrained_cfg(name).input_size[-1]
    if size in (None, native) or name.startswith("fastvit"):
        return {}
    return {"img_size": size}


def count(name: str, size: int | None = None) -> tuple[float, float]:
    """Parameters in millions and GMACs, without allocating the model.

    Args:
        name: Registered name.
        size: Height and width of the image, the native ones if not given.
    """
    with torch.device("meta"):
        model = timm.create_model(name, **size_options(name, size)).eval()
        channels, height, width = model.pretrained_cfg["input_size"]
        image = torch.zeros(1, channels, size or height, size or width)
        set_fused_attention(model, False)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(image)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return parameters / 1e6, counter.get_total_flops() / 2e9


def table(names: list[str]) -> str:
    """The table in Markdown."""
    lines = [
        "| name | parameters (M) | paper | GMACs | paper | ImageNet top-1 of the paper |",
        "|---|---|---|---|---|---|",
    ]
    for name in names:
        parameters, gmacs = count(name)
        paper = PAPER.get(name, ("", "", ""))
        lines.append(
            f"| `{name}` | {parameters:.1f} | {paper[0]} | {gmacs:.2f} | {paper[1]} | {paper[2]} |"
        )
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    """Print the table; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="models; all of ours if none")
    names = parser.parse_args(argv).names or our_models()
    try:
        unknown = [name for name in names if not timm.is_model(name)]
        if unknown:
            models.build_model(unknown[0], {}, {})
    except models.ModelError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(table(names), NOTES, sep="\n\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
