"""What the public selection functions hand to a backend, validated and with a layer axis."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

PATCH_SCORES = ("mean", "cls")
TOKEN_SCORES = ("max", "text_softmax", "dual")


class Count(NamedTuple):
    """How many positions each row selects.

    ``min(k, valid)`` with `k` an int64 tensor of the rows, or with the host's `num` where `den`
    is 0; else ``(valid * num + den - 1) // den``. `width` is the width of the ids.
    """

    k: Tensor | None
    num: int
    den: int
    width: int


class Scoring(NamedTuple):
    """What the scores of both sides are computed from; see `sync_topk_mask`."""

    attn: Tensor  # [L, B, H, T, S]
    lse: Tensor | None  # [L, B, H, T]
    token_valid: Tensor | None  # [B, T] bool
    patch_valid: Tensor | None  # [B, P] bool
    patch_score: str
    token_score: str
    skip_keys: int
    cls_index: int


class ScoringQK(NamedTuple):
    """What the scores of `sync_topk_mask_qk` are computed from; see there."""

    q: Tensor  # [L, B, H, T, D]
    k: Tensor  # [L, B, H, S, D]
    distance: Tensor | None  # [L, B, H, S], weights of the keys in the patch scores
    key_valid: Tensor | None  # [B, S] bool
    token_valid: Tensor | None  # [B, T] bool
    patch_valid: Tensor | None  # [B, P] bool
    scale: float
    patch_score: str
    token_score: str
    skip_keys: int
    cls_index: int


class SyncRequest(NamedTuple):
    """The arguments of `sync_topk_mask`; see there."""

    scoring: Scoring
    patch_count: Count
    token_count: Count
    patch_scores: Tensor | None  # [B, P], the caller's own
    token_scores: Tensor | None  # [B, T]
    patch_noise: Tensor | None  # [B, P]
    token_noise: Tensor | None  # [B, T]
    word_ids: Tensor | None  # [B, T] int64


class Selection(NamedTuple):
    """What a backend returns for `sync_topk_mask`."""

    patch_mask: Tensor
    token_mask: Tensor
    patch_ids: Tensor
    token_ids: Tensor
    patch_scores: Tensor
    token_scores: Tensor
