"""The operators that the models call, in plain PyTorch, as one writes them without a library.

They are what the library is compared with over whole trainings (``--operators plain``): the forms
of ALBEF, BEiT and MAE, batched, without loops over samples. Each takes the arguments that the
models pass, and means by them what the function of its name in `syncmask_kernels` does.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import syncmask_kernels as smk
from reference import ranks


@contextmanager
def operators(which: str) -> Iterator[None]:
    """Within it ``smk.<operator>`` is the library's (``"library"``) or this module's."""
    if which == "library":
        yield
        return
    with mock.patch.multiple(smk, **_OPERATORS):
        yield


# ---- selection ----


def _ranks(scores: Tensor, valid: Tensor, largest: bool = True) -> Tensor:
    """The place of each position among the valid ones, best first, ties by index."""
    lowest = -math.inf if largest else math.inf
    order = scores.masked_fill(~valid, lowest).sort(dim=-1, descending=largest, stable=True)
    return order.indices.argsort(dim=-1)


def _count(ratio: float, valid: Tensor) -> Tensor:
    return (ratio * valid.sum(dim=-1, keepdim=True)).ceil()


def _ids(mask: Tensor, width: int) -> Tensor:
    """The places of True, in order, padded with -1."""
    first = torch.sort((~mask).to(torch.int8), dim=-1, stable=True)
    return first.indices[..., :width].masked_fill(first.values[..., :width] == 1, -1)


def topk_mask(
    scores: Tensor,
    *,
    k: int | Tensor | None = None,
    ratio: float | None = None,
    width: int | None = None,
    valid: Tensor | None = None,
    largest: bool = True,
) -> smk.TopK:
    valid = torch.ones_like(scores, dtype=torch.bool) if valid is None else valid
    if ratio is not None:
        count = _count(ratio, valid)
        most = math.ceil(ratio * scores.shape[-1])
    elif isinstance(k, Tensor):
        count, most = k.unsqueeze(-1), int(k.max())
    else:
        count, most = torch.tensor(k, device=scores.device), int(k or 0)
    mask = (_ranks(scores, valid, largest) < count) & valid
    ids = _ids(mask, most if width is None else width)
    chosen = scores.gather(-1, ids.clamp(min=0)).masked_fill(ids < 0, -math.inf)
    return smk.TopK(mask, ids, chosen)


def sync_topk_mask(
    attn: Tensor,
    token_valid: Tensor,
    *,
    patch_ratio: float,
    token_ratio: float,
    word_ids: Tensor,
    patch_scores: Tensor,
    token_scores: Tensor,
    patch_noise: Tensor | None = None,
    token_noise: Tensor | None = None,
) -> smk.SyncMask:
    noisy_patches = patch_scores if patch_noise is None else patch_scores + patch_noise
    noisy_tokens = token_scores if token_noise is None else token_scores + token_noise
    patches = topk_mask(noisy_patches, ratio=patch_ratio)
    # Pieces of a word are chosen together, by the best of them.
    words = word_ids.masked_fill(~token_valid, 0).clamp(min=0)
    valid = token_valid & (word_ids >= 0)
    best = torch.full_like(noisy_tokens, -math.inf).scatter_reduce(
        1, words, noisy_tokens.masked_fill(~valid, -math.inf), "amax"
    )
    word_valid = torch.zeros_like(noisy_tokens).scatter_add(1, words, valid.float()) > 0
    chosen = (_ranks(best, word_valid) < _count(token_ratio, word_valid)) & word_valid
    token_mask = chosen.gather(1, words) & valid
    token_ids = _ids(token_mask, token_mask.shape[1])
    return smk.SyncMask(
        patches.mask, token_mask, patches.ids, token_ids, patch_scores, token_scores
    )


def attention_map(q: Tensor, k: Tensor, *, key_valid: Tensor, skip_keys: int) -> Tensor:
    logits = q @ k.transpose(2, 3) / math.sqrt(q.shape[3])
    logits = logits.masked_fill(~key_valid[:, None, None], -math.inf)
    return logits.softmax(dim=3).mean(dim=1)[..., skip_keys:]


def sync_topk_mask_qk(
    q: Tensor,
    k: Tensor,
    token_valid: Tensor,
    *,
    v: Tensor | None = None,
    patch_score: str = "mean",
    token_score: str = "max",
    token_scores: Tensor | None = None,
    **options: Any,
) -> smk.SyncMask:
    logits = q @ k.transpose(2, 3) / math.sqrt(q.shape[3])
    attn = logits.softmax(dim=3)
    weights = attn[..., 1:]
    if v is not None:
        values = v[:, :, 1:]
        distance = (values - values.mean(dim=2, keepdim=True)).norm(dim=3)
        weights = weights * distance.unsqueeze(2)
    mean = weights.mean(dim=1)
    words = token_valid.to(mean.dtype).unsqueeze(2)
    by_words = (mean * words).sum(dim=1) / words.sum(dim=1).clamp(min=1)
    patch_scores = mean[:, 0] if patch_score == "cls" else by_words
    if token_scores is None:
        token_scores = _token_scores(logits, attn, token_valid, token_score)
    return sync_topk_mask(
        attn, token_valid, patch_scores=patch_scores, token_scores=token_scores, **options
    )


def _token_scores(logits: Tensor, attn: Tensor, token_valid: Tensor, rule: str) -> Tensor:
    attn = attn[..., 1:]
    if rule == "max":
        scores = attn.mean(dim=1).amax(dim=2)
    else:
        invalid = ~token_valid[:, None, :, None]
        shares = logits[..., 1:].masked_fill(invalid, -math.inf).softmax(dim=2)
        if rule == "dual":
            scores = (shares * attn).mean(dim=1).sum(dim=2)
        else:
            scores = shares.mean(dim=1).amax(dim=2)
    return scores.masked_fill(~token_valid, 0)


def attentive_mask(scores: Tensor, *, high_ratio: float, low_ratio: float) -> smk.AttentiveMask:
    return smk.AttentiveMask(
        topk_mask(scores, ratio=high_ratio), topk_mask(scores, ratio=low_ratio, largest=False)
    )


def max_similarity(patches: Tensor, tokens: Tensor, token_valid: Tensor | None = None) -> Tensor:
    similarity = patches @ tokens.transpose(1, 2)
    if token_valid is not None:
        similarity = similarity.masked_fill(~token_valid.unsqueeze(1), -math.inf)
    return similarity.amax(dim=2)


def vote_keywords(attn_row: Tensor, *, votes: int, keep: int, valid: Tensor) -> Tensor:
    voted = topk_mask(attn_row, k=votes, valid=valid.unsqueeze(1).expand_as(attn_row)).mask
    ballots = voted.sum(dim=1).float()
    return topk_mask(ballots, k=keep, valid=ballots > 0).ids


# ---- masking ----


def mask_patches(patches: Tensor, patch_mask: Tensor, mask_token: Tensor) -> Tensor:
    masked = patch_mask.unsqueeze(2).to(patches.dtype)
    return patches * (1 - masked) + mask_token * masked


def gather_masked(x: Tensor, ids: Tensor, *, fill: float = 0) -> Tensor:
    ones = (1,) * (x.dim() - 2)
    places = ids.clamp(min=0).view(*ids.shape, *ones).expand(*ids.shape, *x.shape[2:])
    return x.gather(1, places).masked_fill((ids < 0).view(*ids.shape, *ones), fill)


# ---- losses ----


def masked_linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor,
    teacher: tuple[Tensor, Tensor, Tensor] | None = None,
    alpha: float = 0.0,
) -> Tensor:
    logits = F.linear(hidden, weight, bias)
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    if teacher is None:
        return loss
    with torch.no_grad():
        soft = F.linear(*teacher).softmax(dim=2)
    distilled = -(soft * logits.log_softmax(dim=2)).sum(dim=2)
    return (1 - alpha) * loss + alpha * distilled[labels != -100].mean()


def masked_patch_loss(
    pred: Tensor,
    target: Tensor,
    ids: Tensor,
    *,
    kind: str,
    patch_size: int | None = None,
    norm_pix: bool = False,
) -> Tensor:
    assert kind == "l1"
    if patch_size is not None:
        batch, channels, side, _ = target.shape
        grid = side // patch_size
        cells = target.reshape(batch, channels, grid, patch_size, grid, patch_size)
        target = cells.permute(0, 2, 4, 3, 5, 1).reshape(batch, grid**2, -1)
    if norm_pix:
        mean, variance = target.mean(dim=2, keepdim=True), target.var(dim=2, keepdim=True)
        target = (target - mean) / (variance + 1e-6).sqrt()
    keep = (ids >= 0).to(pred.dtype)
    losses = (pred - gather_masked(target, ids)).abs().mean(dim=2)
    return (losses * keep).sum() / keep.sum()


def queue_contrastive_loss(
    image_feat: Tensor,
    text_feat: Tensor,
    image_key: Tensor,
    text_key: Tensor,
    image_queue: Tensor,
    text_queue: Tensor,
    temperature: Tensor,
    *,
    alpha: float,
    item_ids: Tensor,
    queue_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    all_ids = item_ids if queue_ids is None else torch.cat([item_ids, queue_ids])
    same = (item_ids[:, None] == all_ids).to(image_feat.dtype)
    positives = same / same.sum(dim=1, keepdim=True)

    def one_way(feature: Tensor, own: Tensor, other: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
        every = torch.cat([other.T, past.clone().detach()], dim=1)
        with torch.no_grad():
            soft = (own @ every / temperature).softmax(dim=1)
            targets = alpha * soft + (1 - alpha) * positives
        sim = feature @ every / temperature
        loss = -(sim.log_softmax(dim=1) * targets).sum(dim=1).mean()
        return loss, sim[:, : len(feature)]

    i2t, sim_i2t = one_way(image_feat, image_key, text_key, text_queue)
    t2i, sim_t2i = one_way(text_feat, text_key, image_key, image_queue)
    return (i2t + t2i) / 2, sim_i2t, sim_t2i


def enqueue_(
    queue: Tensor,
    pointer: Tensor,
    keys: Tensor,
    ids: Tensor | None = None,
    queue_ids: Tensor | None = None,
) -> None:
    keys = ranks.of_all(keys.to(queue.dtype))
    size, new = queue.shape[1], len(keys)
    columns = torch.arange(int(pointer), int(pointer) + new, device=queue.device)[-size:] % size
    queue[:, columns] = keys[-size:].T
    if ids is not None and queue_ids is not None:
        queue_ids[columns] = ranks.of_all(ids)[-size:]
    pointer[0] = (pointer[0] + new) % size


# ---- negatives and momentum ----


def sample_negatives(
    sim: Tensor,
    *,
    positive: Tensor,
    row_ids: Tensor,
    col_ids: Tensor,
    mode: str,
    quantile: float | None = None,
) -> smk.Negatives:
    candidate = row_ids[:, None] != col_ids
    found = candidate.any(dim=1)
    if mode == "multinomial":
        weights = sim.softmax(dim=1).masked_fill(~candidate, 0)
        weights[~found] = 1
        return smk.Negatives((weights + 1e-4 * candidate).multinomial(1).squeeze(1), found)
    if mode == "semi_hard":
        easier = candidate & (sim < sim.gather(1, positive.unsqueeze(1)))
        ascending = sim.masked_fill(~easier, math.inf).sort(dim=1, stable=True)
        share = 1.0 if quantile is None else quantile
        rank = (share * easier.sum(dim=1, keepdim=True)).ceil().long().sub(1).clamp(min=0)
        chosen = ascending.indices.gather(1, rank).squeeze(1)
        easiest = sim.masked_fill(~candidate, math.inf).argmin(dim=1)
        ids = torch.where(easier.any(dim=1), chosen, easiest)
    else:
        ids = sim.masked_fill(~candidate, -math.inf).argmax(dim=1)
    return smk.Negatives(ids.masked_fill(~found, 0), found)


@torch.no_grad()
def ema_update_(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    for old, new in zip(teacher.parameters(), student.parameters(), strict=True):
        old.data = old.data * momentum + new.data * (1 - momentum)


_OPERATORS: dict[str, Any] = {
    function.__name__: function
    for function in (
        attention_map,
        attentive_mask,
        ema_update_,
        enqueue_,
        gather_masked,
        mask_patches,
        masked_linear_cross_entropy,
        masked_patch_loss,
        max_similarity,
        queue_contrastive_loss,
        sample_negatives,
        sync_topk_mask,
        sync_topk_mask_qk,
        topk_mask,
        vote_keywords,
    )
}
