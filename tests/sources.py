"""A small model, and one source of every kind that holds its weights."""

import argparse
import contextlib
import json
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple

import numpy as np
import safetensors.torch
import torch
from conftest import call, succeed, write_images
from PIL import Image
from small_models import stir
from timm.data import create_transform, resolve_data_config
from timm.models import generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import nn

from models import DataConfig
from models.factory import build_registered
from tools import convert_checkpoint

NAME, TAG = "sourced_vit", "own"
CLASSES = ("ant", "bee", "cat", "dog")
# of the registered weights; no value is a default of anything
OWN = DataConfig((48, 48), "bilinear", (0.5, 0.4, 0.3), (0.2, 0.25, 0.3), 0.75, "squash")
RUN = DataConfig((64, 64), "bilinear", OWN.mean, OWN.std, 0.6, "center")  # of the run below
TIMM = DataConfig((48, 48), "bicubic", OWN.mean, (0.25, 0.25, 0.25), 0.9, "squash")  # of its flags
FEW = ["--num_workers", 0, "--batch-size", 8]
ONCE = [*FEW, "--epochs", 1, "--warmup-epochs", 0, "--cooldown-epochs", 0]
KINDS = ("run", "weights", "safetensors", "local-dir", "folder", "foreign folder", "address")
KINDS += ("timm", "lightning", "name")

default_cfgs = {}


def sourced_vit(pretrained=False, **kwargs):
    """A small Vision Transformer, registered by :func:`register`."""
    kwargs = {"patch_size": 16, "embed_dim": 32, "depth": 2, "num_heads": 2} | kwargs
    return build_registered(VisionTransformer, NAME, pretrained, checkpoint_filter_fn, 2, **kwargs)


def register(weights):
    """Register the model as timm does its own, with a file for its published weights."""
    own = OWN.to_timm() | {"num_classes": len(CLASSES), "fixed_input_size": True}
    own |= {"first_conv": "patch_embed.proj", "classifier": "head", "file": str(weights)}
    default_cfgs.update(generate_default_cfgs({f"{NAME}.{TAG}": own}))
    register_model(sourced_vit)


class SourceCase(NamedTuple):
    """A source, and what is expected of it.

    Attributes:
        where: On the command line.
        name: For ``--model``; None if the source tells it.
        config: Preprocessing of its images.
        model: Its model, made without this repository's loading.
    """

    where: str
    name: str | None
    config: DataConfig
    model: nn.Module

    def flags(self):
        return ["--model", self.name] if self.name else []


def model_of(state, size):
    model = sourced_vit(img_size=size)
    model.load_state_dict(state)
    return model.eval()


def write_oblong(folder, **options):
    """Images with detail of all sizes that are not square."""
    write_images(folder, size=16, classes=CLASSES, **options)
    for i, path in enumerate(sorted(folder.rglob("*.jpg"))):
        size = (150 + i, 101) if i % 3 else (90, 133 + i)
        Image.open(path).resize(size, Image.Resampling.BICUBIC).save(path.with_suffix(".png"))
        path.unlink()
    return folder


def convert(*words):
    status, output, errors = call(convert_checkpoint.main, *words)
    assert (status, errors) == (0, ""), errors
    return output


@contextlib.contextmanager
def web_server(folder):
    """The address of a web server of a folder."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    handler = partial(Quiet, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def write_foreign(folder):
    """Write weights in the layouts of others; return the model."""
    model = stir(sourced_vit(num_classes=len(CLASSES)))
    nn.init.normal_(model.head.weight, std=0.3, generator=torch.Generator().manual_seed(3))
    state = model.state_dict()
    torch.save(state, folder / "weights.pth")
    flags = {"model": NAME, "img_size": None, "input_size": None, "interpolation": "bicubic"}
    flags |= {"crop_pct": TIMM.crop_pct, "mean": None, "std": [TIMM.std[0]], "num_classes": None}
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9).state_dict()
    timms = {"epoch": 7, "arch": NAME, "state_dict": state, "optimizer": optimizer, "version": 2}
    timms |= {"args": argparse.Namespace(**flags), "metric": 61.2}
    torch.save(timms, folder / "timm.pth.tar")
    lightning = {"epoch": 2, "global_step": 30, "pytorch-lightning_version": "2.5.0"}
    lightning |= {"state_dict": {f"model.{key}": value for key, value in state.items()}}
    lightning |= {"hyper_parameters": {"lr": 0.1}, "callbacks": {}, "optimizer_states": []}
    torch.save(lightning, folder / "lightning.ckpt")
    return model


def write_sources(folder):
    """Write a source of every kind and images; return ``{kind: SourceCase}`` but the address."""
    published = folder / "published.safetensors"
    register(published)
    model = write_foreign(folder)
    safetensors.torch.save_file(model.state_dict(), published)
    weights, run = folder / "weights.pth", folder / "run" / "best.pth"
    data = write_oblong(folder / "images", train=4, val=5)
    flags = ["--finetune", weights, "--model", NAME, "--data-path", data, *ONCE, "--lr", 1e-3]
    flags += ["--input-size", RUN.size, "--eval-crop-ratio", RUN.crop_pct, "--unscale-lr"]
    succeed(*flags, "--no-repeated-aug", "--output_dir", run.parent)
    convert(run, folder / "run.safetensors")
    convert(run, folder / "run-hub", "--to", "hub")
    convert(weights, folder / "foreign-hub", "--to", "hub", "--model", NAME)
    trained = model_of(torch.load(run, weights_only=True)["model"], RUN.size)
    return {
        "run": SourceCase(str(run), None, RUN, trained),
        "weights": SourceCase(str(weights), NAME, OWN, model),
        "safetensors": SourceCase(str(folder / "run.safetensors"), None, RUN, trained),
        "local-dir": SourceCase(f"local-dir:{folder / 'run-hub'}", None, RUN, trained),
        "folder": SourceCase(str(folder / "run-hub"), None, RUN, trained),
        "foreign folder": SourceCase(str(folder / "foreign-hub"), None, OWN, model),
        "timm": SourceCase(str(folder / "timm.pth.tar"), None, TIMM, model),
        "lightning": SourceCase(str(folder / "lightning.ckpt"), NAME, OWN, model),
        "name": SourceCase(f"{NAME}.{TAG}", None, OWN, model),
    }


def timms_transform(model):
    return create_transform(**resolve_data_config({}, model=model))


def transform_of(about, **options):
    """timm's transform by the metadata of an exported program."""
    config = {key: json.loads(about[key]) for key in ("mean", "std", "input_size", "crop_pct")}
    names = {key: about[key] for key in ("interpolation", "crop_mode")}
    return create_transform(**config | names | options)


def photograph(path, size=(301, 180)):
    """Write an oblong image of waves, edges and noise; return the path."""
    width, height = size
    generator = np.random.default_rng(0)
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(x / a) + np.cos(y / b + x / 40) for a, b in ((9, 31), (17, 5), (3, 12))]
    pixels = 128 + 50 * np.stack(waves, 2) + generator.normal(0, 12, (height, width, 3))
    pixels[height // 3 : height // 2, width // 4 : width // 2] = (250, 20, 90)
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path)
    return path
