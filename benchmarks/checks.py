"""When a result may be timed: numbers by the float64 truth, selections by the true scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import Check
from tests.accuracy import assert_as_accurate


def as_accurate(plain: Sequence[Tensor], truth: Sequence[Tensor], factor: float = 4.0) -> Check:
    """Every tensor of the result that is not None: `factor` times as wrong as `plain` at most."""

    def check(got: Any) -> None:
        parts = (got,) if isinstance(got, Tensor) else got
        for part, own, true in zip(parts, plain, truth, strict=True):
            if part is not None:
                assert_as_accurate(part, own, true, factor)

    return check


def assert_chooses_best(
    mask: Tensor, truth: Tensor, valid: Tensor, counts: Tensor, dtype: torch.dtype
) -> None:
    """`mask` [B, N] has counts [B] valid positions of each row, and none left out is better.

    Better by more than what rounding to `dtype` moves scores by, which `truth` is free of.
    """
    assert torch.equal(mask.sum(dim=1), counts)
    assert not (mask & ~valid).any()
    worst = truth.masked_fill(~mask, torch.inf).amin(dim=1)
    left = truth.masked_fill(mask | ~valid, -torch.inf).amax(dim=1)
    slack = 8 * torch.finfo(dtype).eps * truth.abs().max()
    assert (worst >= left - slack).all(), f"chosen {(left - worst).max():.3e} below what is left"
