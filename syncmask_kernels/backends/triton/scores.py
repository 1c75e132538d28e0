"""Launches that score patches and words by queries and keys, and the operators made of them."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from syncmask_kernels.backends import overloads
from syncmask_kernels.backends.request import TOKEN_SCORES, ScoringQK
from syncmask_kernels.backends.triton import INTERPRETED
from syncmask_kernels.backends.triton.attention import (
    MIN_DOT,
    attention_launches,
    qk_args,
    tiles,
)
from syncmask_kernels.backends.triton.launch import Launch, block, contiguous, run, strides, warps
from syncmask_kernels.backends.triton.score_kernels import score_qk_kernel, similarity_kernel
from syncmask_kernels.backends.triton.selection_kernels import reduce_kernel


def score_qk_launches(
    q: Tensor,
    k: Tensor,
    distance: Tensor | None,
    key_valid: Tensor | None,
    token_valid: Tensor | None,
    patch_valid: Tensor | None,
    scale: float,
    cls_row: int,
    token_rule: int,
    skip_keys: int,
) -> tuple[tuple[Tensor, Tensor], list[Launch]]:
    """The scores of patches and words, not yet written, and the launches that write them."""
    layers, batch, heads, words, _ = q.shape
    patches = k.shape[3] - skip_keys
    if batch * words * patches == 0:
        return (
            torch.zeros((batch, patches), device=q.device),
            torch.zeros((batch, words), device=q.device),
        ), []
    scores = (
        torch.empty((batch, patches), device=q.device),
        torch.empty((batch, words), device=q.device),
    )
    rule = TOKEN_SCORES[token_rule]
    blocks = tiles(q)
    if rule != "max":
        # They normalise over words, so need them all at once.
        block_t = max(block(words), MIN_DOT)
        blocks = blocks._replace(BLOCK_T=block_t, BLOCK_S=max(1024 // block_t, MIN_DOT))
    token_blocks = triton.cdiv(words, blocks.BLOCK_T)
    patch_blocks = triton.cdiv(patches, blocks.BLOCK_S)
    both = {
        "token_valid": contiguous(token_valid),
        "patch_parts": torch.empty((batch, token_blocks, patches), device=q.device),
        "token_parts": torch.empty((batch, patch_blocks, words), device=q.device),
        "T": words,
        "PATCH_RULE": "mean" if cls_row < 0 else "cls",
        "TOKEN_RULE": rule,
    }
    sums, _, launches = attention_launches(q, k, None, key_valid, scale)
    score = qk_args(q, k, key_valid, sums, scale) | both | blocks._asdict()
    score |= {
        "distance": contiguous(distance),
        "patch_valid": contiguous(patch_valid),
        "layers": layers,
        "cls_row": cls_row,
        "skip_keys": skip_keys,
    }
    reduce = both | {
        "patch_scores": scores[0],
        "token_scores": scores[1],
        "patch_blocks": token_blocks,
        "token_blocks": patch_blocks,
        "P": patches,
        "maps": layers * heads,
        "BLOCK_T": block(words),
        "BLOCK_P": block(patches),
    }
    grid = (batch * token_blocks * patch_blocks,)
    return scores, [
        *launches,
        Launch(score_qk_kernel, grid, score, 8 if q.dtype == torch.float32 else 4, True),
        Launch(reduce_kernel, (batch, 2), reduce, warps(block(max(words, patches)), 8)),
    ]


def similarity_launches(
    patches: Tensor, tokens: Tensor, token_valid: Tensor | None
) -> tuple[tuple[Tensor, Tensor], list[Launch]]:
    """Scores and ids of `max_similarity`, not yet written, and the launches that write them."""
    batch, count, dim = patches.shape
    scores = torch.empty((batch, count), device=patches.device)
    ids = torch.empty((batch, count), dtype=torch.int64, device=patches.device)
    columns = 16 if patches.dtype == torch.float32 else 64
    block_p = min(max(block(count), MIN_DOT), 32)
    args = {
        "patches": patches,
        "tokens": tokens,
        "token_valid": contiguous(token_valid),
        "scores": scores,
        "ids": ids,
        "P": count,
        "T": tokens.shape[1],
        "D": dim,
        "BLOCK_P": block_p,
        "BLOCK_T": min(max(block(tokens.shape[1]), MIN_DOT), 32),
        "BLOCK_D": min(max(block(dim), MIN_DOT), columns),
    }
    args |= strides("patch", "bpd", patches) | strides("token", "btd", tokens)
    grid = (batch * triton.cdiv(count, block_p),)
    launches = [Launch(similarity_kernel, grid, args, 8, True)] if scores.numel() > 0 else []
    return (scores, ids), launches


_sync_scores_qk = overloads.define("sync_scores_qk", "triton")
_max_similarity = overloads.define("max_similarity", "triton")


def _run_sync_scores_qk(q: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    scores, launches = score_qk_launches(q, *rest)
    run(launches, q)
    return scores


def _run_max_similarity(patches: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    best, launches = similarity_launches(patches, *rest)
    run(launches, patches)
    return best


for _device in ("cpu", "cuda") if INTERPRETED else ("cuda",):
    torch.library.impl("syncmask::sync_scores_qk.triton", _device, _run_sync_scores_qk)
    torch.library.impl("syncmask::max_similarity.triton", _device, _run_max_similarity)


def sync_scores_qk(scoring: ScoringQK) -> tuple[Tensor, Tensor]:
    """The scores of patches [B, P] and words [B, T]."""
    patch, token = _sync_scores_qk(*overloads.selection.scoring_qk_arguments(scoring))
    return patch, token


def max_similarity(
    patches: Tensor, tokens: Tensor, token_valid: Tensor | None
) -> tuple[Tensor, Tensor]:
    """patches [B, P, D], tokens [B, T, D] -> the largest inner product [B, P] and its token."""
    scores, ids = _max_similarity(patches, tokens, token_valid)
    return scores, ids
