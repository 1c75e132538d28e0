"""Triton kernels of the selection operators.

`sync_topk_mask` takes two launches: `score_kernel` reads the attention once and leaves the partial
scores of its tiles; `select_kernel` adds them up in a fixed order and selects, one program per row
and side. There are no atomics, and the blocks depend on T and P alone: a row gets the same bits in
any batch.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

# What may change from call to call must not compile anew.
VARYING = ["num", "den", "width", "patch_num", "patch_den", "patch_width"]
VARYING += ["token_num", "token_den", "token_width", "cls_row", "B"]


@triton.jit
def nan_max(x, axis: tl.constexpr):
    # tl.max drops NaN.
    number = x == x
    return tl.max(tl.where(number, x, float("-inf")), axis) + tl.sum(tl.where(number, 0.0, x), axis)


@triton.jit(do_not_specialize=VARYING)
def score_kernel(
    attn, lse, token_valid, patch_valid, patch_parts, token_parts,
    B, T, P, layers, heads, cls_row,
    stride_l, stride_b, stride_h, stride_t, stride_p,
    PATCH_RULE: tl.constexpr, TOKEN_RULE: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """One tile of words and patches, all layers and heads.

    Leaves the tile's sum over words in patch_parts [B, word blocks, P] and its maximum (or sum)
    over patches in token_parts [B, patch blocks, T], both still to be divided by layers * heads.
    """
    patch_blocks, token_blocks = tl.cdiv(P, BLOCK_P), tl.cdiv(T, BLOCK_T)
    patch_block = tl.program_id(0) % patch_blocks
    token_block = tl.program_id(0) // patch_blocks % token_blocks
    b = (tl.program_id(0) // (patch_blocks * token_blocks)).to(tl.int64)
    words = token_block * BLOCK_T + tl.arange(0, BLOCK_T)
    patches = patch_block * BLOCK_P + tl.arange(0, BLOCK_P)

    counted = words < T
    if token_valid is not None:
        counted &= tl.load(token_valid + b * T + words, counted, 0)
    scored = patches < P
    if patch_valid is not None:
        scored &= tl.load(patch_valid + b * P + patches, scored, 0)
    if PATCH_RULE == "cls":
        weighed = words == cls_row
        read = weighed if TOKEN_RULE is None else weighed | counted
    else:
        weighed = counted
        read = counted

    mask = read[:, None] & scored[None, :]
    tile = attn + b * stride_b + words.to(tl.int64)[:, None] * stride_t
    tile += patches.to(tl.int64)[None, :] * stride_p
    mean = tl.zeros((BLOCK_T, BLOCK_P), tl.float32)
    shared = tl.zeros((BLOCK_T, BLOCK_P), tl.float32)
    # The next head is on its way while this one is added up.
    ahead = tl.load(tile, mask, 0.0)
    for i in range(layers * heads):
        weights = ahead.to(tl.float32)
        layer, head = tl.cast((i + 1) // heads, tl.int64), tl.cast((i + 1) % heads, tl.int64)
        more = tl.where(i + 1 < layers * heads, mask, False)
        ahead = tl.load(tile + layer * stride_l + head * stride_h, more, 0.0)
        if PATCH_RULE is not None or TOKEN_RULE == "max":
            mean += weights
        if TOKEN_RULE == "text_softmax" or TOKEN_RULE == "dual":
            slope = counted.to(tl.float32)
            if lse is not None:
                row = (tl.cast(i // heads, tl.int64) * B + b) * heads + i % heads
                logits = tl.load(lse + row * T + words, counted, float("-inf")).to(tl.float32)
                top = nan_max(logits, 0)
                slope = tl.exp(logits - tl.where(top == float("-inf"), 0.0, top))
            lifted = tl.where(slope[:, None] == 0, 0.0, weights * slope[:, None])
            total = tl.sum(lifted, 0)
            share = tl.div_rn(lifted, tl.where(total == 0, 1.0, total)[None, :])
            shared += share * weights if TOKEN_RULE == "dual" else share

    if PATCH_RULE is not None:
        part = tl.sum(tl.where(weighed[:, None], mean, 0.0), 0)
        row = b * token_blocks + token_block
        tl.store(patch_parts + row * P + patches, part, patches < P)
    if TOKEN_RULE is not None:
        inside = (patches < P)[None, :]
        if TOKEN_RULE == "max":
            part = nan_max(tl.where(inside, mean, float("-inf")), 1)
        elif TOKEN_RULE == "text_softmax":
            part = nan_max(tl.where(inside, shared, float("-inf")), 1)
        else:
            part = tl.sum(tl.where(inside, shared, 0.0), 1)
        row = b * patch_blocks + patch_block
        tl.store(token_parts + row * T + words, tl.where(counted, part, 0.0), words < T)


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
def load_row(
    parts, blocks, divisor, valid, noise, word_ids, row, N, columns,
    COMBINE_MAX: tl.constexpr, LARGEST: tl.constexpr,
):  # fmt: skip
    """Scores of a row from the parts [rows, blocks, N], and the keys they are selected by."""
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
    keys, parts, blocks, divisor, valid, noise, word_ids, row, N, columns,
    COMBINE_MAX: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """For each piece the best key of its word's pieces, and the position of the first of them."""
    words = tl.load(word_ids + row * N + columns, columns < N, -1)
    words = tl.where(keys > 0, words, -1)
    best = tl.zeros((BLOCK,), tl.uint32)
    first = tl.full((BLOCK,), BLOCK, tl.int32)
    for start in range(0, N, CHUNK):
        others = start + tl.arange(0, CHUNK)
        _, other_keys = load_row(
            parts, blocks, divisor, valid, noise, word_ids, row, N, others, COMBINE_MAX, True
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
        best, first = word_keys(
            keys, parts, blocks, divisor, valid, noise, word_ids, row, N, columns,
            COMBINE_MAX, BLOCK, CHUNK,
        )  # fmt: skip
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
            words = T
            if token_valid is not None:
                columns = tl.arange(0, BLOCK_T)
                counted = tl.load(token_valid + row * T + columns, columns < T, 0)
                words = tl.sum(counted.to(tl.int32))
            divisor *= tl.maximum(words, 1)
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
