"""Count parameters, multiply-accumulates and activations of models.

``python -m tools.flops [NAME ...]``: without names, a table of this repository's models next to the
figures of their papers; with names (any of timm's), a table of these; with --stages, a table by
stage for each. Models are not allocated if they can run on PyTorch's meta device.

The forward pass is counted as it runs: attention in PyTorch's fused kernels as two matrix products,
and ConViT's positional attention as two small products, over rows and over columns.
--no-fused-attention counts all attention written out, and ConViT's positional scores.

- parameters: elements of the parameters, in millions.
- GMACs: billions of multiply-accumulates in convolutions, linear layers and matrix products.
- activations: elements of the outputs of convolutions and linear layers, in millions, without
  attention's products (as in timm's tables with fused attention; arXiv 2003.13678, section 2,
  counts convolutions).

GMACs and activations are of one image, or of a batch of --batch images.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import models
from tools import cli, files
from tools.flops.counting import PartCost, Request, our_models, run, total
from tools.flops.paper import PAPER
from tools.flops.stages import by_stage
from tools.tables import markdown, write_csv
from training.parser import PIXELS, Parser, add_input_size, positive

NOTES = """\
ConViT's paper leaves the two attention products out of its GMACs, and cuts millions of parameters
to whole ones.
FastViT's paper prints fewer parameters than its released code has; ours are the code's, before
reparameterisation. For MA36 it prints 7.9 GMACs, of which 7.83 are counted here."""
FUSED = "Attention is counted as it runs, ConViT's positional attention as two small products."
EXPLICIT = "Attention is counted written out, ConViT's positional attention as scores and weights."


def _shape(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def table(rows: dict[str, PartCost]) -> str:
    """Return the table of whole models, by name, with the papers' figures."""
    head = ["name", "parameters (M)", "paper", "GMACs", "paper", "activations (M)"]
    body = []
    for name, row in rows.items():
        paper, (parameters, gmacs, activations) = PAPER.get(name, ("", "", "")), row.cost
        figures = [f"{parameters:.1f}", paper[0], f"{gmacs:.2f}", paper[1], f"{activations:.2f}"]
        body.append([f"`{name}`", *figures, paper[2]])
    return markdown([*head, "ImageNet top-1 of the paper"], body)


def stage_table(rows: Sequence[PartCost]) -> str:
    """Return the table of the parts of one model, and the whole."""
    head = ["part", "parameters (M)", "GMACs", "activations (M)", "output"]
    body = []
    for row in rows:
        parameters, gmacs, activations = row.cost
        figures = [f"{parameters:.3f}", f"{gmacs:.4f}", f"{activations:.3f}"]
        body.append([row.name, *figures, _shape(row.shape)])
    return markdown(head, body)


def requests(args: argparse.Namespace) -> list[Request]:
    """Return a request for every model that the flags name."""
    names, source = args.names, None
    if args.checkpoint:
        if len(names) > 1:
            raise models.ModelError(f"--checkpoint {args.checkpoint}: give one NAME, not {names}")
        source = models.find_model(args.checkpoint, names[0] if names else None, pretrained=True)
        names = [source.name]
    options = (args.input_size, args.batch, args.fuse, args.fused_attention, source)
    return [Request(name, *options) for name in names or our_models()]


@cli.program
def main(argv: list[str]) -> None:
    """Run with the flags ``argv``; count, print and write."""
    parser = Parser("python -m tools.flops", description=__doc__.splitlines()[0])
    add = parser.add_argument
    names = "timm model names; default: all models of this repository"
    add("names", nargs="*", metavar="NAME", help=names)
    add_input_size(parser, help=f"{PIXELS}; default: that of the model")
    add("--batch", type=positive, default=1, metavar="N", help="images per batch")
    add("--stages", action="store_true", help="print a table by stage for each model")
    blocks = "as --stages, with plain transformers by block"
    add("--blocks", action="store_true", help=blocks)
    fused = "count the models fused for inference"
    add("--fuse", action="store_true", help=fused)
    explicit = {"dest": "fused_attention", "action": "store_false"}
    add("--no-fused-attention", help="count attention written out, not fused", **explicit)
    add("--checkpoint", metavar="CKPT", help=f"count the model of these weights: {cli.SOURCES}")
    add("--csv", type=Path, metavar="FILE.csv", help="write exact counts")
    args = parser.parse_args(argv)
    files.check_files({"--csv": args.csv}, [args.checkpoint])
    by_part = args.stages or args.blocks
    wholes, exact = {}, []
    for request in requests(args):
        model, counter = run(request)
        wholes[request.name] = whole = total(model, counter)
        if by_part:
            rows = [*by_stage(model, counter, args.blocks), whole]
            images = _shape(counter.image)
            print(f"{request.name}, images {images}", stage_table(rows), "", sep="\n\n")
        else:
            rows = [whole]
        for row in rows:
            counts = (row.parameters, row.macs, row.activations)
            exact.append((request.name, row.name, *counts, _shape(row.shape)))
    if not by_part:
        print(table(wholes), end="\n\n")
    print(FUSED if args.fused_attention else EXPLICIT)
    if not args.names and not args.checkpoint:
        print(NOTES)
    if args.csv:
        heads = ["model", "part", "parameters", "macs", "activations", "output"]
        write_csv(args.csv, heads, exact)
        print(f"written to {args.csv}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
