"""What a run sets and keeps on the device that it chose, of several.

Prints a line of JSON for each check.
"""

import io
import json

import torch
from torch import nn

import engine
from tests.nullcuda.programs import DEVICE
from tools.benchmark.candidates import Case
from tools.validate.metrics import Clock
from training import optimizers
from training.flags import parse_args
from training.launch import select_device

NEWER = ("fused", "foreach", "capturable", "differentiable", "decoupled_weight_decay")


def stepped(name, device, state=None):
    """The optimizer of a small model after a step, with the state of another one before."""
    model = nn.Linear(4, 4).to(device)
    optimizer = optimizers.build(parse_args(["--opt", name])[0], model, 1e-3)
    if state is not None:
        optimizers.restore(optimizer, state, "other.pth")
    model(torch.ones(2, 4, device=device)).sum().backward()
    optimizer.step()
    return optimizer


def as_saved(optimizer, kind):
    """The state as a file has it: ours, of an optimizer that is not fused, of an old PyTorch."""
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    state = torch.load(file, map_location="cpu", weights_only=True)
    for group in state["param_groups"]:
        if kind == "unfused":
            group["fused"] = None
        for key in NEWER if kind == "old" else ():
            group.pop(key, None)
    for values in state["state"].values():
        if kind == "old" and "step" in values:
            values["step"] = 1
    return state


def show(**found):
    """Print a line."""
    print(json.dumps(found), flush=True)


def resume():
    """Resume optimizers on another kind of device than that of the checkpoint, and on the same."""
    for name in ("adamw", "adam", "sgd", "lamb", "nadamw"):
        for origin in ("cpu", "cuda"):
            first = stepped(name, origin)
            for target in ("cpu", "cuda"):
                for kind in ("ours", "unfused", "old"):
                    other = stepped(name, target, as_saved(first, kind))
                    counters = [s["step"] for s in other.state.values() if "step" in s]
                    devices = sorted({getattr(c, "device", "number").type for c in counters})
                    fused = bool(other.param_groups[0].get("fused"))
                    line = {"opt": name, "origin": origin, "target": target, "kind": kind}
                    show(check="resume", **line, fused=fused, counters=devices)


def products():
    """How float32 is multiplied, by the flags of a run and of a benchmark."""

    def state(by):
        matrix, convolution = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
        text = str(engine.Precision(DEVICE))
        show(check="tf32", by=by, matrix=matrix, convolution=convolution, text=text)

    for tf32 in (True, False):
        engine.select_kernels(DEVICE, tf32)
        state(["run", tf32])
    for tf32 in (True, False):
        Case(
            "infer", "visformer_tiny", "ours", "eager", 1, "float32", "cuda", 32, None, tf32
        ).step()
        state(["benchmark", tf32])


def clock():
    """On which device the clock of the second one records, whichever is the current one."""
    recorded, record = [], torch.cuda.Event.record

    def noted(event, stream=None):
        stream = torch.cuda.current_stream() if stream is None else stream
        recorded.append(stream.device.index)
        record(event, stream)

    torch.cuda.Event.record = noted
    with Clock(torch.device("cuda", 1)).batch(1):
        pass
    show(check="clock", recorded=recorded)
    show(check="select", chosen=str(select_device("cuda:1")), current=torch.cuda.current_device())


resume()
products()
clock()
