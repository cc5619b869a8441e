"""What a training step, or an inference, asks of the device, and the host's time for asking.

Prints a line of JSON for each model: numbers per step.
"""

import json
import time

import nullcuda
import torch
from torch._dynamo.utils import counters

import engine
from tests.nullcuda.programs import DEVICE, finish, get_parser, on_device
from training import losses, optimizers
from training.compilation import compiled
from training.flags import parse_args
from training.joined import MovingAverage, join_kernels

parser = get_parser(__doc__.splitlines()[0])
parser.add_argument("--steps", type=int, default=3)
parser.add_argument("--clip-grad", type=float)
parser.add_argument("--opt", default="adamw", help="as of main.py")
parser.add_argument("--grad-checkpointing", action="store_true")
parser.add_argument("--no-ema", action="store_true")
parser.add_argument("--infer", action="store_true", help="forward alone")
parser.add_argument("--fuse", action="store_true", help="with --infer: folded for inference")
parser.add_argument("--compile", metavar="BACKEND", help="inductor, for instance")
parser.add_argument("--compile-mode")
parser.add_argument("--compile-blocks", action="store_true")
parser.add_argument("--sync", default="default", help="warn or error: where a step waits")
parser.add_argument("--kernels", type=int, default=0, metavar="N", help="name the N most frequent")
args = parser.parse_args()
flags, _ = parse_args(["--model", "any", "--opt", args.opt])
how = args.compile, args.compile_mode, args.compile_blocks


def inferring(model, precision, images):
    """A function that infers a number of times."""
    net = compiled(model.eval().fuse() if args.fuse else model.eval(), *how)

    def run(times):
        with torch.inference_mode(), precision.autocast():
            for _ in range(times):
                net(images)

    return run


def training(model, precision, images):
    """A function that takes a number of steps."""
    if args.compile is None:
        join_kernels(model)
    optimizer = optimizers.build(flags, model, 1e-3)
    average = None if args.no_ema else MovingAverage(model, 0.9999)
    mixup = losses.build_mixup(flags, 1000)
    criterion = losses.build_criterion(flags, mixup, 1000)
    net = compiled(model, *how)
    targets = torch.zeros(len(images), dtype=torch.long, device=DEVICE)

    def run(times):
        engine.train_one_epoch(
            *(net, criterion, [(images, targets, [])] * times, optimizer, DEVICE, 0, precision),
            max_norm=args.clip_grad,
            model_ema=average,
            mixup_fn=mixup,
            log_interval=10**6,
        )

    return run


for name in args.models:
    engine.select_kernels(DEVICE)
    model, precision, images = on_device(name, args)
    if args.grad_checkpointing:
        model.set_grad_checkpointing(True)
    run = (inferring if args.infer else training)(model, precision, images)
    run(2)  # cuDNN's trials, the allocator's first requests, compilation
    graphs = counters["stats"]["unique_graphs"]
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.set_sync_debug_mode(args.sync)
    nullcuda.reset()
    run(args.steps)  # and the waits at the end of an epoch
    counts = nullcuda.counts()
    kernels = nullcuda.kernels()
    made = sum(count for count, kernel in kernels if kernel.startswith("triton")) / args.steps
    nullcuda.reset()
    started = time.process_time()
    run(2 * args.steps)
    host = (time.process_time() - started) / (2 * args.steps) * 1e3
    torch.cuda.set_sync_debug_mode("default")
    counts = {key: (value - counts[key]) / args.steps for key, value in nullcuda.counts().items()}
    found = {"model": name, "operations": nullcuda.total(counts), "host_ms": round(host, 1)}
    if args.compile:
        found |= {"graphs": graphs, "breaks": sum(counters["graph_break"].values())}
        found["triton"] = made
        found["recompilations"] = counters["stats"]["unique_graphs"] - graphs
    found["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    print(
        json.dumps(found | {k: v for k, v in counts.items() if v and "peak" not in k}), flush=True
    )
    for count, kernel in kernels[: args.kernels]:
        print(f"  {count / args.steps:8.1f}  {kernel[:160]}")

finish()
