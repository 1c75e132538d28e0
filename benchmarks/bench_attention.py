"""head_average, attention_map and attention_with_map against PyTorch and their floors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import syncmask_kernels as smk
from benchmarks.checks import as_accurate
from benchmarks.inputs import ATTENTION, DTYPES, QUERIES, attention, dtype_name, qkv
from benchmarks.measure import rotation
from benchmarks.report import Case
from reference.ops import attention as oracle

Inputs = tuple[Tensor, ...]


def as_stored(x: Tensor) -> Tensor:
    """As many numbers as x [B, H, T, D] without its strides: a floor reads them in order."""
    return x if x.is_contiguous() else x.transpose(1, 2).view(x.shape)


def product(inputs: Inputs) -> Tensor:
    return as_stored(inputs[0]) @ as_stored(inputs[1]).mT


def plain_head_average(attn: Tensor) -> Tensor:
    return attn.mean(dim=1, dtype=torch.float32)[..., 1:]


def plain_attention_with_map(inputs: Inputs) -> Inputs:
    q, k, v = inputs
    weights = (q * q.shape[-1] ** -0.5 @ k.mT).softmax(dim=-1)
    return weights @ v, plain_head_average(weights)


def plain_attention_map(inputs: Inputs) -> Tensor:
    q, k, _ = inputs
    return plain_head_average((q * q.shape[-1] ** -0.5 @ k.mT).softmax(dim=-1))


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("shape", ATTENTION, ids=str)
def bench_head_average(
    compare: Callable[..., None],
    compiled: Callable[..., Any],
    shape: tuple[int, ...],
    dtype: torch.dtype,
) -> None:
    inputs = rotation(lambda generator: attention(generator, shape, dtype))
    first = inputs[0]
    compare(
        Case("head_average", shape, dtype),
        {
            "attn.sum()": torch.sum,
            "plain PyTorch": plain_head_average,
            **compiled(plain_head_average),
            "this library": smk.head_average,
        },
        inputs,
        as_accurate([plain_head_average(first)], [oracle.head_average([first.double()])]),
    )


@pytest.mark.parametrize(("shape", "dtype", "views"), QUERIES)
def bench_attention_map(
    compare: Callable[..., None],
    compiled: Callable[..., Any],
    shape: tuple[int, ...],
    dtype: torch.dtype,
    views: bool,
) -> None:
    inputs = rotation(lambda generator: qkv(generator, shape, dtype, views))
    q, k, v = inputs[0]
    compare(
        Case("attention_map", shape, dtype, "[B, T, H, D] views" if views else ""),
        {
            "q @ k.mT": product,
            "plain PyTorch": plain_attention_map,
            **compiled(plain_attention_map),
            "this library": lambda x: smk.attention_map(*x[:2]),
        },
        inputs,
        as_accurate(
            [plain_attention_map((q, k, v))], [oracle.attention_map(q.double(), k.double())]
        ),
    )


@pytest.mark.parametrize(("shape", "dtype", "views"), QUERIES)
def bench_attention_with_map(
    compare: Callable[..., None],
    compiled: Callable[..., Any],
    shape: tuple[int, ...],
    dtype: torch.dtype,
    views: bool,
) -> None:
    inputs = rotation(lambda generator: qkv(generator, shape, dtype, views))
    plain = plain_attention_with_map(inputs[0])
    truth = oracle.attention_with_map(*(part.double() for part in inputs[0]))
    compare(
        Case("attention_with_map", shape, dtype, "[B, T, H, D] views" if views else ""),
        {
            "q @ k.mT @ v": lambda x: product(x) @ as_stored(x[2]),
            "SDPA, without map": lambda x: (scaled_dot_product_attention(*x), None),
            "plain PyTorch": plain_attention_with_map,
            **compiled(plain_attention_with_map),
            "this library": lambda x: smk.attention_with_map(*x),
        },
        inputs,
        as_accurate(plain, truth),
    )
