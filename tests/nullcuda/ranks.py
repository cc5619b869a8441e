"""A rank of several: its timeouts, and a few steps of DistributedDataParallel.

Prints a line of JSON.
"""

import json
import os

import timm
import torch
import torch.distributed as dist

import engine
import models  # noqa: F401 registers them
from training import launch
from training.ddp import distribute, warm_up_ddp
from training.flags import parse_args

TIMEOUT = 100
args, _ = parse_args(["--model", "any", "--device", "cuda", "--dist-timeout", str(TIMEOUT)])
with launch.process_group(args) as (info, device):
    options = dist.group.WORLD._get_backend(device).options
    model = timm.create_model("fastvit_t8", num_classes=2)  # 1x1 convolutions of a pooled map
    precision = engine.Precision(device, memory_format=torch.channels_last)
    precision.place(model)
    warm_up_ddp(distribute(model, device), precision, 2, 64)
    line = {"rank": info.rank, "current": torch.cuda.current_device(), "timeout": TIMEOUT}
    line["nccl"] = options._timeout.total_seconds()
    line["heartbeat"] = float(os.environ["TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC"])
    print(json.dumps(line), flush=True)
