"""Triton kernels that select, one program per row and side.

`select_kernel` first adds up, in a fixed order, the partial scores that the tiles of
`score_kernels.py` left.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

# What may change from call to call must not compile anew.
VARYING = ["num", "den", "width", "patch_num", "patch_den", "patch_width"]
VARYING += ["token_num", "token_den", "token_width"]


@triton.jit
def order_keys(scores, valid, LARGEST: tl.constexpr):
    """Keys in the order of (excluded, NaN, -score): the larger the earlier.

    Integers throughout: a device that flushes denormals would compare them as equal floats.
    """
    bits = scores.to(tl.uint32, bitcast=True)
    if not LARGEST:
        bits ^= 0x80000000
    # -0.0 (0x80000000) takes the branch of the positive numbers, and gets the key of 0.0.
    keys = tl.where(bits > 0x80000000, bits ^ 0xFFFFFFFF, bits | 0x80000000)
    keys = tl.where((bits & 0x7FFFFFFF) > 0x7F800000, 1, keys)
    return tl.where(valid, keys, 0)


@triton.jit
def row_scores(parts, blocks, divisor, row, N, columns, COMBINE_MAX: tl.constexpr):
    """Scores of a row from the parts [rows, blocks, N]."""
    inside = columns < N
    part = parts + row * blocks * N + columns
    scores = tl.load(part, inside, 0.0).to(tl.float32)
    for _ in range(1, blocks):
        part += N
        other = tl.load(part, inside, 0.0)
        if COMBINE_MAX:
            # Unlike tl.maximum, this keeps NaN.
            scores = tl.where((scores >= other) | (scores != scores), scores, other)
        else:
            scores += other
    if divisor is not None:
        scores = tl.div_rn(scores, divisor)
    return scores


@triton.jit
def load_row(
    parts, blocks, divisor, valid, noise, word_ids, row, N, columns,
    COMBINE_MAX: tl.constexpr, LARGEST: tl.constexpr,
):  # fmt: skip
    """Scores of a row, and the keys they are selected by."""
    scores = row_scores(parts, blocks, divisor, row, N, columns, COMBINE_MAX)
    inside = columns < N
    if valid is not None:
        inside &= tl.load(valid + row * N + columns, inside, 0)
    if word_ids is not None:
        inside &= tl.load(word_ids + row * N + columns, inside, -1) >= 0
    noisy = scores
    if noise is not None:
        noisy = scores + tl.load(noise + row * N + columns, inside, 0.0).to(tl.float32)
    return scores, order_keys(noisy, inside, LARGEST)


@triton.jit
def word_keys(
    keys, scores, valid, noise, word_ids, row, N, columns,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """For each piece the best key of its word's pieces, and the position of the first of them."""
    words = tl.load(word_ids + row * N + columns, columns < N, -1)
    words = tl.where(keys > 0, words, -1)
    best = tl.zeros((BLOCK,), tl.uint32)
    first = tl.full((BLOCK,), BLOCK, tl.int32)
    for start in range(0, N, CHUNK):
        others = start + tl.arange(0, CHUNK)
        _, other_keys = load_row(
            scores, 1, None, valid, noise, word_ids, row, N, others, False, True
        )
        other_words = tl.load(word_ids + row * N + others, others < N, -1)
        same = (words[:, None] == other_words[None, :]) & (other_keys > 0)[None, :]
        best = tl.maximum(best, tl.max(tl.where(same, other_keys[None, :], 0), 1))
        first = tl.minimum(first, tl.min(tl.where(same, others[None, :], BLOCK), 1))
    return best, first


@triton.jit
def select(keys, positions, candidates, k, num, den, row):
    """Mask of the first `count` candidates in the order of (key descending, position)."""
    available = tl.sum(candidates.to(tl.int32)).to(tl.int64)
    if k is not None:
        count = tl.minimum(tl.maximum(tl.load(k + row), 0), available)
    else:
        share = (available * num + den - 1) // tl.maximum(den, 1)
        count = tl.where(den > 0, share, tl.minimum(num, available))
    count = count.to(tl.int32)
    ranked = tl.where(candidates, keys, 0)
    # The largest threshold that at least `count` keys reach, bit by bit.
    threshold = tl.full((), 0, tl.uint32)
    bit = tl.full((), 0x80000000, tl.uint32)
    for _ in range(32):
        raised = threshold | bit
        threshold = tl.where(tl.sum((ranked >= raised).to(tl.int32)) >= count, raised, threshold)
        bit = bit >> 1
    ties = ranked == threshold
    room = count - tl.sum((ranked > threshold).to(tl.int32))
    listed = ties & (tl.cumsum(ties.to(tl.int32), 0) <= room)
    last = tl.max(tl.where(listed, positions, -1), 0)
    return (keys > threshold) | ((keys == threshold) & (positions <= last))


