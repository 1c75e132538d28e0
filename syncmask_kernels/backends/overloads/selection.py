"""Schemas and fakes of the selection room, and requests in the order of its schemas."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from syncmask_kernels.backends.request import TOKEN_SCORES, Count, ScoringQK, SyncRequest

SCHEMAS = {
    "topk_mask": (
        "(Tensor scores, Tensor? valid, Tensor? k, SymInt num, SymInt den, SymInt width,"
        " bool largest) -> (Tensor mask, Tensor ids)"
    ),
    "sync_topk_mask": (
        "(Tensor attn, Tensor? lse, Tensor? token_valid, Tensor? patch_valid,"
        " int cls_row, int token_rule, int skip_keys,"
        " Tensor? patch_k, SymInt patch_num, SymInt patch_den, SymInt patch_width,"
        " Tensor? token_k, SymInt token_num, SymInt token_den, SymInt token_width,"
        " Tensor? patch_scores, Tensor? token_scores,"
        " Tensor? patch_noise, Tensor? token_noise, Tensor? word_ids)"
        " -> (Tensor patch_mask, Tensor token_mask, Tensor patch_ids, Tensor token_ids,"
        " Tensor patch_scores, Tensor token_scores)"
    ),
    "sync_scores_qk": (
        "(Tensor q, Tensor k, Tensor? distance, Tensor? key_valid, Tensor? token_valid,"
        " Tensor? patch_valid, float scale, int cls_row, int token_rule, int skip_keys)"
        " -> (Tensor patch_scores, Tensor token_scores)"
    ),
    "max_similarity": (
        "(Tensor patches, Tensor tokens, Tensor? token_valid) -> (Tensor scores, Tensor ids)"
    ),
}


def sync_arguments(request: SyncRequest) -> tuple[Any, ...]:
    """A request in the order of the schema; cls_row is -1 for the mean over words."""
    s = request.scoring
    return (
        *(s.attn, s.lse, s.token_valid, s.patch_valid),
        s.cls_index if s.patch_score == "cls" else -1,
        TOKEN_SCORES.index(s.token_score),
        s.skip_keys,
        *request.patch_count,
        *request.token_count,
        *request[3:],
    )


def scoring_qk_arguments(scoring: ScoringQK) -> tuple[Any, ...]:
    """A request in the order of the schema; cls_row is -1 for the mean over words."""
    return (
        *scoring[:7],
        scoring.cls_index if scoring.patch_score == "cls" else -1,
        TOKEN_SCORES.index(scoring.token_score),
        scoring.skip_keys,
    )


def _fake_topk_mask(
    scores: Tensor,
    valid: Tensor | None,
    k: Tensor | None,
    num: int,
    den: int,
    width: int,
    largest: bool,
) -> tuple[Tensor, Tensor]:
    rows = scores.shape[:-1]
    return (
        scores.new_empty(scores.shape, dtype=torch.bool),
        scores.new_empty((*rows, width), dtype=torch.int64),
    )


def _fake_sync_topk_mask(
    attn: Tensor,
    lse: Tensor | None,
    token_valid: Tensor | None,
    patch_valid: Tensor | None,
    cls_row: int,
    token_rule: int,
    skip_keys: int,
    *rest: Any,
) -> tuple[Tensor, ...]:
    _, batch, _, tokens, keys = attn.shape
    patches = keys - skip_keys
    patch_count, token_count = Count(*rest[:4]), Count(*rest[4:8])
    return (
        attn.new_empty((batch, patches), dtype=torch.bool),
        attn.new_empty((batch, tokens), dtype=torch.bool),
        attn.new_empty((batch, patch_count.width), dtype=torch.int64),
        attn.new_empty((batch, token_count.width), dtype=torch.int64),
        attn.new_empty((batch, patches), dtype=torch.float32),
        attn.new_empty((batch, tokens), dtype=torch.float32),
    )


def _fake_sync_scores_qk(
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
) -> tuple[Tensor, Tensor]:
    _, batch, _, tokens, _ = q.shape
    return (
        q.new_empty((batch, k.shape[3] - skip_keys), dtype=torch.float32),
        q.new_empty((batch, tokens), dtype=torch.float32),
    )


def _fake_max_similarity(
    patches: Tensor, tokens: Tensor, token_valid: Tensor | None
) -> tuple[Tensor, Tensor]:
    return (
        patches.new_empty(patches.shape[:2], dtype=torch.float32),
        patches.new_empty(patches.shape[:2], dtype=torch.int64),
    )


FAKES = {
    "topk_mask": _fake_topk_mask,
    "sync_topk_mask": _fake_sync_topk_mask,
    "sync_scores_qk": _fake_sync_scores_qk,
    "max_similarity": _fake_max_similarity,
}
