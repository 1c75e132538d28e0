"""Exact top-k of rows, and what is made of it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from syncmask_kernels import _checks, _host, backends
from syncmask_kernels.backends.eager.selection import ids_of
from syncmask_kernels.backends.request import Count


class TopK(NamedTuple):
    """A selection: ``mask [..., N]`` bool, ``ids [..., K]`` int64, ``scores [..., K]``."""

    mask: Tensor
    ids: Tensor
    scores: Tensor


def count_of(
    prefix: str,
    positions: int,
    rows: tuple[int, ...],
    device: torch.device,
    k: int | Tensor | None,
    ratio: float | None,
    width: int | None = None,
) -> Count:
    """A checked count; `prefix` is put before the argument names ("patch_", "token_", "")."""
    if isinstance(k, Tensor):
        _checks.dtype(f"{prefix}k", k, torch.int64)
        _checks.shape(f"{prefix}k", k, "the rows of the scores", rows)
        if k.device != device:
            raise ValueError(f"{prefix}k must be on {device}, got {k.device}")
        return Count(k, 0, 0, positions if width is None else width)
    if k is not None:
        if isinstance(k, bool) or not isinstance(k, (int, torch.SymInt)):
            raise TypeError(f"{prefix}k must be an int or an int64 tensor, got {type(k).__name__}")
        _checks.count(f"{prefix}k", k)
        return Count(None, k, 0, k if width is None else width)
    if ratio is None:
        raise ValueError(f"one of {prefix}k and {prefix}ratio must be given, got neither")
    _checks.fraction(f"{prefix}ratio", ratio)
    num, den = _host.as_fraction(ratio)
    return Count(None, num, den, (positions * num + den - 1) // den if width is None else width)


def topk_mask(
    scores: Tensor,
    *,
    k: int | Tensor | None = None,
    ratio: float | None = None,
    width: int | None = None,
    valid: Tensor | None = None,
    largest: bool = True,
) -> TopK:
    """Exact, deterministic top-k of each row, as a mask and as ids.

    Positions are ordered by (excluded, NaN, -score, index): an excluded position is never chosen,
    NaN never before a number, -0.0 equals 0.0, ties go to the lower index.

    Args:
        scores: ``[..., N]`` float16, bfloat16, float32 or float64.
        k: positions a row chooses, ``min(k, valid)``; an int, or an int64 tensor of the rows
            (``[...]``), for schedules without recompiling. Exactly one of `k` and `ratio`.
        ratio: share of the row's valid positions, rounded up exactly: the ratio is read as
            ``Fraction(ratio).limit_denominator(10**6)``.
        width: K, the width of the ids. Default: `k`, the ceiling of ``ratio * N``, or N where `k`
            is a tensor. A row that chooses more positions than `width` has only its first ids
            (in position order) listed; the mask is always complete.
        valid: ``[..., N]`` bool, False for positions that are never chosen. Default: all valid.
        largest: choose the largest scores (default) or the smallest. NaN stays last.

    Returns:
        TopK: ``mask [..., N]`` bool; ``ids [..., K]`` int64 in ascending position order, padded
        with -1; ``scores [..., K]`` float32 (float64 for float64) at the ids, -inf where the id is
        -1. The gradient flows through the returned scores.

    Raises:
        TypeError: types do not fit.
        ValueError: both or none of `k` and `ratio`, a ratio outside [0, 1], shapes or devices that
            do not fit.

    Deterministic: the same bits on every backend, in any batch, run after run; no host sync.

    Source: AttMask's selection (descending sort, mask the first r N), with a defined order.

    Example:
        >>> import torch, syncmask_kernels as smk
        >>> smk.topk_mask(torch.tensor([[0.1, 0.7, 0.7, float("nan")]]), k=2).ids
        tensor([[1, 2]])
    """
    if not isinstance(scores, Tensor) or scores.dim() == 0:
        _checks.rank("scores", scores, "[..., N]")
    _checks.floating("scores", scores)
    if (k is None) == (ratio is None):
        raise ValueError(f"exactly one of k and ratio must be given, got k={k}, ratio={ratio}")
    if width is not None:
        _checks.count("width", width)
    _checks.mask("valid", valid, "the shape of scores", scores.shape, "scores", scores)
    if not isinstance(largest, bool):
        raise TypeError(f"largest must be a bool, got {type(largest).__name__}")
    rows = tuple(scores.shape[:-1])
    count = count_of("", scores.shape[-1], rows, scores.device, k, ratio, width)
    fixed = scores.detach()
    mask, ids = backends.choose("topk_mask", fixed, fixed)(fixed, valid, count, largest)
    wide = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if valid is None and isinstance(k, int) and ids.shape[-1] == k <= scores.shape[-1]:
        return TopK(mask, ids, wide.gather(-1, ids))  # no row is padded
    if scores.shape[-1] == 0:
        return TopK(mask, ids, wide.new_full(ids.shape, float("-inf")))
    chosen = wide.gather(-1, ids.clamp(min=0))
    return TopK(mask, ids, chosen.masked_fill(ids < 0, float("-inf")))


class Complement(NamedTuple):
    """What a selection left: ``ids [..., W]`` int64 and ``restore [..., N]`` int64."""

    ids: Tensor
    restore: Tensor


def complement(topk: TopK, *, valid: Tensor | None = None, width: int | None = None) -> Complement:
    """The valid positions that were not chosen, and the way back: what MAE-style dropping needs.

    Args:
        topk: a selection of `topk_mask`.
        valid: ``[..., N]`` bool, as given to `topk_mask`; excluded positions are not listed.
        width: W, the width of the ids. Default ``N - K``, which is enough unless rows chose fewer
            than K of their valid positions (a `k` tensor, or `valid` not given here).

    Returns:
        Complement: ``ids [..., W]`` int64, ascending, padded with -1, and ``restore [..., N]``
        int64: with ``y = cat([kept rows, mask tokens])`` of W rows and N - W (at least 1),
        ``y.gather(restore)`` puts every kept row back and a mask token elsewhere. It is the inverse
        permutation where the row keeps W positions; where it keeps fewer, mask tokens repeat.

    Raises:
        TypeError, ValueError: an argument is of the wrong type, shape or device, or negative.

    Deterministic; no host sync. Source: MAE's ``ids_keep`` and ``ids_restore``.

    Example:
        >>> import torch, syncmask_kernels as smk
        >>> chosen = smk.topk_mask(torch.tensor([[3.0, 1.0, 2.0, 0.0]]), k=2)
        >>> smk.complement(chosen)
        Complement(ids=tensor([[1, 3]]), restore=tensor([[2, 0, 3, 1]]))
    """
    if not isinstance(topk, TopK):
        raise TypeError(f"topk must be a TopK, got {type(topk).__name__}")
    positions = topk.mask.shape[-1]
    _checks.mask("valid", valid, "the shape of topk.mask", topk.mask.shape, "topk.mask", topk.mask)
    if width is not None:
        _checks.count("width", width)
    kept = ~topk.mask if valid is None else ~topk.mask & valid
    width = max(positions - topk.ids.shape[-1], 0) if width is None else width
    listed = kept & (kept.cumsum(dim=-1) <= width)
    slots = torch.where(listed, listed.cumsum(-1) - 1, width + (~listed).cumsum(-1) - 1)
    return Complement(ids_of(listed, width), slots.clamp(max=max(positions - 1, width)))


class AttentiveMask(NamedTuple):
    """The most and the least relevant patches, each a `TopK`."""

    high: TopK
    low: TopK


def attentive_mask(
    scores: Tensor, *, high_ratio: float, low_ratio: float, valid: Tensor | None = None
) -> AttentiveMask:
    """The patches that a caption speaks of most, and those it speaks of least.

    SyCoCa masks the former for text-guided reconstruction and the latter for captioning. The two
    selections are independent of each other: they overlap where the ratios add up to more than 1.

    Args:
        scores: ``[..., N]`` relevance, as `max_similarity` gives it.
        high_ratio, low_ratio: share of the valid patches in each, rounded up exactly.
        valid: ``[..., N]`` bool, False for patches in neither. Default: all are valid.

    Returns:
        AttentiveMask: ``high`` and ``low``, as `topk_mask` returns them for the largest and the
        smallest scores. NaN comes last in both.

    Raises:
        TypeError, ValueError: as `topk_mask`.

    Deterministic: the same bits on every backend, in any batch, run after run; no host sync.

    Source: SyCoCa (ICML 2024), attentive masking.

    Example:
        >>> import torch, syncmask_kernels as smk
        >>> chosen = smk.attentive_mask(torch.tensor([[3.0, 0.0, 2.0, 1.0]]), high_ratio=0.5,
        ...                             low_ratio=0.25)
        >>> chosen.high.ids, chosen.low.ids
        (tensor([[0, 2]]), tensor([[1]]))
    """
    _checks.fraction("high_ratio", high_ratio)
    _checks.fraction("low_ratio", low_ratio)
    return AttentiveMask(
        topk_mask(scores, ratio=high_ratio, valid=valid),
        topk_mask(scores, ratio=low_ratio, valid=valid, largest=False),
    )


def vote_keywords(
    attn_row: Tensor, *, votes: int, keep: int, valid: Tensor | None = None
) -> Tensor:
    """The words that most heads look at: pseudo-keywords of a caption.

    Each head votes for its `votes` most attended words; the `keep` most-voted words are kept.

    Args:
        attn_row: ``[B, H, T]`` one row of attention per head: the multimodal CLS over the words.
        votes: words a head votes for.
        keep: words kept.
        valid: ``[B, T]`` bool, False for words that are never voted for (CLS, SEP, padding).
            Default: all.

    Returns:
        Tensor: ``[B, keep]`` int64 positions, ascending, padded with -1. A word without a vote is
        not kept. Ties, of attention and of votes, go to the lower index.

    Raises:
        TypeError, ValueError: an argument is of the wrong type, shape or device, or negative.

    Deterministic: the same bits on every backend, in any batch, run after run; no host sync.

    Source: SIMLA (ECCV 2022), pseudo-labelled keywords; its code takes ``votes=4, keep=5``.

    Example:
        >>> import torch, syncmask_kernels as smk
        >>> attn_row = torch.tensor([[[0.5, 0.1, 0.4], [0.1, 0.2, 0.7]]])
        >>> smk.vote_keywords(attn_row, votes=1, keep=3)
        tensor([[ 0,  2, -1]])
    """
    _checks.floating("attn_row", attn_row, "[B, H, T]")
    _checks.count("votes", votes)
    _checks.count("keep", keep)
    batch, heads, words = attn_row.shape
    _checks.mask("valid", valid, "[B, T]", (batch, words), "attn_row", attn_row)
    allowed = None if valid is None else valid.unsqueeze(1).expand(batch, heads, words)
    voted = topk_mask(attn_row.detach(), k=votes, valid=allowed).mask
    ballots = voted.sum(dim=1).to(torch.float32)
    return topk_mask(ballots, k=keep, valid=ballots > 0).ids
