"""Cost of models: ``python -m tools.flops [NAME ...]``.

Without names, the table of this repository's models beside the figures that their papers print;
with names (any of timm's), theirs; with --stages, a table by stage for each. Models are not
allocated where they can run on PyTorch's meta device.

Counted is the forward pass as it runs: attention in PyTorch's fused kernels, which are two products
of matrices, and ConViT's positional attention as its two small products, one over rows and one over
columns. --no-fused-attention counts all attention written out, ConViT's scores of positions, too.

- parameters: elements of the parameters, in millions.
- GMACs: billions of multiply-accumulates in convolutions, linear layers and products of matrices.
- activations: elements of the outputs of convolutions and linear layers, in millions, attention's
  products left out (as timm's tables count them with fused attention; arXiv 2003.13678, section 2,
  counts convolutions).

GMACs and activations are of one image, or of the images of --batch.
"""

import argparse
import csv
import io
import sys
from collections.abc import Sequence
from pathlib import Path

import models
from tools.flops.counting import Request, Row, our_models, run, total
from tools.flops.stages import by_stage
from training import files, launch
from training.flags import positive

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
to whole ones.
FastViT's paper prints fewer parameters than its released code has; ours are the code's, before
reparameterisation. For MA36 it prints 7.9 GMACs, of which 7.83 are counted here."""
FUSED = """\
Attention is counted as it runs, ConViT's positional attention as two small products."""
EXPLICIT = """\
Attention is counted written out, ConViT's positional attention as scores and weights."""


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    ruled = ["|---" * len(line) + "|" if line[0] == "---" else None for line in lines]
    return "\n".join(
        rule or "| " + " | ".join(line) + " |" for line, rule in zip(lines, ruled, strict=True)
    )


def table(rows: dict[str, Row]) -> str:
    """Whole models, by name, beside the papers' figures."""
    head = ["name", "parameters (M)", "paper", "GMACs", "paper", "activations (M)"]
    body = []
    for name, row in rows.items():
        parameters, gmacs, top1 = PAPER.get(name, ("", "", ""))
        cost = row.cost
        ours = [f"{cost.parameters:.1f}", f"{cost.gmacs:.2f}", f"{cost.activations:.2f}"]
        body.append([f"`{name}`", ours[0], parameters, ours[1], gmacs, ours[2], top1])
    return markdown([*head, "ImageNet top-1 of the paper"], body)


def stage_table(rows: Sequence[Row]) -> str:
    """The parts of one model, and the whole."""
    head = ["part", "parameters (M)", "GMACs", "activations (M)", "output"]
    body = []
    for row in rows:
        cost = row.cost
        figures = [f"{cost.parameters:.3f}", f"{cost.gmacs:.4f}", f"{cost.activations:.3f}"]
        body.append([row.name, *figures, "x".join(map(str, row.shape))])
    return markdown(head, body)


def write_csv(path: Path, rows: Sequence[tuple[str, Row]]) -> None:
    """Exact counts: a line for every model, or for every part of every model."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["model", "part", "parameters", "macs", "activations", "output"])
    for name, row in rows:
        shape = "x".join(map(str, row.shape))
        writer.writerow([name, row.name, row.parameters, row.macs, row.activations, shape])
    data = text.getvalue().encode()
    files.write_atomically(path, lambda file: file.write(data))


def requests(args: argparse.Namespace) -> list[Request]:
    """One for every model asked for."""
    names = args.names
    if args.checkpoint:
        saved = models.read_checkpoint(args.checkpoint).get("model_name")
        names = names or [name for name in [saved] if name]
        if len(names) != 1:
            raise models.ModelError(f"--checkpoint {args.checkpoint}: give one NAME, of its model")
        if saved not in (None, names[0]):
            raise models.ModelError(f"{args.checkpoint} is of {saved}, not of {names[0]}")
    size = args.input_size and (args.input_size[0], args.input_size[-1])
    options = (size, args.batch, args.fuse, args.fused_attention, args.checkpoint)
    return [Request(name, *options) for name in names or our_models()]


def report(args: argparse.Namespace) -> None:
    """Count, print, write."""
    wholes, exact = {}, []
    for request in requests(args):
        model, counter = run(request)
        whole = total(model, counter)
        wholes[request.name] = whole
        if args.stages or args.blocks:
            rows = [*by_stage(model, counter, args.blocks), whole]
            image = "x".join(map(str, counter.image))
            print(f"{request.name}, images {image}", stage_table(rows), "", sep="\n\n")
            exact += [(request.name, row) for row in rows]
        else:
            exact.append((request.name, whole))
    if not (args.stages or args.blocks):
        print(table(wholes), end="\n\n")
    print(FUSED if args.fused_attention else EXPLICIT)
    if not args.names and not args.checkpoint:
        print(NOTES)
    if args.csv:
        write_csv(args.csv, exact)
        print(f"written to {args.csv}")


def get_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = argparse.ArgumentParser("tools.flops", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("names", nargs="*", metavar="NAME", help="models, any of timm's; all of ours if none")
    add(
        "--input-size",
        type=positive,
        nargs="+",
        metavar=("H", "W"),
        help="height and width of the images in pixels, or the side; the native ones if not given",
    )
    add("--batch", type=positive, default=1, help="images that go through together")
    add("--stages", action="store_true", help="a table by stage for each model")
    add("--blocks", action="store_true", help="the same, and plain transformers by block")
    add("--fuse", action="store_true", help="count the inference nets, made by model.fuse()")
    add(
        "--no-fused-attention",
        dest="fused_attention",
        action="store_false",
        help="count attention written out",
    )
    add("--checkpoint", help="file or address that says the model, its classes and input size")
    add("--csv", type=Path, help="file for the exact counts")
    return parser


def main(argv: list[str]) -> int:
    """Print the cost of the models that ``argv`` names; returns the exit status."""
    parser = get_parser()
    args = parser.parse_args(argv)
    if args.input_size and len(args.input_size) > 2:
        parser.error("--input-size takes one or two numbers")
    return launch.run_program(lambda: report(args))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
