"""The picture of non-locality: how far the heads of each layer look."""

from argparse import ArgumentParser, Namespace
from typing import Any

import torch

from tools.visualize.capture import attention_layers, capture
from tools.visualize.gates import draw_epochs, draw_heads, rows_of
from tools.visualize.loading import (
    Snapshot,
    Subject,
    find_images,
    in_order,
    load_pictures,
    load_subject,
)
from tools.visualize.measures import nonlocality_of
from tools.visualize.saving import Picture
from utils import UserError

FAR = "non-locality D, patches"
BATCH = 8  # images at once: N x N weights of every head are formed


def add_flags(parser: ArgumentParser) -> None:
    """The flags of this kind."""
    parser.add_argument("checkpoints", nargs="+", metavar="CKPT", help="files, or models' names")
    parser.add_argument("--image", nargs="+", metavar="IMG", help="images to average over")
    parser.add_argument("--data-path", metavar="FOLDER", help="or images from within a folder")
    parser.add_argument("--count", type=int, default=16, help="how many of the folder (16)")


def make(args: Namespace) -> Picture:
    """Non-locality by layer of one checkpoint, or over the epochs of several."""
    if bool(args.image) == bool(args.data_path):
        raise UserError("give either --image IMG ... or --data-path FOLDER")
    paths = args.image or find_images(args.data_path, args.count)
    found = []
    for path in args.checkpoints:
        subject = load_subject(path, args)
        found.append(Snapshot(subject, measure(subject, paths)))
    snapshots, notes = in_order(found, args.checkpoints)
    figure: Any = (
        draw_heads(snapshots[0], FAR) if len(snapshots) == 1 else draw_epochs(snapshots, FAR)
    )
    farthest = max(values.max().item() for s in snapshots for values in s.values.values())
    for ax in figure.axes:
        ax.set_ylim(0.0, 1.05 * farthest or 1.0)
    notes = [*notes, f"mean over {len(paths)} image(s)"]
    return Picture(figure, rows_of(snapshots, "nonlocality"), snapshots[-1].epoch or 0, notes)


def measure(subject: Subject, paths: list) -> dict[str, torch.Tensor]:
    """Non-locality of every head, ``h`` by layer, averaged over images."""
    layers = attention_layers(subject.model)
    sums: dict[str, torch.Tensor] = {}
    for start in range(0, len(paths), BATCH):
        images = subject.normalized(load_pictures(subject, paths[start : start + BATCH]))
        for captured in capture(subject.model, layers, images):
            far = nonlocality_of(captured).double().sum(0).cpu()
            sums[captured.name] = sums.get(captured.name, 0.0) + far
    return {name: total / len(paths) for name, total in sums.items()}
