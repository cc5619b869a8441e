"""Train with deterministic kernels alone, at the size a model was built for and at another one.

An operator without a deterministic kernel raises an error. Prints a line of JSON for each pass.
"""

import json

import torch

import engine
from tests.nullcuda.programs import DEVICE, get_parser, on_device

args = get_parser(__doc__.splitlines()[0]).parse_args()
engine.select_kernels(DEVICE, deterministic=True)
for name in args.models:
    model, precision, images = on_device(name, args)
    for side in (args.input_size, args.input_size + 64):
        batch = precision.move(torch.zeros(len(images), 3, side, side, dtype=images.dtype))
        with precision.autocast():
            loss = model(batch).float().sum()
        loss.backward()
        print(json.dumps({"model": name, "side": side}), flush=True)
