"""Models, checkpoints and flags for tests of tools.visualize."""

import timm
import torch
from conftest import write_images
from timm.models import register_model

from models import fastvit, visformer
from tools.visualize.__main__ import KINDS, get_parser
from tools.visualize.loading import load_model

TINY = {"embed_dim": 16, "depth": 3, "num_heads": 4, "local_up_to_layer": 2, "patch_size": 4}
KWARGS = {"num_classes": 3, "img_size": 16, **TINY}


@register_model
def drawn_fastvit(pretrained=False, **kwargs):
    """A small FastViT with every kind of reparameterisable layer."""
    last = fastvit.Stage(1, 32, mixer="attention", position_encoding=True)
    stages = (fastvit.Stage(1, 8), fastvit.Stage(1, 16), last)
    return timm.create_model("fastvit_t8", **{"stages": stages, "num_classes": 3} | kwargs)


@register_model
def drawn_visformer(pretrained=False, **kwargs):
    """A small Visformer V2 with windows in its last two stages."""
    stages = (
        visformer.Stage(1, 8, spatial_groups=8),
        visformer.Stage(1, 12, num_heads=3, window=4),
        visformer.Stage(1, 16, num_heads=4, window=2),
    )
    kwargs = {"stages": stages, "num_classes": 3, "img_size": 32} | kwargs
    return timm.create_model("swin_visformer_tiny_v2", **kwargs)


def randomize(module, scale=0.5):
    """Weights that make attention uneven, gates differ, and norms do something."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(noise.to(parameter.dtype), alpha=scale)
        for name, buffer in module.named_buffers():
            if name.endswith("running_mean"):
                buffer.copy_(torch.randn(buffer.shape, generator=generator))
            elif name.endswith("running_var"):
                buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.5)
    return module.eval()


def gate(epoch, head):
    """The gate parameter of a head in the checkpoint of an epoch."""
    return epoch - 0.3 * head


def write_files(root):
    """Write 6 images, and checkpoints of epochs 0, 1 and 2 of a small ConViT."""
    write_images(root / "images", train=2, val=1, size=40)
    for epoch in range(3):
        torch.manual_seed(epoch)
        model = randomize(timm.create_model("convit_tiny", **KWARGS), 0.3)
        with torch.no_grad():
            for block in model.blocks[:2]:
                block.attn.gating_param.copy_(torch.tensor([gate(epoch, h) for h in range(4)]))
        state = {"model": model.state_dict(), "model_name": "convit_tiny", "epoch": epoch}
        state |= {"model_kwargs": KWARGS, "input_size": 16, "args": {"eval_crop_ratio": 0.5}}
        torch.save(state, root / f"{epoch}.pth")
    return root


def in_folder(root, words):
    """Command-line words, with @ for a folder."""
    return [str(root / word[1:]) if str(word).startswith("@") else str(word) for word in words]


def picture_of(*words):
    """The picture that a command line makes, not written."""
    args = get_parser().parse_args(words)
    return KINDS[args.kind][0](args)


def model_of(path, *words):
    """The model that a checkpoint file or name stands for."""
    return load_model(str(path), get_parser().parse_args(["gates", "x", *words]))
