"""Picture of the demo: curves of the run, twelve digits with predictions, attention of one."""

from pathlib import Path
from typing import Any

import torch

import datasets
from models import load_model
from tools import plots
from tools.visualize.capture import attention_layers, capture
from tools.visualize.curves import log_file, read_log
from tools.visualize.figures import MAGNITUDE, integer_ticks
from training.flags import parse_args

ROWS, COLUMNS = 3, 4


def held_out(config: str, count: int) -> tuple[torch.Tensor, list[int]]:
    """Return the first evaluation images ``B 3 H W``, normalized, and their classes."""
    dataset, _ = datasets.build_dataset(False, parse_args(["-c", config, "--loader", "timm"])[0])
    chosen = [dataset[index] for index in range(count)]
    return torch.stack([image for image, *_ in chosen]), [int(target) for _, target, *_ in chosen]


def draw(run: str, config: str, path: Path) -> None:
    """Draw a run of DIGITS into a PNG file.

    Args:
        run: Its output folder.
        config: Its recipe.
        path: The file.
    """
    log = read_log(log_file(run))
    found = load_model(f"{run}/checkpoint.pth")
    images, targets = held_out(config, ROWS * COLUMNS)
    with torch.no_grad():
        probabilities = found.model(images).softmax(1)
    pixels = datasets.denormalize(images, found.data_config)
    figure = plots.new_figure(10, 5.2)
    upper, lower = figure.subfigures(2, 1, height_ratios=(1, 0.5))
    left, right = upper.subfigures(1, 2, width_ratios=(1.3, 1))
    draw_curves(left, log)
    for axes, image, target, row in zip(
        right.subplots(ROWS, COLUMNS).flat, pixels, targets, probabilities, strict=True
    ):
        guess = int(row.argmax())
        axes.imshow(image.mean(0).numpy(), cmap="gray_r", interpolation="nearest")
        colour = "tab:green" if guess == target else "tab:red"
        axes.set_title(f"{guess}, {row[guess]:.0%}", color=colour, fontsize=9)
        axes.set_axis_off()
    right.suptitle("predictions on validation images", fontsize=10)
    draw_attention(lower, found.model, images[:1], pixels[0])
    plots.save(figure, path, dpi=130)


def draw_curves(figure: Any, log: list[dict[str, float]]) -> None:
    """Draw loss and accuracy by epoch, side by side."""
    series = {
        "loss": {"train_loss": "training", "test_loss": "evaluation"},
        "accuracy (%)": {"test_acc1": "evaluation", "ema_acc1": "its moving average"},
    }
    for axes, (what, keys) in zip(figure.subplots(1, 2), series.items(), strict=True):
        for key, label in keys.items():
            points = [(line["epoch"], line[key]) for line in log if key in line]
            if points:
                axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=label)
        axes.set(xlabel="epoch, from 0", title=what)
        axes.grid()
        axes.legend(fontsize=8)
        integer_ticks(axes.xaxis)


def draw_attention(
    figure: Any, model: torch.nn.Module, image: torch.Tensor, pixels: torch.Tensor
) -> None:
    """Draw, for layers of a model, how much attention each position of an image gets.

    That is the mean over heads and queries.
    """
    layers = attention_layers(model)
    panels = figure.subplots(1, len(layers) + 1)
    height, width = pixels.shape[-2:]
    extent = (0, width, height, 0)
    for axes in panels:
        axes.imshow(pixels.mean(0).numpy(), cmap="gray_r", extent=extent)
        axes.set_axis_off()
    panels[0].set_title("image", fontsize=9)
    for number, (axes, found) in enumerate(
        zip(panels[1:], capture(model, layers, image), strict=True)
    ):
        received = found.parts().full[0].mean((0, 1)).unflatten(0, found.grid)
        axes.imshow(received.numpy(), cmap=MAGNITUDE, alpha=0.6, extent=extent)
        axes.set_title(f"layer {number}", fontsize=9)
    figure.suptitle("attention that each position gets, layer by layer", fontsize=10)
