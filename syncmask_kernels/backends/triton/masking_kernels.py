"""Triton kernels of the masking operators: a program writes a tile of rows and columns.

No atomics: where rows are summed, one program takes them in ascending order, so the result is the
same run after run.
"""
# mypy: disable-error-code="no-untyped-def, assignment"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tile_of(N, D, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """The example, the rows and the columns of this program, of [B, N, D]."""
    row_blocks, column_blocks = tl.cdiv(N, BLOCK_N), tl.cdiv(D, BLOCK_D)
    columns = tl.program_id(0) % column_blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    rows = tl.program_id(0) // column_blocks % row_blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    b = (tl.program_id(0) // (column_blocks * row_blocks)).to(tl.int64)
    return b, rows.to(tl.int64), columns.to(tl.int64)


@triton.jit
def mask_patches_kernel(
    patches, patch_mask, token, out,
    N, D, patches_b, patches_p, patches_d, token_d,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out [B, N, D]: the patches with the token (or 0) where masked; those are not read."""
    b, row, column = tile_of(N, D, BLOCK_N, BLOCK_D)
    masked = tl.load(patch_mask + b * N + row, row < N, 0) != 0
    inside = (row < N)[:, None] & (column < D)[None, :]
    at = patches + b * patches_b + row[:, None] * patches_p + column[None, :] * patches_d
    value = tl.load(at, inside & ~masked[:, None], 0.0)
    if token is not None:
        other = tl.load(token + column * token_d, column < D, 0.0).to(out.dtype.element_ty)
        value = tl.where(masked[:, None], other[None, :], value)
    tl.store(out + (b * N + row)[:, None] * D + column[None, :], value, inside)


@triton.jit
def masked_sum_kernel(
    x, mask, sums,
    rows, share, P, D, x_b, x_p, x_d,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """sums [shares, D]: of each share of the rows of x [B, P, D], those that are masked."""
    part, _, column = tile_of(1, D, 1, BLOCK_D)
    total = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for first in range(0, share, BLOCK_N):
        row = part * share + first + tl.arange(0, BLOCK_N)
        wanted = row < rows
        if mask is not None:
            wanted = tl.load(mask + row, wanted, 0) != 0
        at = x + (row // P * x_b + row % P * x_p)[:, None] + column[None, :] * x_d
        total += tl.load(at, wanted[:, None] & (column < D)[None, :], 0.0).to(tl.float32)
    tl.store(sums + part * D + column, tl.sum(total, 0), column < D)


@triton.jit(do_not_specialize=["fill"])
def gather_kernel(
    x, ids, out, fill,
    N, D, positions, x_b, x_n, x_d,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out [B, N, D]: the rows of x [B, positions, D] at the ids, `fill` where there is none."""
    b, row, column = tile_of(N, D, BLOCK_N, BLOCK_D)
    inside = (row < N)[:, None] & (column < D)[None, :]
    position = tl.load(ids + b * N + row, row < N, -1)
    there = (position >= 0) & (position < positions)
    at = x + b * x_b + position[:, None] * x_n + column[None, :] * x_d
    value = tl.load(at, inside & there[:, None], 0)
    value = tl.where(there[:, None], value, tl.cast(fill, value.dtype))
    tl.store(out + (b * N + row)[:, None] * D + column[None, :], value, inside)


@triton.jit
def scatter_kernel(
    x, ids, out,
    N, D, K, x_b, x_k, x_d,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out [B, N, D]: at each position the sum of the rows of x [B, K, D] whose id it is."""
    b, position, column = tile_of(N, D, BLOCK_N, BLOCK_D)
    total = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    last = tl.full((BLOCK_N,), -1, tl.int32)
    left = 1
    # A turn adds the next row of each position; most often there is one turn.
    while left > 0:
        row = tl.full((BLOCK_N,), K, tl.int32)
        matches = tl.zeros((BLOCK_N,), tl.int32)
        for start in range(0, K, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            there = tl.load(ids + b * K + k, k < K, -1)[None, :] == position[:, None]
            there &= k[None, :] > last[:, None]
            row = tl.minimum(row, tl.min(tl.where(there, k[None, :], K), 1))
            matches += tl.sum(there.to(tl.int32), 1)
        wanted = (row < K)[:, None] & (column < D)[None, :]
        at = x + b * x_b + row.to(tl.int64)[:, None] * x_k + column[None, :] * x_d
        total += tl.load(at, wanted, 0.0).to(tl.float32)
        last = row
        left = tl.max(matches, 0) - 1
    inside = (position < N)[:, None] & (column < D)[None, :]
    at = out + (b * N + position)[:, None] * D + column[None, :]
    tl.store(at, total.to(out.dtype.element_ty), inside)
