"""Values that the figures show."""

import math

import torch
from torch import nn

from models.layers import WindowAttention2d
from models.layers.gpsa import GPSA, positional_attention
from tools.visualize.capture import Captured
from utils import UserError

MOST_PREFIX_TOKENS = 16  # class, distillation and register tokens


def gates(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return sigmoid(lambda) of every head, ``h`` by layer: the share of positional attention.

    ConViT, arXiv 2103.10697, section 3.

    Raises:
        UserError: The model has no gates.
    """
    found = {
        name: module.gate().detach().flatten().cpu()
        for name, module in model.named_modules()
        if isinstance(module, GPSA)
    }
    if not found:
        raise UserError(f"{type(model).__name__} has no gates, as ConViT has")
    return found


def grid_distances(height: int, width: int, like: torch.Tensor) -> torch.Tensor:
    """Return the distances of all pairs of positions of a grid, ``N N``, in positions."""
    steps_y = torch.arange(height, dtype=like.dtype, device=like.device)
    steps_x = torch.arange(width, dtype=like.dtype, device=like.device)
    points = torch.cartesian_prod(steps_y, steps_x).view(-1, 2)
    return (points[:, None] - points[None, :]).norm(dim=-1)


def nonlocality(weights: torch.Tensor, distances: torch.Tensor) -> torch.Tensor:
    """Return ``D = 1/L sum_ij A_ij |d_ij|`` (ConViT, arXiv 2103.10697, section 4).

    Rows are scaled to sum to one, because prefix tokens were cut off: D is the mean distance among
    the patches. Otherwise a head would seem more local the more it attends to the class token.

    Args:
        weights: Attention weights among L positions, ``B h L L``.
        distances: ``L L``.

    Returns:
        ``B h``, in the unit of ``distances``.
    """
    weights = weights / weights.sum(dim=-1, keepdim=True).clamp(min=1e-30)
    return torch.einsum("bhij,ij->bh", weights, distances) / weights.shape[-1]


def nonlocality_of(captured: Captured) -> torch.Tensor:
    """Return the :func:`nonlocality` of a layer, ``B h``, in patches of its map.

    Prefix tokens and the padding of windows are left out.
    """
    weights = captured.parts().full
    height, width = captured.grid
    if isinstance(captured.layer, WindowAttention2d):
        return _windowed_nonlocality(captured.layer, weights, height, width)
    start = captured.prefix
    return nonlocality(weights[..., start:, start:], grid_distances(height, width, weights))


def _windowed_nonlocality(
    layer: WindowAttention2d, weights: torch.Tensor, height: int, width: int
) -> torch.Tensor:
    """Return the same for weights ``B W h N N`` within windows; there are none outside."""
    windows = layer.windows(height, width, weights)
    if windows is None:
        return nonlocality(weights[:, 0], grid_distances(height, width, weights))
    source = windows.source
    points = torch.stack([source // width, source % width], dim=-1).to(weights.dtype)
    points = points.view(-1, layer.window**2, 2)  # W N 2
    distances = (points[:, :, None] - points[:, None]).norm(dim=-1)  # W N N
    inside = torch.ones_like(source, dtype=weights.dtype)
    inside[windows.padding] = 0.0
    inside = inside.view(-1, layer.window**2)  # W N
    weights = weights * inside[None, :, None, None, :]
    weights = weights / weights.sum(dim=-1, keepdim=True).clamp(min=1e-30)
    return torch.einsum("bwhij,wij,wi->bh", weights, distances, inside) / (height * width)


def centre_positions(layer: GPSA, height: int, width: int) -> torch.Tensor:
    """Return the positional attention of a GPSA layer for the centre patch, ``h H W``."""
    position = layer.pos_proj
    with torch.no_grad():
        weights = positional_attention(position.weight, position.bias, height, width)
    return weights[:, height // 2 * width + width // 2].unflatten(-1, (height, width))


def bias_pictures(layer: WindowAttention2d) -> torch.Tensor:
    """Return the relative position bias, ``h 2w-1 2w-1``: rows dy, columns dx, query minus key."""
    side = 2 * layer.window - 1
    return layer.relative_position_bias_table.detach().T.unflatten(-1, (side, side))


def position_embeddings(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return learned absolute position embeddings by name, as maps ``C H W``.

    Those of tokens have the grid of the model, or a square one; prefix tokens are left out.

    Raises:
        UserError: The tokens fit neither grid.
    """
    grid = getattr(
        model, "grid_size", getattr(getattr(model, "patch_embed", None), "grid_size", None)
    )
    found = {}
    for name, parameter in model.named_parameters():
        if not name.startswith("pos_embed"):
            continue
        value = parameter.detach()[0]  # C H W, H W C or N C
        if value.ndim == 2:
            side = math.isqrt(len(value))
            height, width = grid or (side, side)
            prefix = len(value) - height * width
            if not 0 <= prefix <= MOST_PREFIX_TOKENS:
                raise UserError(f"{name} has {len(value)} tokens, no grid of {height}x{width}")
            value = value[prefix:].T.unflatten(-1, (height, width))
        elif value.shape[0] == value.shape[1] != value.shape[2]:
            value = value.permute(2, 0, 1)
        found[name] = value
    return found


def cosine_similarities(embedding: torch.Tensor) -> torch.Tensor:
    """Return cosine similarities of embeddings ``C H W``, ``H W H W``."""
    flat = nn.functional.normalize(embedding.flatten(1).double(), dim=0)
    return (flat.T @ flat).view(*embedding.shape[1:], *embedding.shape[1:])


def principal_colours(features: torch.Tensor) -> torch.Tensor:
    """Return the first three principal components of channels as colours.

    Args:
        features: ``C H W``; every position is a sample.

    Returns:
        ``H W 3``, each component scaled to 0..1, or 0.5 if it is constant. The sign of a component
        is such that its largest magnitude is positive.
    """
    height, width = features.shape[1:]
    samples = features.flatten(1).T.double()  # N C
    samples = samples - samples.mean(dim=0)
    u, s, _ = torch.linalg.svd(samples, full_matrices=False)
    colours = torch.full((len(samples), 3), 0.5, dtype=torch.float64, device=features.device)
    for index in range(min(3, len(s))):
        if s[index] <= 1e-9 * max(s[0].item(), 1e-30):
            continue
        values = u[:, index] * u[u[:, index].abs().argmax(), index].sign()
        colours[:, index] = (values - values.min()) / (values.max() - values.min())
    return colours.view(height, width, 3)
