"""The selection operators against PyTorch and their floors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import syncmask_kernels as smk
from benchmarks.bench_attention import Inputs, plain_attention_map, product
from benchmarks.checks import as_accurate, assert_chooses_best
from benchmarks.inputs import ATTENTION, DTYPES, QUERIES, attention, dtype_name, qkv, words_of
from benchmarks.measure import Check, rotation
from benchmarks.report import Case
from reference.ops import attention as attention_oracle
from reference.ops import selection as oracle


def plain_sync_topk_mask(inputs: Inputs) -> Inputs:
    """The strongest plain PyTorch for the masks alone: no defined order of ties, no ids."""
    attn, valid = inputs
    return plain_selection(attn.mean(dim=1, dtype=torch.float32)[..., 1:], valid)


def plain_sync_topk_mask_qk(inputs: Inputs) -> Inputs:
    q, k, v, valid = inputs
    return plain_selection(plain_attention_map((q, k, v)), valid)


def plain_selection(mean: Tensor, valid: Tensor) -> Inputs:
    """Head mean [B, T, P], valid [B, T] -> masks [B, P] and [B, T]: half of the patches, and the
    ceiling of 0.15 of the words.
    """
    weights = valid.float() / valid.sum(dim=1, keepdim=True)
    patch = torch.bmm(weights.unsqueeze(1), mean).squeeze(1)
    token = mean.amax(dim=-1).masked_fill(~valid, float("-inf"))
    chosen = patch.topk((patch.shape[1] + 1) // 2, sorted=False).indices
    patch_mask = torch.zeros_like(patch, dtype=torch.bool).scatter_(1, chosen, True)
    counts = (valid.sum(dim=1, keepdim=True) * 3 + 19) // 20
    ranks = token.argsort(dim=1, descending=True).argsort(dim=1)
    return patch_mask, ranks < counts


def by_eager(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*arguments: Any) -> Any:
        with smk.use_backend("eager"):
            return function(*arguments)

    return call


def right_masks(mean: Tensor, valid: Tensor, dtype: torch.dtype) -> Check:
    """By the true head mean; plain PyTorch may round to `dtype`, this library to float32."""
    words = valid.sum(dim=1)
    patch = (mean * valid.unsqueeze(-1)).sum(dim=1) / words.unsqueeze(1)
    patches = torch.full_like(words, (mean.shape[2] + 1) // 2)
    listed = torch.ones_like(patch, dtype=torch.bool)

    def check(got: Sequence[Tensor]) -> None:
        rounded = torch.float32 if isinstance(got, smk.SyncMask) else dtype
        assert_chooses_best(got[0], patch, listed, patches, rounded)
        assert_chooses_best(got[1], mean.amax(dim=-1), valid, (words * 3 + 19) // 20, rounded)

    return check


@pytest.mark.parametrize("shortest", [8, None], ids=["8-to-T-words", "all-words"])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("shape", ATTENTION, ids=str)
def bench_sync_topk_mask(
    compare: Callable[..., None],
    compiled: Callable[..., Any],
    shape: tuple[int, ...],
    dtype: torch.dtype,
    shortest: int | None,
) -> None:
    batch, _, words, _ = shape
    inputs = rotation(
        lambda generator: (
            attention(generator, shape, dtype),
            words_of(generator, batch, words, words if shortest is None else shortest),
        )
    )
    attn, valid = inputs[0]
    captions = "all words" if shortest is None else f"{shortest} to {words} words"
    compare(
        Case("sync_topk_mask", shape, dtype, captions),
        {
            "attn.sum()": lambda x: x[0].sum(),
            "plain PyTorch": plain_sync_topk_mask,
            **compiled(plain_sync_topk_mask),
            "eager backend": by_eager(lambda x: smk.sync_topk_mask(*x)),
            "this library": lambda x: smk.sync_topk_mask(*x),
        },
        inputs,
        right_masks(attention_oracle.head_average([attn.double()]), valid, torch.float32),
    )


@pytest.mark.parametrize(("shape", "dtype", "views"), QUERIES)
def bench_sync_topk_mask_qk(
    compare: Callable[..., None],
    compiled: Callable[..., Any],
    shape: tuple[int, ...],
    dtype: torch.dtype,
    views: bool,
) -> None:
    batch, _, words, _, _ = shape
    inputs = rotation(
        lambda generator: (
            *qkv(generator, shape, dtype, views),
            words_of(generator, batch, words, 8),
        )
    )
    q, k, _, valid = inputs[0]
    note = f"8 to {words} words" + ", [B, T, H, D] views" * views
    compare(
        Case("sync_topk_mask_qk", shape, dtype, note),
        {
            "q @ k.mT": product,
            "plain PyTorch": plain_sync_topk_mask_qk,
            **compiled(plain_sync_topk_mask_qk),
            "this library": lambda x: smk.sync_topk_mask_qk(x[0], x[1], x[3]),
        },
        inputs,
        right_masks(attention_oracle.attention_map(q.double(), k.double()), valid, dtype),
    )


def plain_topk_mask(scores: Tensor) -> Tensor:
    chosen = scores.topk(scores.shape[1] // 2, sorted=False).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, chosen, True)


@pytest.mark.parametrize("shape", [(512, 256), (64, 577)], ids=str)
def bench_topk_mask(
    compare: Callable[..., None], compiled: Callable[..., Any], shape: tuple[int, int]
) -> None:
    inputs = rotation(lambda generator: torch.randn(shape, generator=generator))
    wanted = oracle.topk_mask(inputs[0], k=shape[1] // 2).to(inputs[0].device)

    def check(got: Any) -> None:
        assert torch.equal(got.mask if isinstance(got, smk.TopK) else got, wanted)

    compare(
        Case("topk_mask", shape, torch.float32, "half of each row"),
        {
            "scores.sum()": torch.sum,
            "topk + scatter": plain_topk_mask,
            **compiled(plain_topk_mask),
            "this library": lambda scores: smk.topk_mask(scores, k=scores.shape[1] // 2),
        },
        inputs,
        check,
    )


def plain_attentive_mask(scores: Tensor) -> Inputs:
    """The quarters of the highest and of the lowest scores."""
    masks = torch.zeros(2, *scores.shape, dtype=torch.bool, device=scores.device)
    k = scores.shape[1] // 4
    for mask, largest in zip(masks, (True, False), strict=True):
        mask.scatter_(1, scores.topk(k, largest=largest, sorted=False).indices, True)
    return masks[0], masks[1]


def bench_attentive_mask(compare: Callable[..., None], compiled: Callable[..., Any]) -> None:
    shape = (512, 256)
    inputs = rotation(lambda generator: torch.randn(shape, generator=generator))
    wanted = [
        oracle.topk_mask(inputs[0], k=shape[1] // 4, largest=largest).to(inputs[0].device)
        for largest in (True, False)
    ]

    def check(got: Any) -> None:
        masks = [part.mask if isinstance(part, smk.TopK) else part for part in got]
        assert all(map(torch.equal, masks, wanted))

    compare(
        Case("attentive_mask", shape, torch.float32, "both quarters of each row"),
        {
            "scores.sum()": torch.sum,
            "2 x (topk + scatter)": plain_attentive_mask,
            **compiled(plain_attentive_mask),
            "this library": lambda scores: smk.attentive_mask(
                scores, high_ratio=0.25, low_ratio=0.25
            ),
        },
        inputs,
        check,
    )


def plain_vote_keywords(attn_row: Tensor) -> Tensor:
    """4 votes of each head, 5 words kept; all of them have votes in what is drawn here."""
    batch, _, words = attn_row.shape
    votes = attn_row.topk(4, sorted=False).indices.flatten(1)
    ballots = torch.zeros(batch, words, dtype=torch.int64, device=attn_row.device)
    ballots.scatter_add_(1, votes, torch.ones_like(votes))
    order = ballots.sort(dim=1, descending=True, stable=True).indices
    return order[:, :5].sort(dim=1).values


def bench_vote_keywords(compare: Callable[..., None], compiled: Callable[..., Any]) -> None:
    shape = (64, 12, 30)
    inputs = rotation(lambda generator: attention(generator, shape, torch.float32))
    wanted = oracle.vote_keywords(inputs[0], votes=4, keep=5).to(inputs[0].device)

    def check(got: Tensor) -> None:
        assert torch.equal(got, wanted)

    compare(
        Case("vote_keywords", shape, torch.float32, "4 votes, 5 kept"),
        {
            "attn_row.sum()": torch.sum,
            "plain PyTorch": plain_vote_keywords,
            **compiled(plain_vote_keywords),
            "this library": lambda attn_row: smk.vote_keywords(attn_row, votes=4, keep=5),
        },
        inputs,
        check,
    )


def plain_max_similarity(inputs: Inputs) -> Tensor:
    patches, tokens, valid = inputs
    return (patches @ tokens.mT).masked_fill(~valid.unsqueeze(1), float("-inf")).amax(dim=-1)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        pytest.param(shape, dtype, id=f"{shape}-{dtype_name(dtype)}")
        for shape in [(64, 256, 30, 512), (37, 197, 23, 200)]
        for dtype in DTYPES
    ],
)
def bench_max_similarity(
    compare: Callable[..., None],
    compiled: Callable[..., Any],
    shape: tuple[int, ...],
    dtype: torch.dtype,
) -> None:
    batch, patches, words, dim = shape
    inputs = rotation(
        lambda generator: (
            torch.randn(batch, patches, dim, generator=generator).to(dtype),
            torch.randn(batch, words, dim, generator=generator).to(dtype),
            words_of(generator, batch, words, 8),
        )
    )
    left, right, valid = inputs[0]
    compare(
        Case("max_similarity", shape, dtype, f"8 to {words} words"),
        {
            "patches @ tokens.mT": lambda x: x[0] @ x[1].mT,
            "plain PyTorch": plain_max_similarity,
            **compiled(plain_max_similarity),
            "this library": lambda x: smk.max_similarity(*x),
        },
        inputs,
        as_accurate(
            [plain_max_similarity(inputs[0])],
            [oracle.max_similarity(left.double(), right.double(), valid)],
        ),
    )
