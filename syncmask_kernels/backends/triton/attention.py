"""Launches of the Triton attention kernels, and the operators made of them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from syncmask_kernels.backends import overloads
from syncmask_kernels.backends.triton import INTERPRETED
from syncmask_kernels.backends.triton.attention_kernels import (
    attention_kernel,
    average_kernel,
    map_kernel,
)
from syncmask_kernels.backends.triton.launch import Launch, block, contiguous, run, strides

MIN_DOT = 16  # the least size of a side of a matrix product
COLUMNS = 256  # of a row of the map that one program averages


class Tiles(NamedTuple):
    """Blocks of a kernel that multiplies queries with keys, as its compile-time constants."""

    BLOCK_T: int
    BLOCK_S: int
    BLOCK_D: int
    CHUNKS: int


def tiles(q: Tensor) -> Tiles:
    """Blocks for q [L, B, H, T, D]."""
    words, dim = q.shape[3:]
    columns = triton.cdiv(dim, MIN_DOT) * MIN_DOT
    # The largest block that wastes no column. In float32, where there are no tensor cores, each
    # thread multiplies whole rows of its blocks in registers.
    block_d = min(columns & -columns, 16 if q.dtype == torch.float32 else 64)
    return Tiles(min(max(block(words), MIN_DOT), 32), 64, block_d, columns // block_d)


def average_launches(attn: Tensor, skip_keys: int) -> tuple[Tensor, list[Launch]]:
    """The output of `head_average`, not yet written, and the launches that write it."""
    values = attn[..., skip_keys:]
    layers, batch, heads, words, patches = values.shape
    mean = torch.empty((batch, words, patches), device=attn.device)
    block_p = min(block(patches), COLUMNS)
    block_t = min(block(words), max(1024 // block_p, 1))
    args = {
        "attn": values,
        "mean": mean,
        "T": words,
        "P": patches,
        "layers": layers,
        "heads": heads,
        "BLOCK_T": block_t,
        "BLOCK_P": block_p,
    } | strides("attn", "lbhts", values)
    grid = (batch * triton.cdiv(words, block_t) * triton.cdiv(patches, block_p),)
    return mean, [Launch(average_kernel, grid, args, 4)] if mean.numel() > 0 else []


def qk_args(
    q: Tensor,
    k: Tensor,
    key_valid: Tensor | None,
    sums: tuple[Tensor, Tensor],
    scale: float,
) -> dict[str, Any]:
    """What every kernel is told that multiplies q [L, B, H, T, D] with k [L, B, H, S, D]."""
    _, batch, heads, words, dim = q.shape
    return {
        "q": q,
        "k": k,
        "key_valid": contiguous(key_valid),
        "tops": sums[0],
        "totals": sums[1],
        "scale": scale,
        "B": batch,
        "T": words,
        "S": k.shape[3],
        "D": dim,
        "heads": heads,
    } | (strides("q", "lbhtd", q) | strides("k", "lbhsd", k))


def attention_launches(
    q: Tensor, k: Tensor, v: Tensor | None, key_valid: Tensor | None, scale: float
) -> tuple[tuple[Tensor, Tensor], Tensor | None, list[Launch]]:
    """Maxima and sums [L, B, H, T] of the softmax and, of one layer with values, its output."""
    blocks = tiles(q)
    sums = (torch.empty(q.shape[:-1], device=q.device), torch.empty(q.shape[:-1], device=q.device))
    output, columns = None, 1
    args = qk_args(q, k, key_valid, sums, scale) | blocks._asdict()
    args |= {"v": v, "output": None, "E": 0, "BLOCK_E": MIN_DOT, "v_l": 0, "v_b": 0, "v_h": 0}
    args |= {"v_s": 0, "v_e": 0}
    if v is not None:
        columns = v.shape[4]
        output = torch.empty((*q.shape[1:4], columns), dtype=q.dtype, device=q.device)
        args |= {"output": output, "E": columns, "BLOCK_E": min(max(block(columns), MIN_DOT), 64)}
        args |= strides("v", "lbhse", v)
    rows = q.shape[:3].numel() * triton.cdiv(q.shape[3], blocks.BLOCK_T)
    grid = (rows, max(triton.cdiv(columns, args["BLOCK_E"]), 1))
    return sums, output, [Launch(attention_kernel, grid, args, 8, True)] if rows > 0 else []


def map_launches(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    key_valid: Tensor | None,
    scale: float,
    skip_keys: int,
) -> tuple[Tensor | None, Tensor, list[Launch]]:
    """The output of attention, where there are values, the mean map, and what writes them."""
    layers, batch, _, words, _ = q.shape
    patches = k.shape[3] - skip_keys
    sums, output, launches = attention_launches(q, k, v, key_valid, scale)
    mean = torch.empty((batch, words, patches), device=q.device)
    blocks = tiles(q)
    args = qk_args(q, k, key_valid, sums, scale) | blocks._asdict()
    args |= {"mean": mean, "layers": layers, "skip_keys": skip_keys}
    tokens = triton.cdiv(words, blocks.BLOCK_T)
    grid = (batch * tokens * triton.cdiv(patches, blocks.BLOCK_S),)
    if mean.numel() > 0:
        launches.append(Launch(map_kernel, grid, args, 8, True))
    return output, mean, launches


_head_average = overloads.define("head_average", "triton")
_attention_map = overloads.define("attention_map", "triton")
_attention_with_map = overloads.define("attention_with_map", "triton")


def _run_head_average(attn: Tensor, skip_keys: int) -> Tensor:
    mean, launches = average_launches(attn, skip_keys)
    run(launches, attn)
    return mean


def _run_attention_map(
    q: Tensor, k: Tensor, key_valid: Tensor | None, scale: float, skip_keys: int
) -> Tensor:
    _, mean, launches = map_launches(q, k, None, key_valid, scale, skip_keys)
    run(launches, q)
    return mean


def _run_attention_with_map(
    q: Tensor, k: Tensor, v: Tensor, *rest: Any
) -> tuple[Tensor | None, Tensor]:
    layered = q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0)
    output, mean, launches = map_launches(*layered, *rest)
    run(launches, q)
    return output, mean


for _device in ("cpu", "cuda") if INTERPRETED else ("cuda",):
    torch.library.impl("syncmask::head_average.triton", _device, _run_head_average)
    torch.library.impl("syncmask::attention_map.triton", _device, _run_attention_map)
    torch.library.impl("syncmask::attention_with_map.triton", _device, _run_attention_with_map)


def head_average(attn: Tensor, skip_keys: int) -> Tensor:
    """attn [L, B, H, T, S] -> the mean over layers and heads [B, T, P]."""
    mean: Tensor = _head_average(attn, skip_keys)
    return mean


def attention_map(
    q: Tensor, k: Tensor, key_valid: Tensor | None, scale: float, skip_keys: int
) -> Tensor:
    """q [L, B, H, T, D], k [L, B, H, S, D] -> the mean map [B, T, P]."""
    mean: Tensor = _attention_map(q, k, key_valid, scale, skip_keys)
    return mean


def attention_with_map(
    q: Tensor, k: Tensor, v: Tensor, key_valid: Tensor | None, scale: float, skip_keys: int
) -> tuple[Tensor, Tensor]:
    """q [B, H, T, D], k [B, H, S, D], v [B, H, S, E] -> output [B, H, T, E], mean map [B, T, P]."""
    output, mean = _attention_with_map(q, k, v, key_valid, scale, skip_keys)
    return output, mean
