"""Reports of measurements: pictures, and the table of models in the README."""

import csv
from collections.abc import Sequence
from pathlib import Path

import models
from tools import plots
from tools.flops import count
from tools.flops.paper import TOP1
from tools.tables import markdown
from utils import UserError

MODES = {"infer": "inference", "train": "training"}
FAMILIES = {
    "visformer": "tab:blue",
    "swin_visformer": "tab:purple",
    "convit": "tab:orange",
    "fastvit": "tab:green",
}


def read(path: Path) -> list[dict]:
    """Return the rows of a table that ``--csv`` wrote.

    Raises:
        UserError: The file cannot be read as such a table.
    """
    try:
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
        for row in rows:
            row["rate"] = float(row["rate"])
            row["ratio"] = float(row["ratio"]) if row["ratio"] else None
            row["best"] = row["best"] == "True"
    except (OSError, UnicodeDecodeError, KeyError, ValueError, TypeError) as error:
        raise UserError(
            f"--read {path} is not a table of tools.benchmark --csv: {error}"
        ) from error
    return rows


def ratios(rows: Sequence[dict], path: Path) -> None:
    """Plot images per second of ours over the best peer's, a panel for each mode."""
    chosen = [row for row in rows if row["side"] == "ours" and row["best"] and row.get("ratio")]
    modes = [mode for mode in MODES if any(row["mode"] == mode for row in chosen)]
    names = list(dict.fromkeys(row["model"] for row in chosen))
    figure = plots.new_figure(2.2 + 3.2 * len(modes), 1 + 0.3 * len(names))
    panels = figure.subplots(1, max(1, len(modes)), sharey=True, sharex=True, squeeze=False)[0]
    for axes, mode in zip(panels, modes, strict=False):
        found = {row["model"]: row["ratio"] for row in chosen if row["mode"] == mode}
        places = [names.index(name) for name in found]
        gains = [ratio - 1 for ratio in found.values()]
        colours = ["tab:blue" if gain >= 0 else "tab:red" for gain in gains]
        axes.barh(places, gains, left=1, color=colours, height=0.6)
        axes.axvline(1.0, color="black", linewidth=1)
        for place, ratio in zip(places, found.values(), strict=True):
            axes.annotate(
                f"{ratio:.2f}",
                (max(ratio, 1), place),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
            )
        axes.set_title(MODES[mode])
        axes.set_xlabel("images/s, ours / best peer")
        axes.margins(x=0.15)
        axes.grid(axis="x")
    panels[0].set_yticks(range(len(names)), names)
    panels[0].invert_yaxis()
    plots.save(figure, path, dpi=150)


def accuracies(rows: Sequence[dict], path: Path) -> None:
    """Plot published top-1 against images per second of inference, of ours and of timm's classes.

    Models without a published accuracy are left out.
    """
    from matplotlib.ticker import LogLocator, NullFormatter

    figure = plots.new_figure(8, 4.6)
    axes = figure.add_subplot(xscale="log")
    rates: dict[str, dict[str, float]] = {}
    for row in rows:
        if row["best"] and row["mode"] == "infer" and row["model"] in TOP1:
            rates.setdefault(row["model"], {})[row["side"]] = row["rate"]
    is_up = False
    for name, by_side in sorted(rates.items(), key=lambda item: TOP1[item[0]]):
        top1 = TOP1[name]
        is_up ^= "ours" in by_side  # labels of neighbours shift apart
        family = next((family for family in FAMILIES if name.startswith(family)), None)
        colour = FAMILIES.get(family, "dimgray")
        places = [by_side[side] for side in ("timm", "ours") if side in by_side]
        axes.plot(places, [top1] * len(places), color=colour, linewidth=1.5)
        if "timm" in by_side:
            axes.plot(by_side["timm"], top1, "o", color=colour, markerfacecolor="white")
        if "ours" in by_side:
            axes.plot(by_side["ours"], top1, "o", color=colour, markersize=8)
        axes.annotate(
            name.split("_patch")[0],
            (places[-1], top1),
            xytext=(7, 4 if is_up else -4) if "ours" in by_side else (-3, -9),
            textcoords="offset points",
            ha="left" if "ours" in by_side else "right",
            va="center",
            fontsize=9,
            color=colour,
            weight="bold" if "ours" in by_side else "normal",
        )
    axes.plot([], [], "o", color="black", markersize=8, label="this repository, fused")
    axes.plot([], [], "o", color="black", markerfacecolor="white", label="timm, its best form")
    axes.legend(loc="lower left")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("images/s of inference")
    axes.set_ylabel("published ImageNet top-1 (%)")
    axes.margins(x=0.12, y=0.08)
    axes.grid()
    plots.save(figure, path, dpi=150)


def model_table(rows: Sequence[dict]) -> str:
    """Return a table of the measured models of ours: size, accuracy, weights, speed beside timm's.

    Accuracies are published ones; rates are of inference, in the best configuration of either side.
    """
    rates: dict[str, dict[str, dict]] = {}
    for row in rows:
        if row["best"] and row["mode"] == "infer":
            rates.setdefault(row["model"], {})[row["side"]] = row
    heads = [
        "model",
        "parameters (M)",
        "GMACs",
        "top-1 (%)",
        "weights",
        "images/s",
        "timm's",
        "ratio",
    ]
    lines = []
    for name, by_side in rates.items():
        if "ours" not in by_side:
            continue
        parameters, gmacs, _ = count(name)
        tag = models.pretrained_config(name)
        weights = f"`{name}.{tag.tag}`" if tag.has_weights else "[files](docs/WEIGHTS.md)"
        peer = by_side.get("timm")
        lines.append(
            [
                f"`{name}`",
                f"{parameters:.1f}",
                f"{gmacs:.1f}",
                str(TOP1.get(name, "")),
                weights,
                f"{by_side['ours']['rate']:.1f}",
                f"{peer['rate']:.1f}" if peer else "",
                f"{by_side['ours']['ratio']:.2f}" if peer else "",
            ]
        )
    return markdown(heads, lines)
