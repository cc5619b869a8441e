"""Measure models side by side: ``python -m tools.benchmark [NAME ...]``.

Every model runs as this repository and as its peers have it (timm's own classes; with --peer-path,
an original repository), in several configurations, in turn, in one process. The last lines compare
the best configuration of ours with the best of the peers'.
"""

import argparse
import csv
import platform
import statistics
import sys
from collections.abc import Iterable
from pathlib import Path

import timm
import torch
import yaml

import models
from tools.benchmark.candidates import CONFIGS, CUDA_CONFIGS, Peer, build, makes_sense, sides_of
from tools.benchmark.measure import (
    Case,
    alternate,
    in_process_of_its_own,
    matrix_step,
    memory,
    ratio,
    step_of,
)
from tools.flops import count, our_models
from utils import UserError

NAMES = (
    "visformer_tiny",
    "visformer_small",
    "swin_visformer_tiny_v2",
    "swin_visformer_small_v2",
    "convit_tiny",
    "convit_small",
    "fastvit_t8",
    "fastvit_sa12",
    "vit_b_32_224",
)
COLUMNS = {
    "mode": "mode",
    "model": "model",
    "batch": "batch",
    "dtype": "dtype",
    "side": "implementation",
    "config": "configuration",
    "rate": "images/s",
    "ratio": "to the best peer",
    "share": "share of the matrix rate",
    "gmacs": "GMACs",
    "peak": "peak MiB",
    "per_image": "MiB per image",
    "difference": "difference of outputs",
}


def difference(name: str, side: str, peer: Peer | None, size: int) -> float | None:
    """Largest difference of our logits from a peer's under its weights, in deviations of those.

    After deployment, in float64, or float32 where the peer knows no other. None where its weights
    have another layout.
    """
    for dtype in (torch.float64, torch.float32):
        theirs = build(side, name, peer, size).to(dtype).eval()
        ours = build("ours", name, None, size).to(dtype)
        image = torch.randn(2, 3, size, size, dtype=dtype)
        try:
            models.load_weights(ours, {"model": theirs.state_dict()}, side)
            with torch.inference_mode():
                expected = theirs(image)
                return ((ours.fuse()(image) - expected).abs().max() / expected.std()).item()
        except models.CheckpointError:
            return None
        except RuntimeError as error:
            if "same dtype" not in str(error):
                raise
    return None


def crashes(case: Case, peer: Peer | None) -> str | None:
    """Why a case cannot run. On the CPU, PyTorch 2.15 brings down what trains in channels_last."""
    if case.device == "cuda" or case.mode == "infer" or "channels_last" not in case.config:
        return None
    if case.side == "ours":
        return None
    try:
        in_process_of_its_own(case, peer)
    except UserError as error:
        return str(error)
    return None


def cases_of(args: argparse.Namespace, mode: str, name: str, peer: Peer | None) -> list[Case]:
    """All cases of a model that can run."""
    size = args.input_size or timm.get_pretrained_cfg(name).input_size[-1]
    defaults = CUDA_CONFIGS if args.device == "cuda" else CONFIGS
    cases = []
    for side in sides_of(name, peer):
        model = build(side, name, peer, size)
        for config in args.configs or defaults[mode]:
            wrong = "deploy" if mode == "train" else "checkpoint"
            if wrong in config:
                continue
            if makes_sense(side, config, model):
                case = Case(
                    mode, name, side, config, args.batch_size, args.dtype, args.device, size
                )
                if reason := crashes(case, peer):
                    print(f"left out: {reason}", file=sys.stderr)
                else:
                    cases.append(case)
    return cases


def compare(args: argparse.Namespace, mode: str, name: str, peer: Peer | None) -> list[dict]:
    """Measure one model in one mode; a row for every case, the best of each side marked."""
    cases = cases_of(args, mode, name, peer)
    steps = {case.label: step_of(case, peer) for case in cases}
    steps["matrix"], matrix_gmacs = matrix_step(args.device, args.dtype)
    times = alternate(steps, args.device, args.rounds, args.min_time)
    medians = {label: statistics.median(values) for label, values in times.items()}
    del steps
    best = {}
    for case in cases:
        if case.side not in best or medians[case.label] < medians[best[case.side].label]:
            best[case.side] = case
    peers = [best[side] for side in best if side not in ("ours", "ViT")]
    peer_case = min(peers, key=lambda case: medians[case.label], default=None)
    gmacs = count(name, None if args.input_size is None else args.input_size)[1]
    work = gmacs * (3 if mode == "train" else 1) * args.batch_size
    rows = []
    for case in cases:
        seconds = medians[case.label]
        row = {"mode": mode, "model": name, "batch": case.batch, "dtype": case.dtype}
        row |= {"side": case.side, "config": case.config, "rate": case.batch / seconds}
        row |= {"gmacs": gmacs, "best": best[case.side] is case}
        if case.side != "ViT":
            row["share"] = work / seconds / (matrix_gmacs / medians["matrix"])
        if peer_case is not None:
            row["ratio"] = ratio(times[case.label], times[peer_case.label])
        if mode == "infer" and row["best"] and case.side not in ("ours", "ViT", "explicit"):
            row["difference"] = difference(name, case.side, peer, case.size)
        if args.memory and row["best"]:
            row["peak"], row["per_image"] = memory(case, peer)
        if "ViT" in best and case is best["ours"]:
            row["cost"] = ratio(times[best["ViT"].label], times[case.label])
        rows.append(row)
    return rows


