"""Queries, keys and values that attention is tested with."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# Batch, heads, words, keys, width of a head: sizes of models, and none that is a multiple.
SHAPES = [
    (2, 12, 9, 257, 64),
    (3, 7, 23, 198, 40),
    (2, 3, 1, 17, 1),
    (1, 1, 5, 1, 8),
    (2, 1, 33, 65, 24),
]
EMPTY = [(0, 2, 3, 5, 4), (2, 2, 0, 5, 4)]


def _expanded(x: Tensor) -> Tensor:
    return x[:, :1].expand(x.shape)


def _sliced(x: Tensor) -> Tensor:
    wide = torch.full((*x.shape[:-1], 2 * x.shape[-1] + 1), float("nan"), dtype=x.dtype)
    wide[..., 1::2] = x
    return wide[..., 1::2]


# The same numbers (of the first head, where it is expanded) in another layout.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "[B, T, H, D]": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "expanded": _expanded,
    "sliced": _sliced,
    "[D, T, H, B]": lambda x: x.transpose(0, 3).contiguous().transpose(0, 3),
}


def qkv(
    shape: tuple[int, ...], dtype: torch.dtype = torch.float32, values: int = 24, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """q [B, H, T, D] with peaks, k [B, H, S, D], v [B, H, S, values]."""
    batch, heads, words, keys, dim = shape
    generator = torch.Generator().manual_seed(seed)
    q = 3 * torch.randn(batch, heads, words, dim, generator=generator)
    k = torch.randn(batch, heads, keys, dim, generator=generator)
    v = torch.randn(batch, heads, keys, values, generator=generator)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def some_keys(batch: int, keys: int) -> Tensor:
    """[B, S] with about two thirds of the keys; the last row of several has none."""
    valid = torch.rand(batch, keys, generator=torch.Generator().manual_seed(1)) < 0.7
    valid[:1, :1] = True
    if batch > 1:
        valid[-1] = False
    return valid


def broken(x: Tensor) -> Tensor:
    """`x` with NaN and infinities in some rows of some heads."""
    x = x.clone()
    for i, value in enumerate((float("nan"), float("inf"), -float("inf"))):
        x[i % x.shape[0], i % x.shape[1], i % x.shape[2], 0] = value
    return x
