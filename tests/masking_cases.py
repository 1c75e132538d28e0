"""Inputs of the masking operators that move rows, and what is true of their results."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

SIZES = [(3, 7, 4, 5), (2, 40, 17, 33), (1, 5, 9, 770), (2, 5, 4, 1)]  # batch, N, K, D
EMPTY = [(0, 3, 2, 2), (2, 0, 3, 4), (2, 3, 0, 4), (2, 3, 2, 0)]
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "columns first": lambda x: x.mT.contiguous().mT,
    "batch inside": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "every other": lambda x: x.repeat_interleave(2, dim=-1)[..., ::2],
    "one row": lambda x: x[:1, :1].expand(x.shape),
    "one value": lambda x: x[:1, :1, :1].expand(x.shape),
}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rows(
    batch: int, positions: int, columns: int, dtype: torch.dtype = torch.float32, seed: int = 0
) -> Tensor:
    return torch.randn(batch, positions, columns, generator=seeded(seed)).to(dtype)


def mask(batch: int, positions: int) -> Tensor:
    """Four of ten, and none of the last example."""
    drawn = torch.rand(batch, positions, generator=seeded(1)) < 0.4
    drawn[batch - 1 :] = False
    return drawn


def unique_ids(batch: int, positions: int, width: int, seed: int = 2) -> Tensor:
    """Ascending ids with -1 at the end, some rows empty."""
    generator = seeded(seed)
    ids = torch.full((batch, width), -1)
    for row in ids:
        count = int(torch.randint(min(positions, width) + 1, (), generator=generator))
        row[:count] = torch.randperm(positions, generator=generator)[:count].sort().values
    return ids


def repeated_ids(batch: int, positions: int, width: int, beyond: int = 0) -> Tensor:
    """In any order, many equal, some -1, and some out of range by up to `beyond`."""
    return torch.randint(-1 - beyond, positions + beyond, (batch, width), generator=seeded(3))
