"""A net and weights with which attention has something to show."""

import torch

TINY = {"embed_dim": 16, "depth": 3, "num_heads": 4, "local_up_to_layer": 2, "patch_size": 4}


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
