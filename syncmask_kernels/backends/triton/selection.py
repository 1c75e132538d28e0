"""Triton kernels of the selection operators, and their launches.

`sync_topk_mask` takes two launches: `score_kernel` reads the attention once and leaves the partial
scores of its tiles; `select_kernel` adds them up in a fixed order and selects, one program per row
and side. No atomics; the blocks depend on T and P alone, so a row gets the same bits in any batch.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from syncmask_kernels.backends import overloads
from syncmask_kernels.backends.request import TOKEN_SCORES, Count, Selection, SyncRequest
from syncmask_kernels.backends.triton import INTERPRETED
from syncmask_kernels.backends.triton.launch import Launch, run

TILE = 2048  # probabilities a program of score_kernel holds per head, 16 a thread
MIN_COLUMNS = 8  # one sector of 32 bytes
SCORE_WARPS = 4
STRIDES = ("stride_l", "stride_b", "stride_h", "stride_t", "stride_p")
# What may change from call to call must not compile anew.
COUNTS = ["num", "den", "width", "patch_num", "patch_den", "patch_width", "token_num", "token_den"]
COUNTS += ["token_width", "cls_row"]


@triton.jit
def nan_max(x, axis: tl.constexpr):
    # tl.max drops NaN.
    return tl.max(tl.where(x != x, float("-inf"), x), axis) + tl.sum(
        tl.where(x != x, x, 0.0), axis
    )


@triton.jit(do_not_specialize=COUNTS)
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
    for layer in range(layers):
        for head in range(heads):
            step = tl.cast(layer, tl.int64) * stride_l + tl.cast(head, tl.int64) * stride_h
            weights = tl.load(tile + step, mask, 0.0).to(tl.float32)
            if PATCH_RULE is not None or TOKEN_RULE == "max":
                mean += weights
            if TOKEN_RULE == "text_softmax" or TOKEN_RULE == "dual":
                slope = counted.to(tl.float32)
                if lse is not None:
                    rows = ((tl.cast(layer, tl.int64) * B + b) * heads + head) * T
                    logits = tl.load(lse + rows + words, counted, float("-inf")).to(tl.float32)
                    top = nan_max(logits, 0)
                    slope = tl.exp(logits - tl.where(top == float("-inf"), 0.0, top))
                lifted = tl.where(slope[:, None] == 0, 0.0, weights * slope[:, None])
                total = tl.sum(lifted, 0)
                share = lifted / tl.where(total == 0, 1.0, total)[None, :]
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
            scores = tl.maximum(scores, other, propagate_nan=tl.PropagateNan.ALL)
        else:
            scores += other
    scores = tl.div_rn(scores, divisor)
    if valid is not None:
        inside &= tl.load(valid + row * N + columns, inside, 0)
    if word_ids is not None:
        inside &= tl.load(word_ids + row * N + columns, inside, -1) >= 0
    noisy = scores
    if noise is not None:
        noisy += tl.load(noise + row * N + columns, inside, 0.0).to(tl.float32)
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
    available = tl.sum(candidates.to(tl.int64))
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
    parts, blocks, divisor, valid, noise, word_ids, k, num, den, width, scores_out, mask_out, ids_out,
    row, N, COMBINE_MAX: tl.constexpr, LARGEST: tl.constexpr, BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
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


@triton.jit(do_not_specialize=COUNTS)
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


@triton.jit(do_not_specialize=COUNTS)
def select_kernel(
    patch_parts, patch_blocks, patch_valid, patch_noise, patch_k, patch_num, patch_den, patch_width,
    token_parts, token_blocks, token_valid, token_noise, token_k, token_num, token_den, token_width,
    word_ids, patch_scores, patch_mask, patch_ids, token_scores, token_mask, token_ids,
    T, P, heads,
    PATCH_RULE: tl.constexpr, TOKEN_RULE: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_P: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One row and side per program: patches where the second program id is 0, else words."""
    row = tl.program_id(0).to(tl.int64)
    divisor = tl.cast(heads, tl.float32)
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


def _block(size: int) -> int:
    return triton.next_power_of_2(max(size, 1))


