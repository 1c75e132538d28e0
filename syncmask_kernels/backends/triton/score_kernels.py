"""Triton kernels that score patches and words.

`score_kernel` reads attention once and leaves the partial scores of its tiles; `score_qk_kernel`
leaves the same, of attention that it makes from queries and keys. There are no atomics, and the
blocks depend on T and P alone: a row gets the same bits in any batch.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from syncmask_kernels.backends.triton.attention_kernels import (
    allowed_keys,
    finite_or_zero,
    load_rows,
    masked_logits,
    probabilities,
)


@triton.jit
def nan_max(x, axis: tl.constexpr):
    # tl.max drops NaN.
    number = x == x
    return tl.max(tl.where(number, x, float("-inf")), axis) + tl.sum(tl.where(number, 0.0, x), axis)


@triton.jit
def word_share(weights):
    """Each word's share of a patch: weights [words, patches] normalised over words.

    A patch that no word looks at is shared by none.
    """
    total = tl.sum(weights, 0)
    return tl.div_rn(weights, tl.where(total == 0, 1.0, total)[None, :])


@triton.jit
def read_words(
    token_valid, b, words, T, cls_row, PATCH_RULE: tl.constexpr, TOKEN_RULE: tl.constexpr
):
    """Which words are counted, which weigh in the scores of patches, and which are read."""
    counted = words < T
    if token_valid is not None:
        counted &= tl.load(token_valid + b * T + words, counted, 0)
    if PATCH_RULE == "cls":
        weighed = words == cls_row
        read = weighed if TOKEN_RULE is None else weighed | counted
    else:
        weighed = counted
        read = counted
    return counted, weighed, read


@triton.jit
def scored_patches(patch_valid, b, patches, P):
    scored = patches < P
    if patch_valid is not None:
        scored &= tl.load(patch_valid + b * P + patches, scored, 0)
    return scored


@triton.jit
def store_parts(
    patch_parts, token_parts, for_patches, for_words, weighed, counted, words, patches,
    b, token_block, patch_block, T, P, PATCH_RULE: tl.constexpr, TOKEN_RULE: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Leave the tile's sum over words in patch_parts [B, word blocks, P] and its maximum (or sum)
    over patches in token_parts [B, patch blocks, T], both still to be divided by the maps added up.
    """
    if PATCH_RULE is not None:
        part = tl.sum(tl.where(weighed[:, None], for_patches, 0.0), 0)
        row = b * tl.cdiv(T, BLOCK_T) + token_block
        tl.store(patch_parts + row * P + patches, part, patches < P)
    if TOKEN_RULE is not None:
        inside = (patches < P)[None, :]
        if TOKEN_RULE == "dual":
            part = tl.sum(tl.where(inside, for_words, 0.0), 1)
        else:
            part = nan_max(tl.where(inside, for_words, float("-inf")), 1)
        row = b * tl.cdiv(P, BLOCK_P) + patch_block
        tl.store(token_parts + row * T + words, tl.where(counted, part, 0.0), words < T)


