"""Scores that a selection can get wrong, and how one is judged: bit by bit."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from reference.ops import selection as oracle

SIZES = [1, 2, 7, 8, 9, 49, 196, 197, 256, 257, 576, 577, 1024, 4096]
RULES = [(p, t) for p in ("mean", "cls") for t in ("max", "text_softmax", "dual")]
INF, NAN = math.inf, math.nan

KINDS = {
    "distinct": lambda x: x,
    "quantised": lambda x: (x * 2).round() / 2,
    "some NaN": lambda x: torch.where(x > 0.5, NAN, x),
    "infinities": lambda x: torch.where(x > 1, INF, torch.where(x < -1, -INF, x)),
    "denormals": lambda x: x * 1e-41,
    "both zeros": lambda x: torch.where(x > 0, 0.0, -0.0),
    "NaN": lambda x: torch.full_like(x, NAN),
    "NaN of both signs, -inf": lambda x: torch.where(x > 0, NAN, torch.where(x < -1, -NAN, -INF)),
    "bfloat16": lambda x: x.bfloat16().float(),
    "all equal": lambda x: torch.full_like(x, 0.25),
    "neighbours of zero": lambda x: (x * 2).round() * 2.0**-149,
}


def adversarial(rows: int, n: int, seed: int = 0) -> Tensor:
    """Rows [rows, n] of all `KINDS` in turn."""
    drawn = torch.randn(rows, n, generator=torch.Generator().manual_seed(seed))
    kinds = list(KINDS.values())
    return torch.stack([kinds[i % len(kinds)](row) for i, row in enumerate(drawn)])


def positions(rows: int, n: int, share: float = 0.7, seed: int = 1) -> Tensor:
    """[rows, n] bool: the first of several rows has every position, the last has none."""
    valid = torch.rand(rows, n, generator=torch.Generator().manual_seed(seed)) < share
    if rows > 1:
        valid[0], valid[-1] = True, False
    return valid


@contextmanager
def flushed_denormals() -> Iterator[None]:
    """The processor takes denormal numbers for zero, in this thread."""
    assert torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


def assert_chosen(
    mask: Tensor,
    ids: Tensor,
    scores: Tensor,
    valid: Tensor | None,
    *,
    k: int | Tensor | None = None,
    ratio: float | None = None,
    largest: bool = True,
) -> None:
    """`mask` [B, N] and `ids` are those of sorting each row of the CPU's `scores`, bit by bit."""
    n = scores.shape[1]
    count: Any = [min(max(row, 0), n) for row in k.tolist()] if isinstance(k, Tensor) else k
    expected = oracle.topk_mask(scores.float(), k=count, ratio=ratio, valid=valid, largest=largest)
    assert torch.equal(mask, expected)
    assert torch.equal(ids, oracle.ids_of(expected, ids.shape[1]))
