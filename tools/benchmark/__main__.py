"""Compare the speed of models with that of other implementations of the same models.

``python -m tools.benchmark [NAME ...]``: every model runs as implemented here and by its peers
(timm's own classes; with --peer-path, an original repository), in several configurations, in turn,
in one process. The last lines compare the best configuration of ours with the best of the peers'.
"""

import argparse
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import timm
import torch
import yaml

import models
from models.factory import check_name
from tools import cli, files, tables
from tools.benchmark import candidates, measure, report
from tools.benchmark.candidates import Case, Peer
from tools.flops import count
from tools.pages import write_between
from training import launch
from training.parser import PIXELS, Parser, add_input_size
from utils import UserError

NAMES = ("visformer_tiny", "visformer_small", "swin_visformer_tiny_v2", "swin_visformer_small_v2")
NAMES += ("convit_tiny", "convit_small", "fastvit_t8", "fastvit_sa12", "vit_b_32_224")
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
MATRIX = {"cpu": 2048, "cuda": 8192}  # size of the matrix product


def difference(case: Case) -> float | None:
    """Return the largest difference of our logits from a peer's, in its standard deviations.

    Fused, with the peer's weights, in float64, or float32 where the peer supports no other. None
    if its weights have another layout.
    """
    for dtype in (torch.float64, torch.float32):
        theirs = candidates.build(case.side, case.model, case.peer, case.size).to(dtype).eval()
        ours = candidates.build("ours", case.model, None, case.size).to(dtype)
        image = torch.randn(2, 3, case.size, case.size, dtype=dtype)
        try:
            models.load_weights(ours, {"model": theirs.state_dict()}, case.side)
            with torch.inference_mode():
                expected = theirs(image)
                return ((ours.fuse()(image) - expected).abs().max() / expected.std()).item()
        except models.CheckpointError:
            return None
        except RuntimeError as error:
            if "same dtype" not in str(error):
                raise
    return None


def peak(case: Case) -> float:
    """Return the peak memory in MiB of a fresh process after a few steps of a case."""
    return measure.in_fresh_process(f"{case.mode} {case.model} {case.label}", Case.peak, case)


def cases_of(args: argparse.Namespace, mode: str, name: str, peer: Peer | None) -> list[Case]:
    """Return all cases of a model that can run; print why others cannot."""
    size = args.input_size or timm.get_pretrained_cfg(name).input_size[-1]
    settings = (args.batch_size, args.dtype, args.device, size, peer, args.tf32)
    configs = args.configs or candidates.default_configs(mode, args.device)
    useless = "deploy" if mode == "train" else "checkpoint"
    cases = []
    for side in candidates.sides_of(name, peer):
        model = candidates.build(side, name, peer, size)
        for config in configs:
            if useless in config or not candidates.is_possible(side, config, model):
                continue
            case = Case(mode, name, side, config, *settings)
            layout = mode == "train" and "channels_last" in config
            try:
                if layout and args.device == "cpu" and side != "ours":
                    peak(case)  # PyTorch 2.15 crashes on some
                cases.append(case)
            except UserError as error:
                print(f"left out: {error}", file=sys.stderr)
    return cases


def compare(args: argparse.Namespace, mode: str, name: str, peer: Peer | None) -> list[dict]:
    """Measure one model in one mode; return a row per case, the best of each side marked."""
    cases = cases_of(args, mode, name, peer)
    side = MATRIX[args.device]
    a, b = torch.randn(2, side, side, device=args.device).to(getattr(torch, args.dtype))
    steps = {case.label: case.step() for case in cases} | {"matrix": lambda: torch.mm(a, b)}
    times = measure.alternate(steps, args.device, args.rounds, args.min_time)
    del steps
    medians = measure.medians(times)
    best: dict[str, Case] = {}
    for case in sorted(cases, key=lambda case: medians[case.label]):
        best.setdefault(case.side, case)
    peer_times = next((times[c.label] for s, c in best.items() if s not in ("ours", "ViT")), None)
    gmacs = count(name, args.input_size)[1]
    work = gmacs * (3 if mode == "train" else 1) * args.batch_size
    matrix_rate = side**3 / 1e9 / medians["matrix"]
    rows = []
    for case in cases:
        time = medians[case.label]
        row = vars(case) | {"rate": case.batch / time, "gmacs": gmacs}
        row["best"] = best[case.side] is case
        if case.side != "ViT":
            row["share"] = work / time / matrix_rate
        if peer_times:
            row["ratio"] = measure.ratio(times[case.label], peer_times)
        is_equal = "ours" in best and case.side not in ("ours", "ViT", "explicit")
        if mode == "infer" and row["best"] and is_equal:
            row["difference"] = difference(case)
        if args.memory and row["best"]:
            row["peak"] = peak(case)
            double = peak(replace(case, batch=2 * case.batch))
            row["per_image"] = (double - row["peak"]) / case.batch
        if "ViT" in best and case is best["ours"]:
            row["cost"] = measure.ratio(times[best["ViT"].label], times[case.label])
        rows.append(row)
    return rows


