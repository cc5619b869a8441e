"""What the augmentation of a batch asks of the device, and the host's time for asking.

Prints a line of JSON: numbers per batch, of DeiT's augmentation of 224 pixels in float16 and
channels_last. With ``--rows``, the operators that move most.
"""

import argparse
import json
import random
import time

import nullcuda
import numpy as np
import torch
from torch.utils.data._utils.pin_memory import pin_memory

import datasets
from pipeline.fast import FastDataset
from pipeline.prefetch import BatchFinalizer
from pipeline.sources.base import Pixels
from samplers import SampleIndex
from tests.nullcuda.programs import DEVICE, Traffic
from training.flags import parse_args

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--batch-size", type=int, default=64)
parser.add_argument("--batches", type=int, default=8)
parser.add_argument("--input-size", type=int, default=224)
parser.add_argument("--resident", action="store_true", help="images are on the device")
parser.add_argument("--rows", type=int, default=0, metavar="N")
args, words = parser.parse_known_args()  # the others are main.py's

size = args.input_size
given = ["--model", "any", "--data-path", ".", "--input-size", str(size)]
given += ["--data-set", "CIFAR10"] if args.resident else []
flags, _ = parse_args([*given, *words])
images = np.random.default_rng(0).integers(0, 256, (args.batch_size, size, size, 3), np.uint8)
source = Pixels(images, range(len(images)), [str(i) for i in range(len(images))])
augmentation = datasets.build_augmentation(True, flags)
dataset = FastDataset(source, augmentation, True, augment=False, resident=args.resident)
finalize = BatchFinalizer(dataset, DEVICE, torch.float16, torch.channels_last)
random.seed(0)


def raw_batch(epoch):
    """A batch as the loader hands it over."""
    return pin_memory(dataset.__getitems__([SampleIndex(i, epoch) for i in range(len(images))]))


first, *batches = (raw_batch(epoch) for epoch in range(args.batches + 1))
finalize(first)
torch.cuda.set_sync_debug_mode("error")
nullcuda.reset()
started = time.process_time()
for batch in batches:
    finalize(batch)
host = (time.process_time() - started) / args.batches * 1e3
counts = {key: value / args.batches for key, value in nullcuda.counts().items()}
torch.cuda.set_sync_debug_mode("default")
with Traffic() as traffic:
    for batch in batches:
        result = finalize(batch).images
gigabytes = 1e9 * args.batches
found = {"images": len(images), "operations": nullcuda.total(counts), "host_ms": round(host, 1)}
found["gigabytes"] = round(sum(traffic.bytes.values()) / gigabytes, 3)
found["gigabytes_float64"] = round(traffic.double / gigabytes, 3)
found |= {"dtype": str(result.dtype).removeprefix("torch."), "shape": [*result.shape]}
print(json.dumps(found | {k: v for k, v in counts.items() if v and "peak" not in k}))
for key, number in traffic.bytes.most_common(args.rows):
    calls = traffic.calls[key] / args.batches
    print(f"  {key:45} {calls:7.1f} calls {number / gigabytes:6.3f} GB")
