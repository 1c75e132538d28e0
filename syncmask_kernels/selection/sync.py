"""The patches and words that image and text share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from syncmask_kernels import _checks, backends
from syncmask_kernels.attention import (
    check_heads,
    check_qk,
    check_skip_keys,
    stack_layers,
    wants_grad,
)
from syncmask_kernels.backends.eager import selection as eager
from syncmask_kernels.backends.request import (
    PATCH_SCORES,
    TOKEN_SCORES,
    Scoring,
    ScoringQK,
    SyncRequest,
)
from syncmask_kernels.selection.topk import count_of


class SyncMask(NamedTuple):
    """The chosen patches and words, and the scores they were chosen by."""

    patch_mask: Tensor
    token_mask: Tensor
    patch_ids: Tensor
    token_ids: Tensor
    patch_scores: Tensor
    token_scores: Tensor


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
        attn, lse = eager.sync_scores_backward(scoring, *grads[4:])
        return None, None, None, attn, lse, None, None


def _select(request: SyncRequest) -> SyncMask:
    """Serve a validated request by the backend chosen, with gradients of the scores."""
    scoring = request.scoring
    run = backends.choose("sync_topk_mask", scoring.attn, request)
    if wants_grad(scoring.attn, scoring.lse) and run is not eager.sync_topk_mask:
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
    _checks.mask("token_valid", token_valid, "[B, T]", (batch, tokens), "attn", stacked)
    _checks.mask("patch_valid", patch_valid, "[B, P]", (batch, patches), "attn", stacked)
    if word_ids is not None:
        _checks.dtype("word_ids", word_ids, torch.int64)
        _checks.shape("word_ids", word_ids, "[B, T]", (batch, tokens))
        _checks.same_device("word_ids", word_ids, "attn", stacked)
    if lse is not None:
        lse = stack_layers("lse", lse, "B, H, T")
        _checks.floating("lse", lse)
        _checks.shape("lse", lse, "[(L,) B, H, T]", (layers, batch, heads, tokens))
        _checks.same_device("lse", lse, "attn", stacked)
    patch_count = count_of(
        "patch_",
        patches,
        (batch,),
        stacked.device,
        patch_k,
        None if patch_k is not None else patch_ratio,
    )
    token_count = count_of(
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


def _scores_qk(scoring: ScoringQK) -> tuple[Tensor, Tensor]:
    run = backends.choose("sync_scores_qk", scoring.q, scoring)
    if wants_grad(*scoring[:3]):
        run = eager.sync_scores_qk
    patch, token = run(scoring)
    return patch, token


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
    token_score: str = "max",
    patch_scores: Tensor | None = None,
    token_scores: Tensor | None = None,
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
        patch_valid, patch_score, token_score, patch_scores, token_scores, skip_keys, cls_index,
            **options: as in `sync_topk_mask`, without `lse`.

    Returns:
        SyncMask: as `sync_topk_mask`. Gradients flow from the scores to `q`, `k` and `v`.

    Raises:
        TypeError, ValueError: as `sync_topk_mask`.

    Deterministic, no host sync. The probabilities ``[L, B, H, T, S]`` exist in memory only where
    gradients are recorded, and on the eager backend.

    Source: SyncMask (a reconstruction); norm-based attention after Kobayashi et al., 2020.

    Example:
        >>> import torch, syncmask_kernels as smk
        >>> q, k = torch.randn(2, 4, 6, 8), torch.randn(2, 4, 17, 8)
        >>> smk.sync_topk_mask_qk(q, k, token_score="dual", patch_ratio=0.25).patch_ids.shape
        torch.Size([2, 4])
    """
    queries, keys, factor = check_qk(q, k, key_valid, scale, skip_keys)
    _, batch, _, words, _ = queries.shape
    patches = keys.shape[3] - skip_keys
    _checks.choice("patch_score", patch_score, PATCH_SCORES)
    _checks.choice("token_score", token_score, TOKEN_SCORES)
    _checks.index("cls_index", cls_index, words, "T")
    _checks.mask("token_valid", token_valid, "[B, T]", (batch, words), "q", queries)
    _checks.mask("patch_valid", patch_valid, "[B, P]", (batch, patches), "q", queries)
    if token_scores is None or patch_scores is None:
        distance = None
        if v is not None:
            if patch_scores is not None:
                raise ValueError("v and patch_scores exclude each other, got both")
            values = stack_layers("v", v, "B, H, S, D")
            _checks.floating("v", values)
            _checks.shape("v", values, "[(L,) B, H, S, D]", (*keys.shape[:-1], values.shape[-1]))
            _checks.same_device("v", values, "k", keys)
            distance = eager.value_distance(values, patch_valid, skip_keys)
        patch, token = _scores_qk(
            ScoringQK(
                queries,
                keys,
                distance,
                key_valid,
                token_valid,
                patch_valid,
                factor,
                patch_score,
                token_score,
                skip_keys,
                cls_index,
            )
        )
        patch_scores = patch if patch_scores is None else patch_scores
        token_scores = token if token_scores is None else token_scores
    # Both sides have their scores: of attn only the shape counts.
    attn = queries.new_empty(1, 1, 1, patches).expand(batch, 1, words, patches)
    return sync_topk_mask(
        attn,
        token_valid,
        patch_valid=patch_valid,
        patch_scores=patch_scores,
        token_scores=token_scores,
        skip_keys=0,
        **options,
    )