def verdicts(rows: list[dict]) -> Iterable[str]:
    """Yield ``MODE MODEL ours/best peer R``, the cost relative to a ViT, and memory."""
    best = [row for row in rows if row["best"]]
    for row in (row for row in best if row["side"] == "ours"):
        name = f"{row['mode']} {row['model']}"
        if "ratio" in row:
            yield f"{name} ours/best peer {row['ratio']:.2f}"
        if "cost" in row:
            yield f"{name} cost/ViT {row['cost']:.2f}"
        for other in best:
            same = (other["mode"], other["model"]) == (row["mode"], row["model"])
            if same and other is not row and "per_image" in other:
                share = row["per_image"] / other["per_image"]
                yield f"{name} memory per image ours/{other['side']} {share:.2f}"


def cell(value: object) -> str:
    """Return a value as the table shows it."""
    if not isinstance(value, float):
        return "" if value is None else str(value)
    if 0 < abs(value) < 1e-2:
        return f"{value:.1e}"
    return f"{value:.2f}" if value < 20 else f"{value:.0f}"


def markdown(rows: list[dict]) -> str:
    """Return the table of all cases; the best of each side is bold."""
    keys = [key for key in COLUMNS if any(row.get(key) is not None for row in rows)]
    lines = []
    for row in rows:
        cells = {key: cell(row.get(key)) for key in keys}
        if row["best"]:
            cells["rate"] = f"**{cells['rate']}**"
        lines.append(list(cells.values()))
    return tables.markdown([COLUMNS[key] for key in keys], lines)


@cli.program
def main(argv: list[str]) -> None:
    """Run with the flags ``argv``."""
    parser = Parser("python -m tools.benchmark", description=__doc__.splitlines()[0])
    add = parser.add_argument
    default = ", ".join(NAMES)
    add("names", nargs="*", metavar="NAME", help=f"timm model names; default: {default}")
    modes, about = ["infer", "train"], "measure inference, training or both"
    add("--mode", nargs="+", choices=modes, default=modes, help=about)
    measure.add_flags(parser, batch_size=8, rounds=10, timing=True)
    add_input_size(parser, help=f"{PIXELS}; default: that of the model")
    parts = f"eager, or some of {', '.join(candidates.TRANSFORMS)} joined by +"
    configs = f"configurations: {parts}; default: all without checkpoint, on CUDA with compile"
    add("--configs", nargs="+", metavar="CONFIG", help=configs)
    peer = "checkout of an original repository, to compare with as well"
    add("--peer-path", type=Path, metavar="FOLDER", help=peer)
    kwargs = "arguments of the model functions in --peer-path"
    add("--peer-args", nargs="*", default=[], metavar="KEY=VALUE", help=kwargs)
    memory = "also measure peak memory, in separate processes"
    add("--memory", action="store_true", help=memory)
    add("--csv", type=Path, metavar="FILE.csv", help="write the table")
    table = "use a table of --csv instead of measuring"
    add("--read", type=Path, metavar="FILE.csv", help=table)
    bars = "draw images per second relative to the best other implementation"
    add("--plot", type=Path, metavar="FILE.png", help=bars)
    points = "draw published accuracy against images per second of inference"
    add("--plot-accuracy", type=Path, metavar="FILE.png", help=points)
    page = "replace the table between the marks of models in this page"
    add("--page", type=Path, metavar="FILE.md", help=page)
    args = parser.parse_args(argv)
    outputs = {name: getattr(args, name) for name in ("csv", "plot", "plot_accuracy")}
    flags = {f"--{name.replace('_', '-')}": path for name, path in outputs.items()}
    files.check_files(flags, [args.read])
    rows = report.read(args.read) if args.read else measured(args)
    if args.csv:
        tables.write_csv(args.csv, [*COLUMNS, "best", "cost"], rows)
    if args.plot:
        report.ratios(rows, args.plot)
    if args.plot_accuracy:
        report.accuracies(rows, args.plot_accuracy)
    if args.page:
        write_between(args.page, "models", report.model_table(rows))


def measured(args: argparse.Namespace) -> list[dict]:
    """Measure and print a table; return its rows."""
    args.device = launch.select_device(args.device).type
    for name in args.names:
        check_name(name)
    peer = None
    if args.peer_path is not None:
        pairs = (word.partition("=") for word in args.peer_args)
        peer = Peer(args.peer_path, {key: yaml.safe_load(value) for key, _, value in pairs})
    rows = []
    for mode in args.mode:
        for name in args.names or NAMES:
            found = compare(args, mode, name, peer)
            rows += found
            print(*verdicts(found), sep="\n", flush=True)
    print("", measure.machine(args.device), "", markdown(rows), "", *verdicts(rows), sep="\n")
    return rows


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
