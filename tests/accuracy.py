"""How tests judge numbers: by the float64 truth and by what plain PyTorch reaches."""

from __future__ import annotations

import torch
from torch import Tensor


def assert_as_accurate(got: Tensor, plain: Tensor, truth: Tensor, factor: float = 4.0) -> None:
    """The error of `got` is at most `factor` times that of plain PyTorch, or two roundings.

    `plain` is the same computation in the same type, `truth` in float64; errors are the largest
    absolute ones, a rounding is half a unit of the last place of the largest true value.
    """
    assert got.shape == truth.shape
    assert torch.isfinite(got).all()
    if truth.numel() == 0:
        return
    rounding = torch.finfo(got.dtype).eps / 2 * truth.abs().max()
    own = (plain.double() - truth).abs().max()
    error = (got.double() - truth).abs().max()
    assert error <= factor * max(own, rounding), f"error {error:.3e}, plain {own:.3e}"


def chi_square_p(counts: Tensor, expected: Tensor) -> float:
    """The chance of counts at least this far from what is expected."""
    assert counts[expected == 0].sum() == 0
    kept = expected > 0
    counts, expected = counts[kept].double(), expected[kept].double()
    statistic = ((counts - expected) ** 2 / expected).sum()
    degrees = torch.tensor((len(counts) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(degrees, statistic / 2))
