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


def _request(
    scoring: Scoring,
    name: str,
    patch_ratio: float,
    token_ratio: float,
    patch_k: int | Tensor | None,
    token_k: int | Tensor | None,
    patch_scores: Tensor | None,
    token_scores: Tensor | None,
    patch_noise: Tensor | None,
    token_noise: Tensor | None,
    word_ids: Tensor | None,
) -> SyncRequest:
    """What `sync_topk_mask` and `sync_topk_mask_qk` check alike; `name` is that of the input."""
    attn = scoring.attn
    _, batch, _, tokens, keys = attn.shape
    patches, rows = keys - scoring.skip_keys, (batch,)
    _checks.choice("patch_score", scoring.patch_score, PATCH_SCORES)
    _checks.choice("token_score", scoring.token_score, TOKEN_SCORES)
    _checks.index("cls_index", scoring.cls_index, tokens, "T")
    _checks.mask("token_valid", scoring.token_valid, "[B, T]", (batch, tokens), name, attn)
    _checks.mask("patch_valid", scoring.patch_valid, "[B, P]", (batch, patches), name, attn)
    if word_ids is not None:
        _checks.ids("word_ids", word_ids, "[B, T]", (batch, tokens), name, attn)

    def given(of: str, scores: Tensor | None, layout: str, size: int) -> Tensor | None:
        """Scores or noise of the caller, in the type of scores."""
        if scores is None:
            return None
        _checks.floating(of, scores)
        _checks.shape(of, scores, layout, (batch, size))
        _checks.same_device(of, scores, name, attn)
        return scores.to(torch.promote_types(scores.dtype, torch.float32))

    if token_scores is not None:  # no rule is asked, nor has it a gradient
        scoring = scoring._replace(lse=None, token_score="max")
    if tokens == 0:  # there is no row of CLS to read, and both rules give 0
        scoring = scoring._replace(patch_score="mean")
    ratios = (
        None if patch_k is not None else patch_ratio,
        None if token_k is not None else token_ratio,
    )
    width = None if word_ids is None else tokens
    return SyncRequest(
        scoring,
        count_of("patch_", patches, rows, attn.device, patch_k, ratios[0]),
        count_of("token_", tokens, rows, attn.device, token_k, ratios[1], width),
        given("patch_scores", patch_scores, "[B, P]", patches),
        given("token_scores", token_scores, "[B, T]", tokens),
        given("patch_noise", patch_noise, "[B, P]", patches),
        given("token_noise", token_noise, "[B, T]", tokens),
        word_ids,
    )


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
        [B, T]`` float32 (float64 for float64), without the noise, 0 at excluded positions (the
        caller's own as they came). The gradient flows from the scores to `attn` and `lse`, not from
        masks and ids.

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
    if lse is not None:
        lse = stack_layers("lse", lse, "B, H, T")
        _checks.floating("lse", lse)
        _checks.shape("lse", lse, "[(L,) B, H, T]", (layers, batch, heads, tokens))
        _checks.same_device("lse", lse, "attn", stacked)
    scoring = Scoring(
        stacked, lse, token_valid, patch_valid, patch_score, token_score, skip_keys, cls_index
    )
    return _select(
        _request(
            scoring,
            "attn",
            patch_ratio,
            token_ratio,
            patch_k,
            token_k,
            patch_scores,
            token_scores,
            patch_noise,
            token_noise,
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
    patch_ratio: float = 0.5,
    token_ratio: float = 0.15,
    patch_k: int | Tensor | None = None,
    token_k: int | Tensor | None = None,
    patch_valid: Tensor | None = None,
    word_ids: Tensor | None = None,
    patch_score: str = "mean",
    token_score: str = "max",
    patch_scores: Tensor | None = None,
    token_scores: Tensor | None = None,
    patch_noise: Tensor | None = None,
    token_noise: Tensor | None = None,
    skip_keys: int = 1,
    cls_index: int = 0,
) -> SyncMask:
    """`sync_topk_mask` from queries and keys, whose logits make every rule exact.

    Args:
        q: ``[B, H, T, D]`` text queries, a sequence of layers or ``[L, B, H, T, D]``.
        k: ``[B, H, S, D]`` image keys, likewise.
        token_valid: ``[B, T]`` bool, as in `sync_topk_mask`.
        v: ``[B, H, S, E]`` values, likewise, of the type of `q`. With it a patch's score weights
            the attention of each head by how far the patch's value lies from the mean value of the
            valid patches, ``‖v_p - v̄‖`` (norm-based attention).
        key_valid: ``[B, S]`` bool, False for keys outside the softmax.
        scale: factor of the logits, default ``D ** -0.5``.
        patch_ratio, token_ratio, patch_k, token_k, patch_valid, word_ids, patch_score, token_score,
            patch_scores, token_scores, patch_noise, token_noise, skip_keys, cls_index: as in
            `sync_topk_mask`.

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
    values = None
    if v is not None:
        if patch_scores is not None:
            raise ValueError("v and patch_scores exclude each other, got both")
        values = stack_layers("v", v, "B, H, S, E")
        _checks.dtype("v", values, queries.dtype)
        _checks.shape("v", values, "[(L,) B, H, S, E]", (*keys.shape[:-1], values.shape[-1]))
        _checks.same_device("v", values, "q", queries)
    # Both sides will have their scores: of attn only the shape counts.
    attn = queries.new_empty(keys.shape[3]).expand(1, batch, 1, words, -1)
    request = _request(
        Scoring(
            attn,
            None,
            token_valid,
            patch_valid,
            patch_score,
            token_score,
            skip_keys,
            cls_index,
        ),
        "q",
        patch_ratio,
        token_ratio,
        patch_k,
        token_k,
        patch_scores,
        token_scores,
        patch_noise,
        token_noise,
        word_ids,
    )
    if patch_scores is None or token_scores is None:
        patch, token = _scores_qk(
            ScoringQK(
                queries,
                keys,
                None if values is None else eager.value_distance(values, patch_valid, skip_keys),
                key_valid,
                token_valid,
                patch_valid,
                factor,
                *request.scoring[4:],
            )
        )
        request = request._replace(
            patch_scores=patch if patch_scores is None else request.patch_scores,
            token_scores=token if token_scores is None else request.token_scores,
        )
    return _select(request)
