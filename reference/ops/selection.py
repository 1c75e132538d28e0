"""Selection by sorting the positions of one row after the other, and the scores it goes by."""

from __future__ import annotations

import math
from fractions import Fraction

import torch
from torch import Tensor

from reference.ops.attention import head_average


def wanted(available: int, k: int | None, ratio: float | None) -> int:
    """How many of `available` positions a row selects."""
    if k is not None:
        return min(k, available)
    assert ratio is not None
    return math.ceil(Fraction(ratio).limit_denominator(10**6) * available)


def in_order(scores: list[float], valid: list[bool], largest: bool = True) -> list[int]:
    """The valid positions in the order of (NaN, -score, index)."""
    sign = -1.0 if largest else 1.0

    def place(i: int) -> tuple[bool, float, int]:
        nan = math.isnan(scores[i])
        return nan, 0.0 if nan else sign * scores[i], i

    return sorted((i for i in range(len(scores)) if valid[i]), key=place)


def topk_mask(
    scores: Tensor,
    *,
    k: int | list[int] | None = None,
    ratio: float | None = None,
    valid: Tensor | None = None,
    largest: bool = True,
) -> Tensor:
    """scores [B, N] -> mask [B, N]."""
    valid = torch.ones_like(scores, dtype=torch.bool) if valid is None else valid
    mask = torch.zeros_like(valid)
    for b in range(scores.shape[0]):
        allowed = valid[b].tolist()
        count = wanted(sum(allowed), k[b] if isinstance(k, list) else k, ratio)
        mask[b, in_order(scores[b].tolist(), allowed, largest)[:count]] = True
    return mask


def word_mask(
    scores: Tensor,
    word_ids: Tensor,
    *,
    k: int | None = None,
    ratio: float | None = None,
    valid: Tensor,
) -> Tensor:
    """scores, word_ids, valid [B, T] -> mask [B, T]: the best words, each with all its pieces."""
    mask = torch.zeros_like(valid)
    for b in range(scores.shape[0]):
        words: dict[int, list[int]] = {}
        for t in range(scores.shape[1]):
            if valid[b, t] and word_ids[b, t] >= 0:
                words.setdefault(int(word_ids[b, t]), []).append(t)
        pieces = list(words.values())  # in the order of their first pieces
        row = scores[b].tolist()
        best = [row[in_order(row, [t in word for t in range(len(row))])[0]] for word in pieces]
        count = wanted(len(pieces), k, ratio)
        for i in in_order(best, [True] * len(best))[:count]:
            mask[b, pieces[i]] = True
    return mask


def ids_of(mask: Tensor, width: int) -> Tensor:
    """mask [B, N] -> ids [B, width], ascending, padded with -1."""
    rows = [[i for i, chosen in enumerate(row) if chosen][:width] for row in mask.tolist()]
    padded = [row + [-1] * (width - len(row)) for row in rows]
    return torch.tensor(padded, dtype=torch.int64).reshape(mask.shape[0], width)


def vote_keywords(attn_row: Tensor, votes: int, keep: int, valid: Tensor | None = None) -> Tensor:
    """attn_row [B, H, T], valid [B, T] -> ids [B, keep]: each head votes, the most voted stay."""
    batch, _, words = attn_row.shape
    valid = torch.ones(batch, words, dtype=torch.bool) if valid is None else valid
    kept = torch.zeros(batch, words, dtype=torch.bool)
    for b in range(batch):
        ballots = [0] * words
        for head in attn_row[b].tolist():
            for word in in_order(head, valid[b].tolist())[:votes]:
                ballots[word] += 1
        voted = [count > 0 for count in ballots]
        kept[b, in_order([float(count) for count in ballots], voted)[:keep]] = True
    return ids_of(kept, keep)


def max_similarity(patches: Tensor, tokens: Tensor, token_valid: Tensor | None = None) -> Tensor:
    """patches [B, P, D], tokens [B, T, D] -> [B, P]; 0 in a row without a valid token."""
    scores = patches.new_zeros(patches.shape[:2])
    for b in range(patches.shape[0]):
        words = tokens[b] if token_valid is None else tokens[b][token_valid[b]]
        if len(words) > 0:
            scores[b] = torch.einsum("pd,td->pt", patches[b], words).max(dim=-1).values
    return scores


def patch_scores(
    layers: list[Tensor],
    token_valid: Tensor,
    rule: str = "mean",
    *,
    patch_valid: Tensor | None = None,
    cls_index: int = 0,
    skip_keys: int = 1,
) -> Tensor:
    """Layers of attn [B, H, T, S] -> [B, P]."""
    mean = _without_excluded(head_average(layers, skip_keys), patch_valid)
    if rule == "cls":
        return mean[:, cls_index]
    rows = []
    for b in range(mean.shape[0]):
        words = mean[b][token_valid[b]]
        rows.append(words.sum(dim=0) / max(len(words), 1))
    return torch.stack(rows)


def token_scores(
    layers: list[Tensor],
    token_valid: Tensor,
    rule: str = "max",
    *,
    lse: list[Tensor] | None = None,
    patch_valid: Tensor | None = None,
    skip_keys: int = 1,
) -> Tensor:
    """Layers of attn [B, H, T, S] (and their lse [B, H, T]) -> [B, T], 0 at invalid words."""
    planes = []
    for i, layer in enumerate(layers):
        for head in range(layer.shape[1]):
            attn = _without_excluded(layer[:, head, :, skip_keys:], patch_valid)
            if rule == "max":
                planes.append(attn)
                continue
            row_factor = torch.ones(()) if lse is None else lse[i][:, head, :, None].exp()
            weighs = token_valid[:, :, None] & (row_factor != 0)
            weights = torch.where(weighs, attn * row_factor, 0.0)
            total = weights.sum(dim=1, keepdim=True)
            share = weights / torch.where(total == 0, 1.0, total)
            planes.append(attn * share if rule == "dual" else share)
    mean = torch.stack(planes).sum(dim=0) / len(planes)
    scores = mean.sum(dim=-1) if rule == "dual" else mean.amax(dim=-1)
    return torch.where(token_valid, scores, 0.0)


def value_weighted(attn: Tensor, v: Tensor, patch_valid: Tensor, skip_keys: int = 1) -> Tensor:
    """attn [B, H, T, S] times how far each patch's value, of v [B, H, S, D], lies from the mean."""
    weighted = torch.zeros_like(attn)
    for b in range(v.shape[0]):
        for head in range(v.shape[1]):
            patches = v[b, head, skip_keys:]
            centre = patches[patch_valid[b]].mean(dim=0)
            distance = (patches - centre).pow(2).sum(dim=-1).sqrt()
            weighted[b, head, :, skip_keys:] = attn[b, head, :, skip_keys:] * distance
    return weighted


def _without_excluded(attn: Tensor, patch_valid: Tensor | None) -> Tensor:
    return attn if patch_valid is None else torch.where(patch_valid[:, None], attn, 0.0)
