"""Triton kernels of the attention operators.

The probabilities never leave a program. `attention_kernel` goes over the keys once and leaves the
softmax's maximum and sum of each row (and the output); `map_kernel` makes the probabilities of its
tile anew from them, head after head, and adds them up in registers. So rows may have any length,
there are programs enough for a device, and a row gets the same bits in any batch.
"""
# mypy: disable-error-code="no-untyped-def, assignment"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["layers", "heads"])
def average_kernel(
    attn, mean,
    T, P, layers, heads,
    attn_l, attn_b, attn_h, attn_t, attn_s,
    BLOCK_T: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """One tile of words and patches of `head_average`, all layers and heads."""
    patch_blocks, token_blocks = tl.cdiv(P, BLOCK_P), tl.cdiv(T, BLOCK_T)
    patches = tl.program_id(0) % patch_blocks * BLOCK_P + tl.arange(0, BLOCK_P)
    words = tl.program_id(0) // patch_blocks % token_blocks * BLOCK_T + tl.arange(0, BLOCK_T)
    b = (tl.program_id(0) // (patch_blocks * token_blocks)).to(tl.int64)
    mask = (words < T)[:, None] & (patches < P)[None, :]
    tile = attn + b * attn_b + words.to(tl.int64)[:, None] * attn_t
    tile += patches.to(tl.int64)[None, :] * attn_s
    total = tl.zeros((BLOCK_T, BLOCK_P), tl.float32)
    # The next head is on its way while this one is added up.
    ahead = tl.load(tile, mask, 0.0)
    for i in range(layers * heads):
        weights = ahead.to(tl.float32)
        layer, head = tl.cast((i + 1) // heads, tl.int64), tl.cast((i + 1) % heads, tl.int64)
        more = tl.where(i + 1 < layers * heads, mask, False)
        ahead = tl.load(tile + layer * attn_l + head * attn_h, more, 0.0)
        total += weights
    rows = mean + (b * T + words)[:, None] * P
    tl.store(rows + patches[None, :], tl.div_rn(total, tl.cast(layers * heads, tl.float32)), mask)


@triton.jit
def load_rows(
    matrix, rows, wanted, D, stride, stride_d, BLOCK_D: tl.constexpr, CHUNKS: tl.constexpr
):
    """Rows of a matrix, as CHUNKS blocks of BLOCK_D columns; 0 where a row is not wanted."""
    chunks = ()
    for c in tl.static_range(CHUNKS):
        d = c * BLOCK_D + tl.arange(0, BLOCK_D)
        block = matrix + rows.to(tl.int64)[:, None] * stride + d.to(tl.int64)[None, :] * stride_d
        # Triton has no starred elements.
        chunks = chunks + (tl.load(block, wanted[:, None] & (d < D)[None, :], 0.0),)  # noqa: RUF005
    return chunks


@triton.jit
def masked_logits(queries, keys, allowed, scale):
    """Logits [words, keys] of the chunks of both, -inf at keys that are not allowed."""
    products = tl.dot(queries[0], keys[0].trans(), input_precision="ieee")
    for c in tl.static_range(1, len(keys)):
        products = tl.dot(queries[c], keys[c].trans(), products, input_precision="ieee")
    return tl.where(allowed[None, :], products * scale, float("-inf"))


@triton.jit
def allowed_keys(key_valid, b, keys, S):
    allowed = keys < S
    if key_valid is not None:
        allowed &= tl.load(key_valid + b * S + keys, allowed, 0)
    return allowed


@triton.jit
def finite_or_zero(top):
    """The maximum of a row, such that a row without keys is exp(-inf) everywhere, not NaN."""
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def probabilities(logits, top, total):
    """Softmax of logits [words, keys] of rows with this maximum and sum; 0 in an empty row."""
    weights = tl.exp(logits - finite_or_zero(top)[:, None])
    return weights / tl.where(total == 0, 1.0, total)[:, None]


@triton.jit(do_not_specialize=["B", "heads"])
def attention_kernel(
    q, k, v, key_valid, tops, totals, output, scale,
    B, T, S, D, E, heads,
    q_l, q_b, q_h, q_t, q_d, k_l, k_b, k_h, k_s, k_d, v_l, v_b, v_h, v_s, v_e,
    BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr, CHUNKS: tl.constexpr,
    BLOCK_E: tl.constexpr,
):  # fmt: skip
    """One tile of words of a layer and head: its softmax's maxima and sums [L, B, H, T].

    With values also the output [B, H, T, E], whose block of columns is the second program id.
    """
    tiles = tl.cdiv(T, BLOCK_T)
    words = tl.program_id(0) % tiles * BLOCK_T + tl.arange(0, BLOCK_T)
    row = (tl.program_id(0) // tiles).to(tl.int64)
    layer, b, head = row // (B * heads), row // heads % B, row % heads
    queries = load_rows(
        q + layer * q_l + b * q_b + head * q_h, words, words < T, D, q_t, q_d, BLOCK_D, CHUNKS
    )
    top = tl.full((BLOCK_T,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_T,), tl.float32)
    columns = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    result = tl.zeros((BLOCK_T, BLOCK_E), tl.float32)
    for start in range(0, S, BLOCK_S):
        keys = start + tl.arange(0, BLOCK_S)
        allowed = allowed_keys(key_valid, b, keys, S)
        k_rows = k + layer * k_l + b * k_b + head * k_h
        chunks = load_rows(k_rows, keys, allowed, D, k_s, k_d, BLOCK_D, CHUNKS)
        logits = masked_logits(queries, chunks, allowed, scale)
        higher = tl.maximum(top, tl.max(logits, 1))
        shift = finite_or_zero(higher)
        weights = tl.exp(logits - shift[:, None])
        kept = tl.exp(top - shift)
        total = total * kept + tl.sum(weights, 1)
        if v is not None:
            values = v + layer * v_l + b * v_b + head * v_h + keys.to(tl.int64)[:, None] * v_s
            values += columns.to(tl.int64)[None, :] * v_e
            block = tl.load(values, (keys < S)[:, None] & (columns < E)[None, :], 0.0)
            result *= kept[:, None]
            result = tl.dot(weights.to(block.dtype), block, result, input_precision="ieee")
        top = higher
    place = row * T + words
    once = tl.where(tl.program_id(1) == 0, words < T, False)
    tl.store(tops + place, top, once)
    tl.store(totals + place, total, once)
    if v is not None:
        # A row without a valid key is 0.
        result = result / tl.where(total == 0, 1.0, total)[:, None]
        inside = (words < T)[:, None] & (columns < E)[None, :]
        tl.store(output + place[:, None] * E + columns[None, :], result, inside)


@triton.jit(do_not_specialize=["B", "layers", "heads"])
def map_kernel(
    q, k, key_valid, tops, totals, mean, scale,
    B, T, S, D, layers, heads, skip_keys,
    q_l, q_b, q_h, q_t, q_d, k_l, k_b, k_h, k_s, k_d,
    BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """One tile of words and patches of the mean map, all layers and heads."""
    P = S - skip_keys
    patch_blocks, token_blocks = tl.cdiv(P, BLOCK_S), tl.cdiv(T, BLOCK_T)
    patches = tl.program_id(0) % patch_blocks * BLOCK_S + tl.arange(0, BLOCK_S)
    words = tl.program_id(0) // patch_blocks % token_blocks * BLOCK_T + tl.arange(0, BLOCK_T)
    b = (tl.program_id(0) // (patch_blocks * token_blocks)).to(tl.int64)
    keys = skip_keys + patches
    allowed = allowed_keys(key_valid, b, keys, S)
    weights = tl.zeros((BLOCK_T, BLOCK_S), tl.float32)
    for i in range(layers * heads):
        layer, head = tl.cast(i // heads, tl.int64), tl.cast(i % heads, tl.int64)
        q_rows, k_rows = q + layer * q_l + b * q_b + head * q_h, k + layer * k_l + b * k_b
        k_rows += head * k_h
        queries = load_rows(q_rows, words, words < T, D, q_t, q_d, BLOCK_D, CHUNKS)
        chunks = load_rows(k_rows, keys, allowed, D, k_s, k_d, BLOCK_D, CHUNKS)
        logits = masked_logits(queries, chunks, allowed, scale)
        row = ((layer * B + b) * heads + head) * T
        top = tl.load(tops + row + words, words < T, 0.0)
        weights += probabilities(logits, top, tl.load(totals + row + words, words < T, 0.0))
    inside = (words < T)[:, None] & (patches < P)[None, :]
    rows = mean + (b * T + words)[:, None] * P
    tl.store(rows + patches[None, :], weights / tl.cast(layers * heads, tl.float32), inside)