def _select_warps(block: int) -> int:
    return min(max(block // 256, 1), 16)


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _count_args(side: str, count: Count, size: int) -> dict[str, Any]:
    k, num, den, width = count
    # A fixed count beyond the row means the whole row; so the integer stays small.
    num = min(num, size) if den == 0 else num
    return {f"{side}k": _contiguous(k), f"{side}num": num, f"{side}den": den, f"{side}width": width}


def topk_launches(
    scores: Tensor, valid: Tensor | None, *count_and_largest: Any
) -> tuple[tuple[Tensor, Tensor], list[Launch]]:
    """The outputs of `topk_mask`, not yet written, and the launches that write them."""
    count, largest = Count(*count_and_largest[:4]), count_and_largest[4]
    rows, size = scores.shape[:-1].numel(), scores.shape[-1]
    mask = torch.empty(scores.shape, dtype=torch.bool, device=scores.device)
    ids = mask.new_empty((*scores.shape[:-1], count.width), dtype=torch.int64)
    block = _block(size)
    args = {
        **{"scores": scores.contiguous(), "valid": _contiguous(valid)},
        **_count_args("", count, size),
        **{"mask": mask, "ids": ids, "N": size, "LARGEST": largest, "BLOCK": block},
    }
    launch = Launch(topk_kernel, (rows,), args, _select_warps(block))
    return (mask, ids), [launch] if rows > 0 else []


def sync_launches(
    attn: Tensor,
    lse: Tensor | None,
    token_valid: Tensor | None,
    patch_valid: Tensor | None,
    cls_row: int,
    token_rule: int,
    skip_keys: int,
    *rest: Any,
) -> tuple[Selection, list[Launch]]:
    """The outputs of `sync_topk_mask`, not yet written, and the launches that write them."""
    patch_count, token_count = Count(*rest[:4]), Count(*rest[4:8])
    own_patch, own_token, patch_noise, token_noise, word_ids = map(_contiguous, rest[8:])
    token_valid, patch_valid = _contiguous(token_valid), _contiguous(patch_valid)
    layers, batch, heads, tokens, keys = attn.shape
    patches = keys - skip_keys

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=attn.device)

    selection = Selection(
        patch_mask=empty(batch, patches, dtype=torch.bool),
        token_mask=empty(batch, tokens, dtype=torch.bool),
        patch_ids=empty(batch, patch_count.width, dtype=torch.int64),
        token_ids=empty(batch, token_count.width, dtype=torch.int64),
        patch_scores=empty(batch, patches),
        token_scores=empty(batch, tokens),
    )
    if batch == 0:
        return selection, []

    rules = {
        "PATCH_RULE": None if own_patch is not None else "mean" if cls_row < 0 else "cls",
        "TOKEN_RULE": None if own_token is not None else TOKEN_SCORES[token_rule],
    }
    # A rule that normalises over words needs them all in one tile.
    block_t = _block(tokens)
    if rules["TOKEN_RULE"] in (None, "max"):
        block_t = min(block_t, 32)
    block_p = min(_block(patches), max(TILE // block_t, MIN_COLUMNS))
    token_blocks, patch_blocks = triton.cdiv(tokens, block_t), triton.cdiv(patches, block_p)
    tiles = batch * token_blocks * patch_blocks

    def parts(own: Tensor | None, blocks: int, size: int) -> Tensor:
        if own is not None:
            return own.unsqueeze(1)
        return empty(batch, blocks, size) if tiles > 0 else torch.zeros((batch, 1, size), device=attn.device)

    patch_parts = parts(own_patch, token_blocks, patches)
    token_parts = parts(own_token, patch_blocks, tokens)
    values = attn[..., skip_keys:]
    shared = {
        **{"token_valid": token_valid, "patch_valid": patch_valid},
        **{"patch_parts": patch_parts, "token_parts": token_parts, "T": tokens, "P": patches},
        **rules,
    }
    score = {
        **shared,
        **{"attn": values, "lse": _contiguous(lse), "cls_row": cls_row},
        **{"B": batch, "layers": layers, "heads": heads},
        **dict(zip(STRIDES, values.stride(), strict=True)),
        **{"BLOCK_T": block_t, "BLOCK_P": block_p},
    }
    block_t, block_p = _block(tokens), _block(patches)
    select = {
        **shared,
        **selection._asdict(),
        **_count_args("patch_", patch_count, patches),
        **_count_args("token_", token_count, tokens),
        **{"patch_noise": patch_noise, "token_noise": token_noise, "word_ids": word_ids},
        **{"patch_blocks": patch_parts.shape[1], "token_blocks": token_parts.shape[1]},
        **{"heads": layers * heads, "BLOCK_T": block_t, "BLOCK_P": block_p},
        "CHUNK": min(block_t, max(TILE // block_t, 1)),
    }
    launches = [Launch(select_kernel, (batch, 2), select, _select_warps(max(block_t, block_p)))]
    if tiles > 0 and rules != {"PATCH_RULE": None, "TOKEN_RULE": None}:
        launches.insert(0, Launch(score_kernel, (tiles,), score, SCORE_WARPS))
    return selection, launches


_DEVICES = ("cpu", "cuda") if INTERPRETED else "cuda"
_topk_op = overloads.define("topk_mask", "triton")
_sync_op = overloads.define("sync_topk_mask", "triton")


@torch.library.impl("syncmask::topk_mask.triton", _DEVICES)
def _topk_impl(scores: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    outputs, launches = topk_launches(scores, *rest)
    run(launches, scores)
    return outputs


@torch.library.impl("syncmask::sync_topk_mask.triton", _DEVICES)
def _sync_impl(attn: Tensor, *rest: Any) -> Selection:
    selection, launches = sync_launches(attn, *rest)
    run(launches, attn)
    return selection


def topk_mask(
    scores: Tensor, valid: Tensor | None, count: Count, largest: bool
) -> tuple[Tensor, Tensor]:
    """scores [..., N] -> mask [..., N], ids [..., width]."""
    return _topk_op(scores, valid, *count, largest)


def sync_topk_mask(request: SyncRequest) -> Selection:
    """Score both sides and select both."""
    return Selection(*_sync_op(*overloads.sync_arguments(request)))
