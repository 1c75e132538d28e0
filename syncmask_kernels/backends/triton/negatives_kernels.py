"""Triton kernels that choose a negative, one program per row, over blocks of its columns."""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from syncmask_kernels.backends.triton.selection_kernels import order_keys

KEY_OF_MINUS_INF = tl.constexpr(0x007FFFFF)  # of the numbers the lowest, and above that of NaN


@triton.jit
def logarithm(x):
    """The natural logarithm of normal positive numbers, within 2 units of the last place.

    The device's own is far off beside 1, where Gumbel noise is largest.
    """
    bits = x.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) >> 23  # of sqrt(1/2): the rest is around 1
    rest = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
    whole = exponent.to(tl.float32)
    power = rest * 7.0376836292e-2 - 1.1514610310e-1
    power = power * rest + 1.1676998740e-1
    power = power * rest - 1.2420140846e-1
    power = power * rest + 1.4249322787e-1
    power = power * rest - 1.6668057665e-1
    power = power * rest + 2.0000714765e-1
    power = power * rest - 2.4999993993e-1
    power = power * rest + 3.3333331174e-1
    square = rest * rest
    power = power * rest * square - whole * 2.12194440e-4 - 0.5 * square
    return rest + power + whole * 0.693359375


@triton.jit
def gumbel(words):
    """Noise of random words, as eager's philox.gumbel."""
    u = ((words >> 9).to(tl.int32).to(tl.float32) + 0.5) * 1.1920928955078125e-07
    return -logarithm(-logarithm(u))


@triton.jit
def random_words(seed, row, start, BLOCK: tl.constexpr):
    """The words of the cells [start, start + BLOCK) of a row; both are multiples of 4."""
    key = (tl.load(seed) & 0xFFFFFFFF) | (tl.load(seed + 1) << 32)
    counters = (start // 4 + tl.arange(0, BLOCK // 4)).to(tl.uint32)
    zero = counters * 0
    first, second, third, fourth = tl.philox(key, counters, zero + row.to(tl.uint32), zero, zero)
    return tl.interleave(tl.interleave(first, third), tl.interleave(second, fourth))


@triton.jit
def own_column(positive, row, DIAGONAL: tl.constexpr):
    """The column that the row is not to choose for being its own, or -1."""
    own = tl.full((), -1, tl.int64)
    if positive is not None:
        own = tl.load(positive + row)
    elif DIAGONAL:
        own = row
    return own


@triton.jit
def load_candidates(
    sim, sim_b, sim_n, exclude, row_ids, col_ids, row, own, columns, N
):  # fmt: skip
    """Similarities of a block of columns, and which of them the row may choose."""
    inside = columns < N
    places = columns.to(tl.int64)
    values = tl.load(sim + row * sim_b + places * sim_n, inside, float("-inf")).to(tl.float32)
    candidate = (order_keys(values, inside, True) > KEY_OF_MINUS_INF) & (columns != own)
    if exclude is not None:
        candidate &= tl.load(exclude + row * N + places, inside, 1) == 0
    if col_ids is not None:
        candidate &= tl.load(col_ids + columns, inside, 0) != tl.load(row_ids + row)
    return values, candidate


@triton.jit
def largest_kernel(
    sim, sim_b, sim_n, positive, exclude, row_ids, col_ids, seed, noise, ids, found, N,
    DIAGONAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The first candidate of a row with the largest similarity, or sum with the noise."""
    row = tl.program_id(0).to(tl.int64)
    own = own_column(positive, row, DIAGONAL)
    best = tl.zeros((BLOCK,), tl.uint32)
    at = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, N, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        values, candidate = load_candidates(
            sim, sim_b, sim_n, exclude, row_ids, col_ids, row, own, columns, N
        )
        if noise is not None:
            place = noise + row * N + columns.to(tl.int64)
            values += tl.load(place, candidate, 0.0).to(tl.float32)
        elif seed is not None:
            values += gumbel(random_words(seed, row, start, BLOCK))
        keys = order_keys(values, candidate, True)
        at = tl.where(keys > best, columns, at)
        best = tl.maximum(best, keys)
    top = tl.max(best, 0)
    chosen = tl.min(tl.where(best == top, at, N), 0)
    tl.store(ids + row, tl.where(top > 0, chosen, 0).to(tl.int64))
    tl.store(found + row, top > 0)


@triton.jit
def keys_below(keys, limit):
    """How many candidates have a key below the limit."""
    return tl.sum(((keys > 0) & (keys < limit)).to(tl.int32))


@triton.jit(do_not_specialize=["num", "den"])
def below_kernel(
    sim, sim_b, sim_n, positive, exclude, row_ids, col_ids, margin, num, den, ids, found, N,
    DIAGONAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The candidate at a rank, from the least similar one on, of those below the ceiling.

    They rank before the other candidates, so that the rank is one among all, and the first is right
    where nothing is below.
    """
    row = tl.program_id(0).to(tl.int64)
    own = own_column(positive, row, DIAGONAL)
    known = (own >= 0) & (own < N)
    ceiling = tl.load(sim + row * sim_b + own * sim_n, known, float("nan")).to(tl.float32)
    limit = order_keys(ceiling - margin, known, True)
    below = tl.full((), 0, tl.int32)
    available = tl.full((), 0, tl.int32)
    for start in range(0, N, BLOCK):
        values, candidate = load_candidates(
            sim, sim_b, sim_n, exclude, row_ids, col_ids, row, own,
            start + tl.arange(0, BLOCK), N,
        )  # fmt: skip
        below += keys_below(order_keys(values, candidate, True), limit)
        available += tl.sum(candidate.to(tl.int32))
    rank = tl.maximum((below.to(tl.int64) * num + den - 1) // den, 1)
    # The largest key with fewer candidates below it than the rank, bit by bit.
    level = tl.full((), 0, tl.uint32)
    bit = tl.full((), 0x80000000, tl.uint32)
    for _ in range(32):
        raised = level | bit
        lower = tl.full((), 0, tl.int32)
        for start in range(0, N, BLOCK):
            values, candidate = load_candidates(
                sim, sim_b, sim_n, exclude, row_ids, col_ids, row, own,
                start + tl.arange(0, BLOCK), N,
            )  # fmt: skip
            lower += keys_below(order_keys(values, candidate, True), raised)
        level = tl.where(lower < rank, raised, level)
        bit = bit >> 1
    chosen = tl.full((), N, tl.int32)
    for start in range(0, N, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        values, candidate = load_candidates(
            sim, sim_b, sim_n, exclude, row_ids, col_ids, row, own, columns, N
        )
        same = order_keys(values, candidate, True) == level
        chosen = tl.minimum(chosen, tl.min(tl.where(same, columns, N), 0))
    tl.store(ids + row, tl.where(available > 0, chosen, 0).to(tl.int64))
    tl.store(found + row, available > 0)
