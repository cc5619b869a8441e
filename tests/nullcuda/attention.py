"""Which kernel PyTorch chooses for every attention of a model.

Prints a line of JSON for each model and mode: how often each kernel is chosen.
"""

import json
from collections import Counter

import torch
import torch.nn.functional as F

import models  # noqa: F401 before its function is replaced
from tests.nullcuda.programs import get_parser, on_device

NAMES = {0: "math", 1: "flash", 2: "memory-efficient", 3: "cuDNN", -1: "none"}
MODES = ("train float16", "train float32", "eval float16", "eval float32", "fused bfloat16")

args = get_parser(__doc__.splitlines()[0]).parse_args()
args.dtype, args.batch_size = "float32", min(args.batch_size, 2)
attention = F.scaled_dot_product_attention
chosen: Counter[str] = Counter()


def observed(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None):
    """Note the choice, then attend."""
    choice = torch._fused_sdp_choice(q, k, v, attn_mask, dropout_p, is_causal, scale=scale)
    chosen[NAMES[choice]] += 1
    return attention(q, k, v, attn_mask, dropout_p, is_causal, scale=scale)


F.scaled_dot_product_attention = observed
for name in args.models:
    model, _, images = on_device(name, args)
    for mode in MODES:
        kind, dtype = mode.split()
        net = model.train() if kind == "train" else model.eval()
        net = net.fuse() if kind == "fused" else net
        half = dtype != "float32"
        chosen.clear()
        autocast = torch.autocast("cuda", getattr(torch, dtype) if half else None, enabled=half)
        with autocast, torch.set_grad_enabled(kind == "train"):
            output = net(images)
        if kind == "train":
            output.float().sum().backward()
        layers = sum(hasattr(module, "fused_attn") for module in net.modules())
        print(json.dumps({"model": name, "mode": mode, "layers": layers, "chosen": chosen}))