@triton.jit(do_not_specialize=["cls_row", "B"])
def score_kernel(
    attn, lse, token_valid, patch_valid, patch_parts, token_parts,
    B, T, P, layers, heads, cls_row,
    attn_l, attn_b, attn_h, attn_t, attn_s,
    PATCH_RULE: tl.constexpr, TOKEN_RULE: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """The parts of one tile of words and patches, of all layers and heads."""
    patch_blocks, token_blocks = tl.cdiv(P, BLOCK_P), tl.cdiv(T, BLOCK_T)
    patch_block = tl.program_id(0) % patch_blocks
    token_block = tl.program_id(0) // patch_blocks % token_blocks
    b = (tl.program_id(0) // (patch_blocks * token_blocks)).to(tl.int64)
    words = token_block * BLOCK_T + tl.arange(0, BLOCK_T)
    patches = patch_block * BLOCK_P + tl.arange(0, BLOCK_P)
    counted, weighed, read = read_words(token_valid, b, words, T, cls_row, PATCH_RULE, TOKEN_RULE)
    mask = read[:, None] & scored_patches(patch_valid, b, patches, P)[None, :]
    tile = attn + b * attn_b + words.to(tl.int64)[:, None] * attn_t
    tile += patches.to(tl.int64)[None, :] * attn_s
    mean = tl.zeros((BLOCK_T, BLOCK_P), tl.float32)
    shared = tl.zeros((BLOCK_T, BLOCK_P), tl.float32)
    # The next head is on its way while this one is added up.
    ahead = tl.load(tile, mask, 0.0)
    for i in range(layers * heads):
        weights = ahead.to(tl.float32)
        layer, head = tl.cast((i + 1) // heads, tl.int64), tl.cast((i + 1) % heads, tl.int64)
        more = tl.where(i + 1 < layers * heads, mask, False)
        ahead = tl.load(tile + layer * attn_l + head * attn_h, more, 0.0)
        if PATCH_RULE is not None or TOKEN_RULE == "max":
            mean += weights
        if TOKEN_RULE == "text_softmax" or TOKEN_RULE == "dual":
            slope = counted.to(tl.float32)
            if lse is not None:
                row = (tl.cast(i // heads, tl.int64) * B + b) * heads + i % heads
                logits = tl.load(lse + row * T + words, counted, float("-inf")).to(tl.float32)
                slope = tl.exp(logits - finite_or_zero(nan_max(logits, 0)))
            share = word_share(tl.where(slope[:, None] == 0, 0.0, weights * slope[:, None]))
            shared += share * weights if TOKEN_RULE == "dual" else share
    store_parts(
        patch_parts, token_parts, mean, mean if TOKEN_RULE == "max" else shared, weighed, counted,
        words, patches, b, token_block, patch_block, T, P, PATCH_RULE, TOKEN_RULE, BLOCK_T, BLOCK_P,
    )  # fmt: skip


@triton.jit(do_not_specialize=["cls_row", "B", "layers", "heads"])
def score_qk_kernel(
    q, k, distance, key_valid, token_valid, patch_valid, tops, totals, patch_parts, token_parts,
    scale, B, T, S, D, layers, heads, cls_row, skip_keys,
    q_l, q_b, q_h, q_t, q_d, k_l, k_b, k_h, k_s, k_d,
    PATCH_RULE: tl.constexpr, TOKEN_RULE: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """As `score_kernel`; `distance` [L, B, H, S] weighs the attention in the scores of patches."""
    P = S - skip_keys
    patch_blocks, token_blocks = tl.cdiv(P, BLOCK_S), tl.cdiv(T, BLOCK_T)
    patch_block = tl.program_id(0) % patch_blocks
    token_block = tl.program_id(0) // patch_blocks % token_blocks
    b = (tl.program_id(0) // (patch_blocks * token_blocks)).to(tl.int64)
    words = token_block * BLOCK_T + tl.arange(0, BLOCK_T)
    patches = patch_block * BLOCK_S + tl.arange(0, BLOCK_S)
    keys = skip_keys + patches
    counted, weighed, read = read_words(token_valid, b, words, T, cls_row, PATCH_RULE, TOKEN_RULE)
    scored = scored_patches(patch_valid, b, patches, P)
    allowed = scored & allowed_keys(key_valid, b, keys, S)
    mean = tl.zeros((BLOCK_T, BLOCK_S), tl.float32)
    distant = tl.zeros((BLOCK_T, BLOCK_S), tl.float32)
    shared = tl.zeros((BLOCK_T, BLOCK_S), tl.float32)
    for i in range(layers * heads):
        layer, head = tl.cast(i // heads, tl.int64), tl.cast(i % heads, tl.int64)
        q_rows, k_rows = q + layer * q_l + b * q_b + head * q_h, k + layer * k_l + b * k_b
        k_rows += head * k_h
        queries = load_rows(q_rows, words, read, D, q_t, q_d, BLOCK_D, CHUNKS)
        chunks = load_rows(k_rows, keys, allowed, D, k_s, k_d, BLOCK_D, CHUNKS)
        row = (layer * B + b) * heads + head
        top = tl.load(tops + row * T + words, read, float("-inf"))
        total = tl.load(totals + row * T + words, read, 0.0)
        logits = masked_logits(queries, chunks, allowed, scale)
        weights = probabilities(logits, top, total)
        weights = tl.where(read[:, None] & scored[None, :], weights, 0.0)
        if TOKEN_RULE == "max" or distance is None:
            mean += weights
        if distance is not None:
            far = tl.load(distance + row * S + keys, scored, 0.0)
            distant += weights * far[None, :]
        if TOKEN_RULE != "max":
            # Of the logits: a probability can be 0 where the word is still the patch's best.
            column = tl.where(counted[:, None], logits, float("-inf"))
            share = word_share(tl.exp(column - finite_or_zero(nan_max(column, 0))[None, :]))
            shared += share * weights if TOKEN_RULE == "dual" else share
    store_parts(
        patch_parts, token_parts, mean if distance is None else distant,
        mean if TOKEN_RULE == "max" else shared, weighed, counted, words, patches, b, token_block,
        patch_block, T, P, PATCH_RULE, TOKEN_RULE, BLOCK_T, BLOCK_S,
    )  # fmt: skip


@triton.jit
def similarity_kernel(
    patches, tokens, token_valid, scores, ids,
    P, T, D, patch_b, patch_p, patch_d, token_b, token_t, token_d,
    BLOCK_P: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The largest similarity of one tile of patches to any token, and that token.

    As of torch.max: NaN is larger than any number, ties go to the lower token.
    """
    blocks = tl.cdiv(P, BLOCK_P)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    rows = tl.program_id(0) % blocks * BLOCK_P + tl.arange(0, BLOCK_P)
    p_rows = patches + b * patch_b + rows.to(tl.int64)[:, None] * patch_p
    best = tl.full((BLOCK_P,), float("-inf"), tl.float32)
    place = tl.full((BLOCK_P,), -1, tl.int32)
    found = 0
    for start in range(0, T, BLOCK_T):
        columns = start + tl.arange(0, BLOCK_T)
        valid = allowed_keys(token_valid, b, columns, T)
        t_rows = tokens + b * token_b + columns.to(tl.int64)[:, None] * token_t
        products = tl.zeros((BLOCK_P, BLOCK_T), tl.float32)
        for first in range(0, D, BLOCK_D):
            d = (first + tl.arange(0, BLOCK_D)).to(tl.int64)[None, :]
            left = tl.load(p_rows + d * patch_d, (rows < P)[:, None] & (d < D), 0.0)
            right = tl.load(t_rows + d * token_d, valid[:, None] & (d < D), 0.0)
            products = tl.dot(left, right.trans(), products, input_precision="ieee")
        products = tl.where(valid[None, :], products, float("-inf"))
        inside = (columns < T)[None, :]
        missing = products != products
        top = nan_max(products, 1)
        equal = tl.where((top != top)[:, None], missing, products == top[:, None]) & inside
        lowest = tl.min(tl.where(equal, columns[None, :], T), 1)
        higher = (top > best) | ((top != top) & (best == best)) | (place < 0)
        best = tl.where(higher, top, best)
        place = tl.where(higher, lowest, place)
        found += tl.sum(valid.to(tl.int32))
    tl.store(scores + b * P + rows, tl.where(found > 0, best, 0.0), rows < P)
    tl.store(ids + b * P + rows, tl.where(found > 0, place, -1).to(tl.int64), rows < P)
