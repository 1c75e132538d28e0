"""The sizes that are compared, and inputs of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

DTYPES = [torch.float32, torch.bfloat16]
# Batch, heads, words, keys (the image CLS and its patches): of ALBEF at batch 64, and none even.
ATTENTION = [(64, 12, 30, 257), (37, 7, 23, 198)]
HEAD_DIM = {12: 64, 7: 40}


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _queries() -> list[Any]:
    """Shapes [B, H, T, S, D], types, and whether q, k and v are views of [B, T, H, D]."""
    return [
        pytest.param(
            (*shape, HEAD_DIM[shape[1]]),
            dtype,
            views,
            id=f"{shape}-{dtype_name(dtype)}{'-views' * views}",
        )
        for shape in ATTENTION
        for dtype, views in [(d, False) for d in DTYPES] + [(torch.float32, True)]
    ]


QUERIES = _queries()


def attention(generator: torch.Generator, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """[B, H, T, S], softmaxed."""
    return torch.randn(shape, generator=generator).softmax(dim=-1).to(dtype)


def qkv(
    generator: torch.Generator, shape: tuple[int, ...], dtype: torch.dtype, views: bool
) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, words, keys, dim = shape

    def drawn(length: int) -> Tensor:
        if views:
            made = torch.randn(batch, length, heads, dim, generator=generator).transpose(1, 2)
        else:
            made = torch.randn(batch, heads, length, dim, generator=generator)
        return made.to(dtype)

    return drawn(words), drawn(keys), drawn(keys)


def words_of(generator: torch.Generator, batch: int, words: int, shortest: int) -> Tensor:
    """[B, T] bool: captions of `shortest` to T words."""
    lengths = torch.randint(shortest, words + 1, (batch, 1), generator=generator)
    return torch.arange(words) < lengths
