"""Masking tokens and patches, and moving the masked rows, one position after the other."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import torch
from torch import Tensor

from reference.ops.philox import philox, seed_key


def token_valid(input_ids: Tensor, special_ids: Sequence[int]) -> Tensor:
    """input_ids [B, T] -> [B, T], False at special tokens."""
    rows = [[token not in special_ids for token in row] for row in input_ids.tolist()]
    return torch.tensor(rows, dtype=torch.bool).reshape(input_ids.shape)


def mask_tokens(
    input_ids: Tensor,
    token_mask: Tensor,
    *,
    mask_id: int,
    vocab_size: int,
    seed: Sequence[int],
    special_ids: Sequence[int] = (),
    probs: Sequence[float] = (0.8, 0.1, 0.1),
    ignore_index: int = -100,
) -> tuple[Tensor, Tensor]:
    """input_ids [B, T], token_mask [B, T] -> masked_ids [B, T], labels [B, T].

    Token t of row b owns the Philox counter (t, b, 0, 0): its first word, as a fraction of 2^32,
    says what happens to the token, its second one which of the ordinary words may replace it.
    """
    ordinary = [word for word in range(vocab_size) if word != mask_id and word not in special_ids]
    mask_share, random_share, _ = (Fraction(p).limit_denominator(10**6) for p in probs)
    masked_ids = input_ids.clone()
    labels = torch.full_like(input_ids, ignore_index)
    for b, t in token_mask.nonzero().tolist():
        labels[b, t] = input_ids[b, t]
        action, draw, _, _ = philox(seed_key(list(seed)), (t, b, 0, 0))
        # floor(): the operators compare integers, not fractions.
        if action < mask_share * 2**32 // 1:
            masked_ids[b, t] = mask_id
        elif action < (mask_share + random_share) * 2**32 // 1:
            masked_ids[b, t] = ordinary[draw * len(ordinary) // 2**32]
    return masked_ids, labels


def mask_patches(patches: Tensor, patch_mask: Tensor, mask_token: Tensor) -> Tensor:
    """patches [B, P, D], patch_mask [B, P], mask_token [D] -> [B, P, D]."""
    out = patches.clone()
    for b, p in patch_mask.nonzero().tolist():
        out[b, p] = mask_token
    return out


def gather_masked(x: Tensor, ids: Tensor, fill: float = 0) -> Tensor:
    """x [B, N, ...], ids [B, K] -> [B, K, ...], `fill` where the id is -1."""
    out = x.new_full((*ids.shape, *x.shape[2:]), fill)
    for b, row in enumerate(ids.tolist()):
        for k, position in enumerate(row):
            if position >= 0:
                out[b, k] = x[b, position]
    return out


def scatter_masked(x: Tensor, ids: Tensor, positions: int) -> Tensor:
    """x [B, K, ...], ids [B, K] -> [B, positions, ...], zero where no id points."""
    out = x.new_zeros(x.shape[0], positions, *x.shape[2:])
    for b, row in enumerate(ids.tolist()):
        for k, position in enumerate(row):
            if position >= 0:
                out[b, position] = out[b, position] + x[b, k]
    return out
