"""Scores and exact top-k selection in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from syncmask_kernels.backends.eager.attention import (
    attention_logits,
    head_average,
    product,
    softmax,
)
from syncmask_kernels.backends.request import Count, Scoring, ScoringQK, Selection, SyncRequest


def order_keys(scores: Tensor, valid: Tensor | None, largest: bool) -> Tensor:
    """Integers in the order of (excluded, NaN, -score): the larger the earlier.

    The bits of a float, with the magnitude flipped where it is negative, order as the float does;
    no float has the two lowest integers, which serve for NaN and for excluded positions. Unlike
    floats, integers keep denormals apart where the processor flushes them to zero.
    """
    if scores.dtype != torch.float64:
        scores = scores.float()
    signed = (scores if largest else -scores).resolve_neg()
    bits = signed.view(torch.int64 if scores.dtype == torch.float64 else torch.int32)
    info = torch.iinfo(bits.dtype)
    bits = bits.masked_fill(bits == info.min, 0)  # -0.0 equals 0.0
    keys = torch.where(bits < 0, bits ^ info.max, bits).masked_fill(signed.isnan(), info.min + 1)
    return keys if valid is None else keys.masked_fill(~valid, info.min)


def row_counts(valid: Tensor, count: Count) -> Tensor:
    """valid [..., N] -> how many positions each row selects [..., 1]."""
    available = valid.sum(dim=-1, keepdim=True)
    if count.k is not None:
        return torch.minimum(count.k.unsqueeze(-1).clamp(min=0), available)
    if count.den == 0:
        return available.clamp(max=count.num)
    return (available * count.num + (count.den - 1)) // count.den


def ids_of(mask: Tensor, width: int) -> Tensor:
    """mask [..., N] -> ids [..., width] of the True positions, ascending, padded with -1."""
    slots = torch.where(mask, mask.cumsum(dim=-1) - 1, width).clamp(max=width)
    positions = torch.arange(mask.shape[-1], device=mask.device).expand(mask.shape)
    ids = torch.full((*mask.shape[:-1], width + 1), -1, device=mask.device)
    return ids.scatter(-1, slots, positions)[..., :width]


def first_of(keys: Tensor, counts: Tensor) -> Tensor:
    """keys [..., N], counts [..., 1] -> mask of the largest keys, the lower index first."""
    order = keys.sort(dim=-1, descending=True, stable=True).indices
    ranks = torch.arange(keys.shape[-1], device=keys.device).expand(keys.shape)
    mask = torch.zeros(keys.shape, dtype=torch.bool, device=keys.device)
    return mask.scatter(-1, order, ranks < counts)


def topk_mask(
    scores: Tensor, valid: Tensor | None, count: Count, largest: bool
) -> tuple[Tensor, Tensor]:
    """scores [..., N] -> mask [..., N], ids [..., width]."""
    available = torch.ones_like(scores, dtype=torch.bool) if valid is None else valid
    mask = first_of(order_keys(scores, valid, largest), row_counts(available, count))
    return mask, ids_of(mask, count.width)


def word_mask(scores: Tensor, valid: Tensor, word_ids: Tensor, count: Count) -> Tensor:
    """Select whole words: the key of a word is that of its best piece, counts are of words."""
    valid = valid & (word_ids >= 0)
    same = word_ids.unsqueeze(-1) == word_ids.unsqueeze(-2)
    same = same & valid.unsqueeze(-1) & valid.unsqueeze(-2)
    first = valid & ~same.tril(-1).any(dim=-1)  # the piece that stands for its word
    keys = order_keys(scores, valid, True)
    if keys.shape[-1] == 0:
        return first
    lowest = torch.iinfo(keys.dtype).min
    best = torch.where(same, keys.unsqueeze(-2), lowest).amax(dim=-1).masked_fill(~first, lowest)
    chosen = first_of(best, row_counts(first, count))
    return (same & chosen.unsqueeze(-2)).any(dim=-1)


def _token_valid(scoring: Scoring) -> Tensor:
    if scoring.token_valid is not None:
        return scoring.token_valid
    size = (scoring.attn.shape[1], scoring.attn.shape[3])
    return torch.ones(size, dtype=torch.bool, device=scoring.attn.device)


def _patch_mean(scoring: Scoring) -> Tensor:
    """The head mean [B, T, P]; 0 at excluded patches."""
    mean = head_average(scoring.attn, scoring.skip_keys)
    if scoring.patch_valid is None:
        return mean
    return mean.masked_fill(~scoring.patch_valid.unsqueeze(1), 0.0)


def _listed(scoring: Scoring) -> Tensor:
    """The words and patches that are scored, [B, 1, T, P] or [B, 1, T, 1]."""
    listed = _token_valid(scoring)[:, None, :, None]
    if scoring.patch_valid is None:
        return listed
    return listed & scoring.patch_valid[:, None, None, :]


def _column_share(attn: Tensor, lse: Tensor | None, listed: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax over the listed words of the logits ``log attn + lse``, [L, B, H, T, P].

    Also the derivative of each unnormalised weight by `attn`, divided by its column's total. A
    patch that no word looks at (all zero) is shared by none.
    """
    slope = listed.to(attn.dtype)
    if lse is not None:
        # A factor common to all words cancels, so the softmax of lse serves for its exponential.
        valid = listed.any(dim=-1)
        lse = lse.to(attn.dtype).masked_fill(~valid, float("-inf"))
        slope = softmax(lse).unsqueeze(-1)
    weights = torch.where(slope == 0, 0.0, attn * slope)
    total = weights.sum(dim=-2, keepdim=True)
    total = total.masked_fill(total == 0, 1.0)
    return weights / total, slope / total


