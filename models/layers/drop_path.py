"""The schedule of stochastic depth."""

from collections.abc import Sequence


def drop_path_rates(rate: float, depths: Sequence[int]) -> list[list[float]]:
    """Drop rates that grow linearly from 0 at the first block to ``rate`` at the last.

    Deep Networks with Stochastic Depth, arXiv 1603.09382, section 3.

    Returns:
        One list per stage, one rate per block.
    """
    total = sum(depths)
    rates = [rate * i / max(total - 1, 1) for i in range(total)]
    starts = [sum(depths[:i]) for i in range(len(depths))]
    return [rates[start : start + depth] for start, depth in zip(starts, depths, strict=True)]
