"""Launches of the Triton selection kernels, and the operators made of them."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from syncmask_kernels.backends import overloads
from syncmask_kernels.backends.request import TOKEN_SCORES, Count, Selection, SyncRequest
from syncmask_kernels.backends.triton import INTERPRETED
from syncmask_kernels.backends.triton.launch import Launch, block, contiguous, run, strides, warps
from syncmask_kernels.backends.triton.score_kernels import score_kernel
from syncmask_kernels.backends.triton.selection_kernels import select_kernel, topk_kernel

PAIRS = 1024  # pieces of words that select_kernel compares at once
MIN_COLUMNS = 8  # 32 bytes, the least that memory hands out


def _tile(words: int, patches: int, token_rule: str | None) -> tuple[int, int, int]:
    """Words, patches and warps of one program of score_kernel."""
    block_t, per_thread = min(block(words), 32), 16
    if token_rule not in (None, "max"):
        # They normalise over words, so need them all at once, and hold a second sum.
        block_t, per_thread = block(words), 8
    block_p = min(block(patches), max(128 * per_thread // block_t, MIN_COLUMNS))
    return block_t, block_p, warps(block_t * block_p, per_thread)


def _count_args(side: str, count: Count) -> dict[str, Any]:
    given = count._replace(k=contiguous(count.k))._asdict()
    return {f"{side}{name}": value for name, value in given.items()}


def _empty_selection(values: Tensor, patch_width: int, token_width: int) -> Selection:
    _, batch, _, words, patches = values.shape

    def empty(width: int, dtype: torch.dtype) -> Tensor:
        return torch.empty((batch, width), dtype=dtype, device=values.device)

    return Selection(
        patch_mask=empty(patches, torch.bool),
        token_mask=empty(words, torch.bool),
        patch_ids=empty(patch_width, torch.int64),
        token_ids=empty(token_width, torch.int64),
        patch_scores=empty(patches, torch.float32),
        token_scores=empty(words, torch.float32),
    )


def topk_launches(
    scores: Tensor, valid: Tensor | None, *rest: Any
) -> tuple[tuple[Tensor, Tensor], list[Launch]]:
    """The outputs of `topk_mask`, not yet written, and the launches that write them."""
    count, largest = Count(*rest[:4]), rest[4]
    rows, size = scores.shape[:-1], scores.shape[-1]
    mask = torch.empty(scores.shape, dtype=torch.bool, device=scores.device)
    ids = torch.empty((*rows, count.width), dtype=torch.int64, device=scores.device)
    args = {
        "scores": scores.contiguous(),
        "valid": contiguous(valid),
        "mask": mask,
        "ids": ids,
        "N": size,
        "LARGEST": largest,
        "BLOCK": block(size),
    } | _count_args("", count)
    launch = Launch(topk_kernel, (rows.numel(),), args, warps(block(size), 8))
    return (mask, ids), [launch] if rows.numel() > 0 else []


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
    own_patch, own_token, patch_noise, token_noise, word_ids = map(contiguous, rest[8:])
    values = attn[..., skip_keys:]
    layers, batch, heads, words, patches = values.shape
    selection = _empty_selection(values, patch_count.width, token_count.width)
    if batch == 0:
        return selection, []

    rule = None if own_token is not None else TOKEN_SCORES[token_rule]
    block_t, block_p, score_warps = _tile(words, patches, rule)
    token_blocks, patch_blocks = triton.cdiv(words, block_t), triton.cdiv(patches, block_p)
    tiles = batch * token_blocks * patch_blocks

    def parts(own: Tensor | None, blocks: int, size: int) -> Tensor:
        if own is not None:
            return own.unsqueeze(1)
        if tiles == 0:
            return torch.zeros((batch, 1, size), device=attn.device)
        return torch.empty((batch, blocks, size), device=attn.device)

    patch_parts = parts(own_patch, token_blocks, patches)
    token_parts = parts(own_token, patch_blocks, words)
    both = {
        "token_valid": contiguous(token_valid),
        "patch_valid": contiguous(patch_valid),
        "patch_parts": patch_parts,
        "token_parts": token_parts,
        "T": words,
        "P": patches,
        "PATCH_RULE": None if own_patch is not None else "mean" if cls_row < 0 else "cls",
        "TOKEN_RULE": rule,
    }
    score = {
        "attn": values,
        "lse": contiguous(lse),
        "B": batch,
        "layers": layers,
        "heads": heads,
        "cls_row": cls_row,
        "BLOCK_T": block_t,
        "BLOCK_P": block_p,
    } | strides("attn", "lbhts", values)
    block_t, block_p = block(words), block(patches)
    select = {
        "patch_noise": patch_noise,
        "token_noise": token_noise,
        "word_ids": word_ids,
        "patch_blocks": patch_parts.shape[1],
        "token_blocks": token_parts.shape[1],
        "maps": layers * heads,
        "BLOCK_T": block_t,
        "BLOCK_P": block_p,
        "CHUNK": min(block_t, max(PAIRS // block_t, 1)),
    }
    select |= _count_args("patch_", patch_count)
    select |= _count_args("token_", token_count) | selection._asdict()
    select_warps = warps(max(block_t, block_p), 8)
    launches = [Launch(select_kernel, (batch, 2), both | select, select_warps)]
    if tiles > 0 and (own_patch is None or own_token is None):
        launches.insert(0, Launch(score_kernel, (tiles,), both | score, score_warps))
    return selection, launches


_topk_mask = overloads.define("topk_mask", "triton")
_sync_topk_mask = overloads.define("sync_topk_mask", "triton")


def _run_topk_mask(scores: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    outputs, launches = topk_launches(scores, *rest)
    run(launches, scores)
    return outputs


def _run_sync_topk_mask(attn: Tensor, *rest: Any) -> Selection:
    selection, launches = sync_launches(attn, *rest)
    run(launches, attn)
    return selection


for _device in ("cpu", "cuda") if INTERPRETED else ("cuda",):
    torch.library.impl("syncmask::topk_mask.triton", _device, _run_topk_mask)
    torch.library.impl("syncmask::sync_topk_mask.triton", _device, _run_sync_topk_mask)


def topk_mask(
    scores: Tensor, valid: Tensor | None, count: Count, largest: bool
) -> tuple[Tensor, Tensor]:
    """scores [..., N] -> mask [..., N], ids [..., width]."""
    return _topk_mask(scores, valid, *count, largest)


def sync_topk_mask(request: SyncRequest) -> Selection:
    """Score both sides and select both."""
    return Selection(*_sync_topk_mask(*overloads.selection.sync_arguments(request)))