def _wide_attn(scoring: Scoring, listed: Tensor) -> Tensor:
    """The probabilities of the patches in the type of the scores; 0 where they are not listed."""
    attn = scoring.attn[..., scoring.skip_keys :]
    attn = attn.to(torch.promote_types(attn.dtype, torch.float32))
    return attn.masked_fill(~listed, 0.0)


def sync_scores(scoring: Scoring, share: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The scores of patches [B, P] and words [B, T]; excluded positions score 0.

    `share` [L, B, H, T, P]: of each word in a patch, where the caller knows better than attention.
    """
    valid = _token_valid(scoring)
    mean = _patch_mean(scoring)
    if scoring.patch_score == "cls":
        patch = mean[:, scoring.cls_index]
    else:
        words = valid.sum(dim=-1, keepdim=True).clamp(min=1)
        patch = mean.masked_fill(~valid.unsqueeze(-1), 0.0).sum(dim=1) / words
    per_patch = mean
    if scoring.token_score != "max":
        listed = _listed(scoring)
        attn = _wide_attn(scoring, listed)
        if share is None:
            share, _ = _column_share(attn, scoring.lse, listed)
        per_patch = (share * attn if scoring.token_score == "dual" else share).mean(dim=(0, 2))
    if scoring.token_score == "dual":
        token = per_patch.sum(dim=-1)
    elif mean.shape[-1] == 0:
        token = mean.sum(dim=-1)
    else:
        token = per_patch.max(dim=-1).values
    return patch, token.masked_fill(~valid, 0.0)


def sync_scores_backward(
    scoring: Scoring, patch_grad: Tensor, token_grad: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Gradients of `sync_scores` by attn and lse, for the backends without autograd of their own.

    With share n = w / Σ w over words, a gradient g of n reaches w as (g - Σ n g) / Σ w.
    """
    layers, _, heads, _, _ = scoring.attn.shape
    valid = _token_valid(scoring)
    mean = _patch_mean(scoring)
    token_grad = token_grad.masked_fill(~valid, 0.0).unsqueeze(-1) / (layers * heads)
    patch_grad = patch_grad / (layers * heads)
    grad_mean = torch.zeros_like(mean)
    if scoring.patch_score == "cls":
        grad_mean[:, scoring.cls_index] = patch_grad
    else:
        words = valid.sum(dim=-1, keepdim=True).clamp(min=1)
        grad_mean += (patch_grad / words).unsqueeze(1) * valid.unsqueeze(-1)
    grad_lse = None if scoring.lse is None else torch.zeros_like(scoring.lse)
    if scoring.token_score == "max" and mean.shape[-1] > 0:
        best = mean.max(dim=-1, keepdim=True).indices
        grad_mean.scatter_add_(-1, best, token_grad)
    grad = grad_mean[None, :, None].expand(*scoring.attn.shape[:-1], mean.shape[-1])
    if scoring.token_score != "max":
        listed = _listed(scoring)
        attn = _wide_attn(scoring, listed)
        share, slope = _column_share(attn, scoring.lse, listed)
        if scoring.token_score == "dual":
            grad_share = token_grad[None, :, None] * attn
            grad = grad + token_grad[None, :, None] * share
        else:
            picked = torch.zeros_like(mean)
            if mean.shape[-1] > 0:
                best = share.mean(dim=(0, 2)).max(dim=-1, keepdim=True).indices
                picked.scatter_(-1, best, token_grad)
            grad_share = picked[None, :, None].expand_as(share)
        centred = grad_share - (share * grad_share).sum(dim=-2, keepdim=True)
        grad = grad + slope * centred
        if scoring.lse is not None:
            grad_lse = (share * centred).sum(dim=-1).to(scoring.lse.dtype)
    if scoring.patch_valid is not None:
        grad = grad.masked_fill(~scoring.patch_valid[:, None, None, :], 0.0)
    grad = torch.nn.functional.pad(grad, (scoring.skip_keys, 0))
    return grad.to(scoring.attn.dtype), grad_lse


def value_distance(values: Tensor, patch_valid: Tensor | None, skip_keys: int) -> Tensor:
    """values [L, B, H, S, D] -> ``‖v_p - v̄‖`` [L, B, H, S], v̄ the mean over valid patches.

    The skipped keys are no patches and get 0.
    """
    patches = values[..., skip_keys:, :]
    patches = patches.to(torch.promote_types(values.dtype, torch.float32))
    if patch_valid is None:
        mean = patches.mean(dim=-2, keepdim=True)
    else:
        listed = patch_valid[:, None, :, None]
        total = patches.masked_fill(~listed, 0.0).sum(dim=-2, keepdim=True)
        mean = total / listed.sum(dim=-2, keepdim=True).clamp(min=1)
    distance = torch.linalg.vector_norm(patches - mean, dim=-1)
    return torch.nn.functional.pad(distance, (skip_keys, 0))


def sync_topk_mask(request: SyncRequest) -> Selection:
    """Score both sides and select both."""
    patch_scores, token_scores = request.patch_scores, request.token_scores
    if patch_scores is None or token_scores is None:
        patch, token = sync_scores(request.scoring)
        patch_scores = patch if patch_scores is None else patch_scores
        token_scores = token if token_scores is None else token_scores
    for_patches = _with_noise(patch_scores, request.patch_noise)
    for_tokens = _with_noise(token_scores, request.token_noise)
    patch_mask, patch_ids = topk_mask(
        for_patches, request.scoring.patch_valid, request.patch_count, True
    )
    if request.word_ids is None:
        token_mask, token_ids = topk_mask(
            for_tokens, request.scoring.token_valid, request.token_count, True
        )
    else:
        token_mask = word_mask(
            for_tokens, _token_valid(request.scoring), request.word_ids, request.token_count
        )
        token_ids = ids_of(token_mask, request.token_count.width)
    return Selection(patch_mask, token_mask, patch_ids, token_ids, patch_scores, token_scores)


def _with_noise(scores: Tensor, noise: Tensor | None) -> Tensor:
    scores = scores.detach()
    return scores if noise is None else scores + noise.to(scores.dtype)


def sync_scores_qk(scoring: ScoringQK) -> tuple[Tensor, Tensor]:
    """`sync_scores` from queries and keys."""
    q = scoring.q
    if scoring.token_valid is not None:  # other rows may hold anything, which reaches no gradient
        read = scoring.token_valid.clone()
        if scoring.patch_score == "cls":
            read[:, scoring.cls_index] = True
        q = q.masked_fill(~read[:, None, :, None], 0.0)
    logits = attention_logits(q, scoring.k, scoring.key_valid, scoring.scale)
    attn = softmax(logits)
    of_attn = Scoring(
        attn,
        None,
        scoring.token_valid,
        scoring.patch_valid,
        scoring.patch_score,
        scoring.token_score,
        scoring.skip_keys,
        scoring.cls_index,
    )
    share = None
    if scoring.token_score != "max":
        # Of the logits themselves: a probability can be 0 where the word is still the patch's best.
        columns = logits[..., scoring.skip_keys :].masked_fill(~_listed(of_attn), float("-inf"))
        share = softmax(columns.mT).mT
    patch, token = sync_scores(of_attn, share)
    if scoring.distance is not None:
        weighted = attn * scoring.distance.unsqueeze(-2)
        patch, _ = sync_scores(of_attn._replace(attn=weighted, token_score="max"))
    return patch, token


def max_similarity(
    patches: Tensor, tokens: Tensor, token_valid: Tensor | None
) -> tuple[Tensor, Tensor]:
    """patches [B, P, D], tokens [B, T, D] -> the largest inner product [B, P] and its token's id.

    A row without valid tokens has scores 0 and ids -1.
    """
    wide = torch.promote_types(patches.dtype, torch.float32)
    if token_valid is not None:
        tokens = tokens.masked_fill(~token_valid.unsqueeze(-1), 0.0)
    similarity = product(patches.to(wide), tokens.to(wide).mT)
    if tokens.shape[1] == 0:
        scores = similarity.sum(dim=-1)
        return scores, torch.full_like(scores, -1, dtype=torch.int64)
    if token_valid is None:
        scores, ids = similarity.max(dim=-1)
        return scores, ids
    ids = similarity.detach().masked_fill(~token_valid[:, None], float("-inf")).argmax(dim=-1)
    first = token_valid.to(torch.uint8).argmax(dim=-1, keepdim=True)
    ids = torch.where(token_valid.gather(1, ids), ids, first)  # all valid ones may be -inf
    scores = similarity.gather(-1, ids.unsqueeze(-1)).squeeze(-1)
    empty = ~token_valid.any(dim=-1, keepdim=True)
    return scores.masked_fill(empty, 0.0), ids.masked_fill(empty, -1)


def max_similarity_backward(
    patches: Tensor, tokens: Tensor, ids: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of `max_similarity`, which go to each patch's best token alone."""
    if tokens.shape[1] == 0:
        return torch.zeros_like(patches), torch.zeros_like(tokens)
    none = (ids < 0).unsqueeze(-1)  # such a patch has no token to read
    grad = grad.unsqueeze(-1).masked_fill(none, 0.0)
    rows = ids.clamp(min=0).unsqueeze(-1).expand(patches.shape)
    grad_patches = (grad * tokens.to(grad.dtype).gather(1, rows)).masked_fill(none, 0.0)
    grad_tokens = torch.zeros(tokens.shape, dtype=grad.dtype, device=grad.device)
    grad_tokens.scatter_add_(1, rows, grad * patches.to(grad.dtype))
    return grad_patches.to(patches.dtype), grad_tokens.to(tokens.dtype)
