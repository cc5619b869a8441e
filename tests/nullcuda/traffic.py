"""Bytes that the operators of a forward and backward pass move.

Prints a line of JSON for each model: gigabytes in all, and casts. With ``--rows``, the operators
that move most.
"""

import json

import torch

from tests.nullcuda.programs import DEVICE, Traffic, finish, get_parser, on_device

parser = get_parser(__doc__.splitlines()[0])
parser.add_argument("--rows", type=int, default=0, metavar="N")
args = parser.parse_args()

for name in args.models:
    model, precision, images = on_device(name, args)
    targets = torch.zeros(len(images), dtype=torch.long, device=DEVICE)
    for _ in range(2):
        with Traffic() as traffic:
            with precision.autocast():
                loss = torch.nn.functional.cross_entropy(model(images), targets)
            loss.backward()
        model.zero_grad()
    moved = sum(traffic.bytes.values()) / 1e9
    print(json.dumps({"model": name, "gigabytes": round(moved, 2), "casts": traffic.casts}))
    for key, number in traffic.bytes.most_common(args.rows):
        print(f"  {key:50} {traffic.calls[key]:6} calls {number / 1e9:7.2f} GB")

finish()
