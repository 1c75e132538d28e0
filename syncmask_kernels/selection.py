"""Choosing positions: exact top-k, and the patches and words that image and text share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from syncmask_kernels import _checks, _host, backends
from syncmask_kernels.attention import check_heads, check_qk, check_skip_keys, stack_layers
from syncmask_kernels.backends.eager.attention import attention_logits, softmax
from syncmask_kernels.backends.eager.selection import (
    ids_of,
    sync_scores,
    sync_scores_backward,
    value_distance,
)
from syncmask_kernels.backends.eager.selection import sync_topk_mask as eager_sync_topk_mask
from syncmask_kernels.backends.request import (
    PATCH_SCORES,
    TOKEN_SCORES,
    Count,
    Scoring,
    SyncRequest,
)


class TopK(NamedTuple):
    """A selection: ``mask [..., N]`` bool, ``ids [..., K]`` int64, ``scores [..., K]``."""

    mask: Tensor
    ids: Tensor
    scores: Tensor


class Complement(NamedTuple):
    """What a selection left: ``ids [..., W]`` int64 and ``restore [..., N]`` int64."""

    ids: Tensor
    restore: Tensor


class SyncMask(NamedTuple):
    """The chosen patches and words, and the scores they were chosen by."""

    patch_mask: Tensor
    token_mask: Tensor
    patch_ids: Tensor
    token_ids: Tensor
    patch_scores: Tensor
    token_scores: Tensor


def _count(
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
        if k < 0:
            raise ValueError(f"{prefix}k must be at least 0, got {k}")
        return Count(None, k, 0, k if width is None else width)
    if ratio is None:
        raise ValueError(f"one of {prefix}k and {prefix}ratio must be given, got neither")
    _checks.fraction(f"{prefix}ratio", ratio)
    num, den = _host.as_fraction(ratio)
    return Count(None, num, den, (positions * num + den - 1) // den if width is None else width)


def _check_mask(
    name: str, mask: Tensor | None, layout: str, sizes: Sequence[int], attn: Tensor
) -> None:
    if mask is not None:
        _checks.dtype(name, mask, torch.bool)
        _checks.shape(name, mask, layout, sizes)
        _checks.same_device(name, mask, "attn", attn)


def _check_scores(
    name: str, scores: Tensor | None, layout: str, sizes: Sequence[int], attn: Tensor
) -> Tensor | None:
    """Scores or noise of the caller, in the type of scores."""
    if scores is None:
        return None
    _checks.floating(name, scores)
    _checks.shape(name, scores, layout, sizes)
    _checks.same_device(name, scores, "attn", attn)
    return scores.to(torch.promote_types(scores.dtype, torch.float32))


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
    if width is not None and width < 0:
        raise ValueError(f"width must be at least 0, got {width}")
    if valid is not None:
        _checks.dtype("valid", valid, torch.bool)
        _checks.shape("valid", valid, "the shape of scores", scores.shape)
        _checks.same_device("valid", valid, "scores", scores)
    rows = tuple(scores.shape[:-1])
    count = _count("", scores.shape[-1], rows, scores.device, k, ratio, width)
    fixed = scores.detach()
    mask, ids = backends.choose("topk_mask", fixed, fixed)(fixed, valid, count, largest)
    wide = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if scores.shape[-1] == 0:
        return TopK(mask, ids, wide.new_full(ids.shape, float("-inf")))
    chosen = wide.gather(-1, ids.clamp(min=0))
    return TopK(mask, ids, chosen.masked_fill(ids < 0, float("-inf")))


def complement(topk: TopK, *, valid: Tensor | None = None, width: int | None = None) -> Complement:
    """The valid positions that were not chosen, and the way back: what MAE-style dropping needs.

    Args:
        topk: a selection of `topk_mask`.
        valid: ``[..., N]`` bool, as given to `topk_mask`; excluded positions are not listed.
        width: W, the width of the ids. Default ``N - K``, which is enough unless rows chose fewer
            than K of their valid positions (a `k` tensor, or `valid` not given here).

    Returns:
        Complement: ``ids [..., W]`` int64, ascending, padded with -1, and ``restore [..., N]``
        int64: with ``y = cat([kept rows, mask tokens])`` of W + (N - W) rows,
        ``y.gather(restore)`` puts every kept row back and a mask token elsewhere. It is the inverse
        permutation where the row keeps W positions; where it keeps fewer, mask tokens repeat.

    Raises:
        ValueError: shapes do not fit.

    Deterministic; no host sync. Source: MAE's ``ids_keep`` and ``ids_restore``.

    Example:
        >>> import torch, syncmask_kernels as smk
        >>> chosen = smk.topk_mask(torch.tensor([[3.0, 1.0, 2.0, 0.0]]), k=2)
        >>> smk.complement(chosen)
        Complement(ids=tensor([[1, 3]]), restore=tensor([[2, 0, 3, 1]]))
    """
    positions = topk.mask.shape[-1]
    if valid is not None:
        _checks.dtype("valid", valid, torch.bool)
        _checks.shape("valid", valid, "the shape of topk.mask", topk.mask.shape)
    kept = ~topk.mask if valid is None else ~topk.mask & valid
    width = max(positions - topk.ids.shape[-1], 0) if width is None else width
    listed = kept & (kept.cumsum(dim=-1) <= width)
    slots = torch.where(listed, listed.cumsum(-1) - 1, width + (~listed).cumsum(-1) - 1)
    return Complement(ids_of(listed, width), slots.clamp(max=max(positions - 1, 0)))


class _SyncTopkMask(torch.autograd.Function):
    """The forward of a backend without autograd, with the gradient of its scores."""

    @staticmethod
    def forward(ctx: Any, run: Any, rest: Any, options: Any, *tensors: Any) -> Any:
        ctx.save_for_backward(*tensors)
        ctx.options = options
        selection = run(SyncRequest(Scoring(*tensors, *options), *rest))
        ctx.mark_non_differentiable(*selection[:4])
        return tuple(selection)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        scoring = Scoring(*ctx.saved_tensors, *ctx.options)
        attn, lse = sync_scores_backward(scoring, *grads[4:])
        return None, None, None, attn, lse, None, None


def _select(request: SyncRequest) -> SyncMask:
    """Serve a validated request by the backend chosen, with gradients of the scores."""
    scoring = request.scoring
    run = backends.choose("sync_topk_mask", scoring.attn, request)
    needs_grad = torch.is_grad_enabled() and (
        scoring.attn.requires_grad or (scoring.lse is not None and scoring.lse.requires_grad)
    )
    if needs_grad and run is not eager_sync_topk_mask:
        chosen = SyncMask(*_SyncTopkMask.apply(run, request[1:], scoring[4:], *scoring[:4]))
    else:
        chosen = SyncMask(*run(request))
    # The caller's own scores are returned as they are, so that their gradient flows.
    if request.patch_scores is not None:
        chosen = chosen._replace(patch_scores=request.patch_scores)
    if request.token_scores is not None:
        chosen = chosen._replace(token_scores=request.token_scores)
    return chosen


def sync_topk_mask(
    attn: Tensor | Sequence[Tensor],
    token_valid: Tensor | None = None,
    *,
    patch_ratio: float = 0.5,
    token_ratio: float = 0.15,
    patch_k: int | Tensor | None = None,
    token_k: int | Tensor | None = None,
    patch_valid: Tensor | None = None,
    word_ids: Tensor | None = None,
    patch_score: str = "mean",
    token_score: str = "max",
    lse: Tensor | Sequence[Tensor] | None = None,
    patch_scores: Tensor | None = None,
    token_scores: Tensor | None = None,
    patch_noise: Tensor | None = None,
    token_noise: Tensor | None = None,
    skip_keys: int = 1,
    cls_index: int = 0,
) -> SyncMask:
    """Choose the patches and the words that image and text share, from cross-attention.

    With Ā the head mean of `attn`, every patch and every word is scored, and the best of each side
    are selected: the synchronized masks of SyncMask. The paper's own rules are not public; this is
    a reconstruction, and the rules below are options.

    Args:
        attn: ``[B, H, T, S]`` cross-attention of text queries over image keys, softmaxed, before
            dropout; a sequence of layers or ``[L, B, H, T, S]``, which are averaged too.
        token_valid: ``[B, T]`` bool, words that are counted and may be chosen (`token_valid` makes
            it: padding, CLS and SEP are False). Default: all. Rows of other words are not read,
            except the one `patch_score="cls"` needs.
        patch_ratio, token_ratio: share of the valid patches and words chosen, rounded up exactly.
        patch_k, token_k: chosen instead of a ratio, ``min(k, valid)``: an int, or an int64 tensor
            ``[B]``.
        patch_valid: ``[B, P]`` bool, False for patches that are neither scored nor chosen.
        word_ids: ``[B, T]`` int64: pieces with equal ids are one word, chosen together; its score
            is that of its best piece, counts are of words, negative ids are never chosen.
        patch_score: ``"mean"`` of Ā over valid words, or ``"cls"``, the row `cls_index` of Ā.
        token_score: ``"max"`` over patches of Ā; ``"text_softmax"``: per head, the logits
            normalised over valid words instead of patches (a patch chooses among words), mean over
            heads, maximum over patches; ``"dual"``: per head, the product of both normalisations,
            mean over heads, sum over patches. A plain sum over patches is not offered: rows of
            `attn` sum to one, so every word would score the same.
        lse: ``[(L,) B, H, T]`` log-sum-exp of each row's logits, as flash attention returns it.
            ``"text_softmax"`` and ``"dual"`` need logits, which are ``log attn + lse``; without
            `lse` they use ``log attn``, and how strongly a whole row of words responds to the image
            is lost: words then differ only in where they look.
        patch_scores, token_scores: ``[B, P]``, ``[B, T]``: the caller's own scores instead of a
            rule.
        patch_noise, token_noise: ``[B, P]``, ``[B, T]``: added to the scores for the selection
            only (Gumbel noise makes it a draw).
        skip_keys: leading key columns that are no patches, default 1: the image CLS. P is
            ``S - skip_keys``.
        cls_index: the row of ``patch_score="cls"``, default 0.

    Returns:
        SyncMask: ``patch_mask [B, P]`` and ``token_mask [B, T]`` bool; ``patch_ids [B, Kp]`` and
        ``token_ids [B, Kt]`` int64, ascending, padded with -1 (Kp is `patch_k` or the ceiling of
        ``patch_ratio * P``, P where `patch_k` is a tensor; Kt likewise, and T with `word_ids`,
        whose words may have any number of pieces); ``patch_scores [B, P]`` and ``token_scores
        [B, T]`` float32 (float64 for float64), without the noise, 0 at excluded positions. The
        gradient flows from the scores to `attn` and `lse`, not from masks and ids.

    Raises:
        TypeError, ValueError: an argument is of the wrong type, shape or device, out of range, or
            no known rule.

    Deterministic, no host sync. The selection is exact for the scores that are returned, in the
    order of `topk_mask`; scores of two backends agree within rounding. A row without valid words
    has scores 0, chooses no word and its first patches.

    Source: SyncMask (CVPR 2024), abstract and figure 3; AttMask (``patch_score="cls"``).

    Example:
        >>> import torch, syncmask_kernels as smk
        >>> attn = torch.tensor([[[[0.1, 0.7, 0.2], [0.2, 0.1, 0.7], [0.4, 0.3, 0.3]]]])
        >>> valid = torch.tensor([[False, True, True]])
        >>> chosen = smk.sync_topk_mask(attn, valid, patch_k=1, token_k=1)
        >>> chosen.patch_ids, chosen.token_ids
        (tensor([[1]]), tensor([[1]]))
    """
    stacked = stack_layers("attn", attn, "B, H, T, S")
    _checks.floating("attn", stacked)
    check_heads("attn", stacked)
    layers, batch, heads, tokens, keys = stacked.shape
    check_skip_keys(skip_keys, keys)
    patches = keys - skip_keys
    _checks.choice("patch_score", patch_score, PATCH_SCORES)
    _checks.choice("token_score", token_score, TOKEN_SCORES)
    _checks.index("cls_index", cls_index, tokens, "T")
    _check_mask("token_valid", token_valid, "[B, T]", (batch, tokens), stacked)
    _check_mask("patch_valid", patch_valid, "[B, P]", (batch, patches), stacked)
    if word_ids is not None:
        _checks.dtype("word_ids", word_ids, torch.int64)
        _checks.shape("word_ids", word_ids, "[B, T]", (batch, tokens))
        _checks.same_device("word_ids", word_ids, "attn", stacked)
    if lse is not None:
        lse = stack_layers("lse", lse, "B, H, T")
        _checks.floating("lse", lse)
        _checks.shape("lse", lse, "[(L,) B, H, T]", (layers, batch, heads, tokens))
        _checks.same_device("lse", lse, "attn", stacked)
    patch_count = _count(
        "patch_",
        patches,
        (batch,),
        stacked.device,
        patch_k,
        None if patch_k is not None else patch_ratio,
    )
    token_count = _count(
        "token_",
        tokens,
        (batch,),
        stacked.device,
        token_k,
        None if token_k is not None else token_ratio,
        None if word_ids is None else tokens,
    )
    return _select(
        SyncRequest(
            Scoring(
                stacked,
                lse,
                token_valid,
                patch_valid,
                patch_score,
                token_score,
                skip_keys,
                cls_index,
            ),
            patch_count,
            token_count,
            _check_scores("patch_scores", patch_scores, "[B, P]", (batch, patches), stacked),
            _check_scores("token_scores", token_scores, "[B, T]", (batch, tokens), stacked),
            _check_scores("patch_noise", patch_noise, "[B, P]", (batch, patches), stacked),
            _check_scores("token_noise", token_noise, "[B, T]", (batch, tokens), stacked),
            word_ids,
        )
    )


def sync_topk_mask_qk(
    q: Tensor | Sequence[Tensor],
    k: Tensor | Sequence[Tensor],
    token_valid: Tensor | None = None,
    *,
    v: Tensor | Sequence[Tensor] | None = None,
    key_valid: Tensor | None = None,
    scale: float | None = None,
    patch_valid: Tensor | None = None,
    patch_score: str = "mean",
    patch_scores: Tensor | None = None,
    skip_keys: int = 1,
    cls_index: int = 0,
    **options: Any,
) -> SyncMask:
    """`sync_topk_mask` from queries and keys, whose logits make every rule exact.

    Args:
        q: ``[B, H, T, D]`` text queries, a sequence of layers or ``[L, B, H, T, D]``.
        k: ``[B, H, S, D]`` image keys, likewise.
        token_valid: ``[B, T]`` bool, as in `sync_topk_mask`.
        v: ``[B, H, S, D]`` values, likewise. With it a patch's score weights the attention of each
            head by how far the patch's value lies from the mean value of the valid patches,
            ``‖v_p - v̄‖`` (norm-based attention).
        key_valid: ``[B, S]`` bool, False for keys outside the softmax.
        scale: factor of the logits, default ``D ** -0.5``.
        patch_valid, patch_score, patch_scores, skip_keys, cls_index, **options: as in
            `sync_topk_mask`, without `lse`.

    Returns:
        SyncMask: as `sync_topk_mask`. Gradients flow from the scores to `q`, `k` and `v`.

    Raises:
        TypeError, ValueError: as `sync_topk_mask`.

    Deterministic, no host sync. Today the probabilities ``[L, B, H, T, S]`` exist in memory.

    Source: SyncMask (a reconstruction); norm-based attention after Kobayashi et al., 2020.

    Example:
        >>> import torch, syncmask_kernels as smk
        >>> q, k = torch.randn(2, 4, 6, 8), torch.randn(2, 4, 17, 8)
        >>> smk.sync_topk_mask_qk(q, k, token_score="dual", patch_ratio=0.25).patch_ids.shape
        torch.Size([2, 4])
    """
    queries, keys, factor = check_qk(q, k, key_valid, scale, skip_keys)
    logits = attention_logits(queries, keys, key_valid, factor)
    attn = softmax(logits)
    if v is not None:
        if patch_scores is not None:
            raise ValueError("v and patch_scores exclude each other, got both")
        values = stack_layers("v", v, "B, H, S, D")
        _checks.floating("v", values)
        _checks.shape("v", values, "[(L,) B, H, S, D]", (*keys.shape[:-1], values.shape[-1]))
        _checks.same_device("v", values, "k", keys)
        weighted = attn * value_distance(values, patch_valid, skip_keys).unsqueeze(-2)
        patch_scores, _ = sync_scores(
            Scoring(
                weighted, None, token_valid, patch_valid, patch_score, "max", skip_keys, cls_index
            )
        )
    return sync_topk_mask(
        attn,
        token_valid,
        lse=logits.logsumexp(dim=-1),
        patch_valid=patch_valid,
        patch_score=patch_score,
        patch_scores=patch_scores,
        skip_keys=skip_keys,
        cls_index=cls_index,
        **options,
    )