@triton.jit
def select_row(
    parts, blocks, divisor, valid, noise, word_ids, k, num, den, width,
    scores_out, mask_out, ids_out, row, N,
    COMBINE_MAX: tl.constexpr, LARGEST: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Select among the N positions of a row; write mask, ids and (where wanted) scores."""
    columns = tl.arange(0, BLOCK)
    scores, keys = load_row(
        parts, blocks, divisor, valid, noise, word_ids, row, N, columns, COMBINE_MAX, LARGEST
    )
    if scores_out is not None:
        tl.store(scores_out + row * N + columns, scores, columns < N)
    if word_ids is None:
        mask = select(keys, columns, keys > 0, k, num, den, row)
    else:
        # Pieces are compared by the scores that other threads have just stored.
        tl.debug_barrier()
        best, first = word_keys(
            keys, scores_out, valid, noise, word_ids, row, N, columns, BLOCK, CHUNK
        )
        mask = select(best, first, first == columns, k, num, den, row)
    tl.store(mask_out + row * N + columns, mask, columns < N)
    chosen = mask.to(tl.int32)
    slots = tl.cumsum(chosen, 0) - 1
    ids = ids_out + row * width
    tl.store(ids + slots, columns.to(tl.int64), mask & (slots < width))
    total = tl.sum(chosen)
    for start in range(0, width, BLOCK):
        slots = start + columns
        tl.store(ids + slots, -1, (slots >= total) & (slots < width))


@triton.jit
def counted_words(token_valid, row, T, BLOCK_T: tl.constexpr):
    """The number of valid words of a row, at least 1."""
    words = T
    if token_valid is not None:
        columns = tl.arange(0, BLOCK_T)
        words = tl.sum(tl.load(token_valid + row * T + columns, columns < T, 0).to(tl.int32))
    return tl.maximum(words, 1)


@triton.jit(do_not_specialize=VARYING)
def topk_kernel(
    scores, valid, k, num, den, width, mask, ids, N,
    LARGEST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row of `topk_mask` per program."""
    row = tl.program_id(0).to(tl.int64)
    select_row(
        scores, 1, None, valid, None, None, k, num, den, width, None, mask, ids,
        row, N, False, LARGEST, BLOCK, 1,
    )  # fmt: skip


@triton.jit(do_not_specialize=VARYING)
def select_kernel(
    patch_parts, patch_blocks, patch_valid, patch_noise, patch_k, patch_num, patch_den, patch_width,
    token_parts, token_blocks, token_valid, token_noise, token_k, token_num, token_den, token_width,
    word_ids, patch_scores, patch_mask, patch_ids, token_scores, token_mask, token_ids,
    T, P, maps,
    PATCH_RULE: tl.constexpr, TOKEN_RULE: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_P: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One row and side per program: patches where the second program id is 0, else words.

    `maps` is the number of layers and heads that were added up.
    """
    row = tl.program_id(0).to(tl.int64)
    divisor = tl.cast(maps, tl.float32)
    if tl.program_id(1) == 0:
        if PATCH_RULE == "mean":
            divisor *= counted_words(token_valid, row, T, BLOCK_T)
        select_row(
            patch_parts, patch_blocks, None if PATCH_RULE is None else divisor, patch_valid,
            patch_noise, None, patch_k, patch_num, patch_den, patch_width, patch_scores, patch_mask,
            patch_ids, row, P, False, True, BLOCK_P, 1,
        )  # fmt: skip
    else:
        select_row(
            token_parts, token_blocks, None if TOKEN_RULE is None else divisor, token_valid,
            token_noise, word_ids, token_k, token_num, token_den, token_width, token_scores,
            token_mask, token_ids, row, T, TOKEN_RULE != "dual", True, BLOCK_T, CHUNK,
        )  # fmt: skip


@triton.jit(do_not_specialize=["maps"])
def reduce_kernel(
    patch_parts, patch_blocks, token_parts, token_blocks, token_valid, patch_scores, token_scores,
    T, P, maps,
    PATCH_RULE: tl.constexpr, TOKEN_RULE: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """The scores of one row and side, as `select_kernel` would select by them."""
    row = tl.program_id(0).to(tl.int64)
    divisor = tl.cast(maps, tl.float32)
    if tl.program_id(1) == 0:
        if PATCH_RULE == "mean":
            divisor *= counted_words(token_valid, row, T, BLOCK_T)
        patches = tl.arange(0, BLOCK_P)
        of_patches = row_scores(patch_parts, patch_blocks, divisor, row, P, patches, False)
        tl.store(patch_scores + row * P + patches, of_patches, patches < P)
    else:
        words = tl.arange(0, BLOCK_T)
        of_words = row_scores(
            token_parts, token_blocks, divisor, row, T, words, TOKEN_RULE != "dual"
        )
        tl.store(token_scores + row * T + words, of_words, words < T)
