"""Launches of the Triton masking kernels, and the operators made of them."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from syncmask_kernels.backends import overloads
from syncmask_kernels.backends.triton import INTERPRETED
from syncmask_kernels.backends.triton.launch import Launch, block, contiguous, run, strides
from syncmask_kernels.backends.triton.masking_kernels import (
    gather_kernel,
    mask_patches_kernel,
    masked_sum_kernel,
    scatter_kernel,
)

TILE, COLUMNS = 2048, 256  # numbers that a program holds, and their columns at most
LEAST_SHARE, MOST_SHARES = 128, 512  # rows that a program sums at least, programs at most
IDS = 64  # compared at once
BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _tile(rows: int, columns: int) -> dict[str, int]:
    wide = min(block(columns), COLUMNS)
    return {"BLOCK_N": min(block(rows), TILE // wide), "BLOCK_D": wide}


def _launch(kernel: Any, out: Tensor, args: dict[str, Any]) -> list[Launch]:
    """One program for each tile of out [B, N, D]."""
    batch, rows, columns = out.shape
    blocks = _tile(rows, columns)
    tiles = triton.cdiv(rows, blocks["BLOCK_N"]) * triton.cdiv(columns, blocks["BLOCK_D"])
    args = {**args, "out": out, "N": rows, "D": columns, **blocks}
    return [Launch(kernel, (batch * tiles,), args, 4)] if out.numel() > 0 else []


def mask_patches_launches(
    patches: Tensor, patch_mask: Tensor, mask_token: Tensor | None
) -> tuple[Tensor, list[Launch]]:
    """The output of `mask_patches`, not yet written, and the launch that writes it."""
    out = torch.empty(patches.shape, dtype=patches.dtype, device=patches.device)
    args: dict[str, Any] = {"patches": patches, "token": mask_token}
    args["patch_mask"] = contiguous(patch_mask)
    args["token_d"] = 0 if mask_token is None else mask_token.stride(0)
    return out, _launch(mask_patches_kernel, out, args | strides("patches", "bpd", patches))


def _sum_launch(x: Tensor, mask: Tensor | None, share: int) -> tuple[Tensor, list[Launch]]:
    """Sums of each `share` rows of x [B, P, D]."""
    batch, positions, columns = x.shape
    rows = batch * positions
    parts = max(triton.cdiv(rows, share), 1)
    sums = torch.empty((parts, columns), device=x.device)
    blocks = _tile(share, columns)
    args = {"x": x, "mask": contiguous(mask), "sums": sums, "rows": rows, "share": share}
    args |= {"P": max(positions, 1), "D": columns, **blocks, **strides("x", "bpd", x)}
    grid = (parts * triton.cdiv(columns, blocks["BLOCK_D"]),)
    return sums, [Launch(masked_sum_kernel, grid, args, 4)] if columns > 0 else []


def masked_sum_launches(x: Tensor, mask: Tensor) -> tuple[Tensor, list[Launch]]:
    """The sum [D] of the masked rows, and what writes it: of shares of rows, then of the shares."""
    rows = x.shape[0] * x.shape[1]
    share = max(LEAST_SHARE, block(triton.cdiv(rows, MOST_SHARES)))
    parts, first = _sum_launch(x, mask, share)
    if len(parts) == 1:
        return parts[0], first
    sums, second = _sum_launch(parts.unsqueeze(0), None, block(len(parts)))
    return sums[0], first + second


def gather_launches(x: Tensor, ids: Tensor, fill: float) -> tuple[Tensor, list[Launch]]:
    """The output of `gather_masked`, not yet written, and the launch that writes it."""
    out = torch.empty((*ids.shape, x.shape[2]), dtype=x.dtype, device=x.device)
    bits = BITS[x.element_size()]  # are moved, whatever they stand for
    stored = torch.tensor(fill, dtype=x.dtype).view(bits).item()
    args = {"x": x.view(bits), "ids": contiguous(ids), "fill": stored, "positions": x.shape[1]}
    return out, _launch(gather_kernel, out.view(bits), args | strides("x", "bnd", x))


def scatter_launches(x: Tensor, ids: Tensor, positions: int) -> tuple[Tensor, list[Launch]]:
    """The output of `scatter_masked`, not yet written, and the launch that writes it."""
    batch, width, columns = x.shape
    out = torch.empty((batch, positions, columns), dtype=x.dtype, device=x.device)
    args = {"x": x, "ids": contiguous(ids), "K": width, "BLOCK_K": min(block(width), IDS)}
    return out, _launch(scatter_kernel, out, args | strides("x", "bkd", x))


def _run(launches: Any) -> Any:
    def call(x: Tensor, *rest: Any) -> Tensor:
        out, made = launches(x, *rest)
        run(made, x)
        return out

    return call


_LAUNCHES = {
    "mask_patches": mask_patches_launches,
    "masked_sum": masked_sum_launches,
    "gather_masked": gather_launches,
    "scatter_masked": scatter_launches,
}
mask_patches, masked_sum, gather_masked, scatter_masked = (
    overloads.define(op, "triton") for op in _LAUNCHES
)
for _device in ("cpu", "cuda") if INTERPRETED else ("cuda",):
    for _op, _launches in _LAUNCHES.items():
        torch.library.impl(f"syncmask::{_op}.triton", _device, _run(_launches))