def verdicts(rows: list[dict]) -> Iterable[str]:
    """``MODE MODEL ours/best peer R``, and for ConViT what an image costs beside a ViT."""
    for row in rows:
        if row["side"] != "ours" or not row["best"]:
            continue
        name = f"{row['mode']} {row['model']}"
        if "ratio" in row:
            yield f"{name} ours/best peer {row['ratio']:.2f}"
        if "cost" in row:
            yield f"{name} cost/ViT {row['cost']:.2f}"
        for other in rows:
            same = other["best"] and (other["mode"], other["model"]) == (row["mode"], row["model"])
            if same and other is not row and "per_image" in other:
                share = row["per_image"] / other["per_image"]
                yield f"{name} memory per image ours/{other['side']} {share:.2f}"


def cell(value: object) -> str:
    """A value as a table shows it."""
    if not isinstance(value, float):
        return "" if value is None else str(value)
    if 0 < abs(value) < 1e-2:
        return f"{value:.1e}"
    return f"{value:.2f}" if value < 20 else f"{value:.0f}"


def markdown(rows: list[dict]) -> str:
    """The table of all cases; the best of each side is bold."""
    keys = [key for key in COLUMNS if any(row.get(key) is not None for row in rows)]
    lines = ["| " + " | ".join(COLUMNS[key] for key in keys) + " |", "|---" * len(keys) + "|"]
    for row in rows:
        cells = [cell(row.get(key)) for key in keys]
        if row["best"]:
            index = keys.index("rate")
            cells[index] = f"**{cells[index]}**"
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(rows: list[dict], path: str) -> None:
    """Bars of ours over the best peer, by model and mode.

    Raises:
        UserError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("--plot needs matplotlib: pip install matplotlib") from error
    chosen = [r for r in rows if r["side"] == "ours" and r["best"] and "ratio" in r]
    figure = Figure(figsize=(8, 1 + 0.4 * len(chosen)), layout="constrained")
    axes = figure.add_subplot()
    labels = [f"{row['model']} {row['mode']}" for row in chosen]
    colours = ["tab:blue" if row["mode"] == "infer" else "tab:orange" for row in chosen]
    bars = axes.barh(labels, [row["ratio"] for row in chosen], color=colours)
    axes.bar_label(bars, fmt="%.2f", padding=3)
    axes.axvline(1.0, color="black", linewidth=1)
    axes.set_xlabel("images/s, ours / best peer")
    axes.margins(x=0.1)
    axes.invert_yaxis()
    figure.savefig(path, dpi=150)


def machine(device: str) -> str:
    """What the figures were measured on."""
    where = f"{processor()}, {torch.get_num_threads()} threads"
    if device == "cuda":
        where = torch.cuda.get_device_name()
    python = platform.python_version()
    return f"{where}, Python {python}, torch {torch.__version__}, timm {timm.__version__}"


def processor() -> str:
    """Name of the CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(": ")[2] for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "CPU"


def get_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = argparse.ArgumentParser("tools.benchmark", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("names", nargs="*", metavar="NAME", help=f"models of ours; if none, {', '.join(NAMES)}")
    add("--mode", nargs="+", choices=["infer", "train"], default=["infer", "train"])
    add("--batch-size", type=int, default=8)
    add("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    add("--device", choices=["cpu", "cuda"], help="cuda if present, if not given")
    add("--input-size", type=int, help="pixels; the model's own if not given")
    add("--configs", nargs="+", metavar="CONFIG", help="such as deploy+channels_last+compile")
    add("--peer-path", type=Path, metavar="FOLDER", help="an original repository, checked out")
    add("--peer-args", nargs="*", default=[], metavar="KEY=VALUE", help="for its model functions")
    add("--rounds", type=int, default=10, help="measurements of each; the median counts")
    add("--min-time", type=float, default=0.5, help="seconds of a measurement")
    add("--memory", action="store_true", help="also measure memory, in processes of their own")
    add("--csv", metavar="FILE")
    add("--plot", metavar="FILE.png")
    return parser


def run(args: argparse.Namespace) -> None:
    """Measure, print and write."""
    peer = None
    if args.peer_path is not None:
        kwargs = dict(word.partition("=")[::2] for word in args.peer_args)
        kwargs = {key: yaml.safe_load(value) for key, value in kwargs.items()}
        peer = Peer(args.peer_path, kwargs)
    rows = []
    for mode in args.mode:
        for name in args.names or NAMES:
            found = compare(args, mode, name, peer)
            rows += found
            print(*verdicts(found), sep="\n", flush=True)
    print("", machine(args.device), "", markdown(rows), "", *verdicts(rows), sep="\n")
    if args.csv:
        with open(args.csv, "w", newline="") as file:
            writer = csv.DictWriter(file, [*COLUMNS, "best", "cost"], extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)
    if args.plot:
        plot(rows, args.plot)


def main(argv: list[str]) -> int:
    """Run with the flags ``argv``; returns the exit status."""
    args = get_parser().parse_args(argv)
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        known = our_models()
        for name in args.names:
            if name not in known:
                raise UserError(f"{name!r} is none of {', '.join(known)}")
        if args.device == "cuda" and not torch.cuda.is_available():
            raise UserError("--device cuda, but PyTorch finds no CUDA device")
        run(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
