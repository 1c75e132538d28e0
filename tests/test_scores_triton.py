"""The Triton kernels of `sync_topk_mask_qk` and `max_similarity`, and what is made of `topk_mask`.

As for tests/test_selection_triton.py: ``TRITON_INTERPRET=1 pytest <this file>``.
"""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

import syncmask_kernels as smk
from reference.ops import attention as attention_oracle
from reference.ops import selection as oracle
from syncmask_kernels.backends import BackendError, eager, triton
from tests.accuracy import assert_as_accurate
from tests.compiling import assert_compiles_once
from tests.on_triton import DEVICE, guarded_outputs, inside_nan, serve
from tests.sync_cases import seeded

NAN, INF = float("nan"), float("inf")
NOT_FINITE = pytest.mark.filterwarnings("ignore:(invalid value|All-NaN):RuntimeWarning")
RULES = [(p, t) for p in ("mean", "cls") for t in ("max", "text_softmax", "dual")]


# ---- sync_topk_mask_qk ----


def case(
    batch: int = 2,
    heads: int = 2,
    words: int = 6,
    keys: int = 40,
    dim: int = 8,
    layers: int = 1,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> dict[str, Any]:
    return {
        "q": 2 * torch.randn(layers, batch, heads, words, dim, generator=seeded(1)).to(dtype),
        "k": torch.randn(layers, batch, heads, keys, dim, generator=seeded(2)).to(dtype),
        "token_valid": torch.rand(batch, words, generator=seeded(3)) < 0.7,
        **options,
    }


def everything(arguments: dict[str, Any]) -> dict[str, Any]:
    """The same with every option."""
    layers, batch, heads, keys, _ = arguments["k"].shape
    return arguments | {
        "v": torch.randn(layers, batch, heads, keys, 5, generator=seeded(4)),
        "key_valid": torch.rand(batch, keys, generator=seeded(5)) < 0.7,
        "patch_valid": torch.rand(batch, keys - 2, generator=seeded(6)) < 0.7,
        "scale": 0.4,
        "skip_keys": 2,
    }


def true_scores(arguments: dict[str, Any]) -> tuple[Tensor, Tensor]:
    skip_keys = arguments.get("skip_keys", 1)
    patch_valid, valid = arguments.get("patch_valid"), arguments["token_valid"]
    pairs = zip(arguments["q"].double(), arguments["k"].double(), strict=True)
    found = [
        attention_oracle.attention(q, k, arguments.get("key_valid"), arguments.get("scale"))
        for q, k in pairs
    ]
    layers, lse = [attn for attn, _ in found], [lse for _, lse in found]
    weighted = layers
    if "v" in arguments:
        weighted = [
            oracle.value_weighted(attn, v, patch_valid, skip_keys)
            for attn, v in zip(layers, arguments["v"].double(), strict=True)
        ]
    known = {"patch_valid": patch_valid, "skip_keys": skip_keys}
    rules = arguments.get("patch_score", "mean"), arguments.get("token_score", "max")
    cls_index = arguments.get("cls_index", 0)
    return (
        oracle.patch_scores(weighted, valid, rules[0], cls_index=cls_index, **known),
        oracle.token_scores(layers, valid, rules[1], lse=lse, **known),
    )


def check(arguments: dict[str, Any]) -> smk.SyncMask:
    got, plain = (serve(smk.sync_topk_mask_qk, b, arguments) for b in ("triton", "eager"))
    for ours, theirs, truth in zip(got[4:], plain[4:], true_scores(arguments), strict=True):
        assert_as_accurate(ours, theirs, truth, factor=4.0)
    wanted = (
        oracle.topk_mask(got.patch_scores, ratio=0.5, valid=arguments.get("patch_valid")),
        oracle.topk_mask(got.token_scores, ratio=0.15, valid=arguments["token_valid"]),
    )
    assert torch.equal(got.patch_mask, wanted[0])
    assert torch.equal(got.token_mask, wanted[1])
    return got


@pytest.mark.parametrize("whole", [False, True], ids=["plain", "everything"])
@pytest.mark.parametrize(("patch_score", "token_score"), RULES)
def test_rules(patch_score: str, token_score: str, whole: bool) -> None:
    arguments = case(layers=2, patch_score=patch_score, token_score=token_score, cls_index=2)
    arguments["token_valid"][:, 2] = torch.tensor([True, False])
    check(everything(arguments) if whole else arguments)


@pytest.mark.parametrize("token_score", ["max", "text_softmax", "dual"])
@pytest.mark.parametrize(("words", "keys", "dim"), [(1, 2, 1), (33, 66, 40), (5, 130, 16)])
def test_sizes(words: int, keys: int, dim: int, token_score: str) -> None:
    """Sizes around those of the tiles."""
    check(case(1, 2, words, keys, dim, token_score=token_score))


@pytest.mark.parametrize("token_score", ["max", "dual"])
def test_half_types(token_score: str) -> None:
    check(case(dtype=torch.float16, token_score=token_score))


def test_words_share_a_patch_that_is_none_of_theirs() -> None:
    """Far below the CLS key a patch has no probability left, but its logits still differ."""
    q, k = torch.tensor([[[[10.0], [9.0]]]]), torch.tensor([[[[20.0], [-1.0]]]])
    arguments = {"q": q, "k": k, "scale": 1.0, "token_score": "text_softmax"}
    scores = serve(smk.sync_topk_mask_qk, "triton", arguments).token_scores
    torch.testing.assert_close(scores, torch.tensor([[-10.0, -9.0]]).softmax(dim=1))


@pytest.mark.parametrize("token_score", ["max", "text_softmax", "dual"])
def test_rows_without_words_keys_or_patches(token_score: str) -> None:
    arguments = case(4, heads=1, token_score=token_score)
    arguments["token_valid"][1] = False
    arguments["key_valid"] = torch.ones(4, 40, dtype=torch.bool)
    arguments["key_valid"][2] = False
    arguments["patch_valid"] = torch.ones(4, 39, dtype=torch.bool)
    arguments["patch_valid"][3] = False
    got = check(arguments)
    assert (got.patch_scores[1:] == 0).all()
    assert (got.token_scores[1:] == 0).all()


@pytest.mark.parametrize("sizes", [(0, 2, 3, 5), (2, 2, 0, 5), (2, 2, 3, 1), (2, 2, 0, 1)])
def test_empty(sizes: tuple[int, ...]) -> None:
    got = serve(smk.sync_topk_mask_qk, "triton", case(*sizes, token_score="dual"))
    assert got.patch_scores.tolist() == [[0.0] * (sizes[3] - 1)] * sizes[0]
    assert got.token_scores.tolist() == [[0.0] * sizes[2]] * sizes[0]


@pytest.mark.parametrize(("patch_score", "token_score"), RULES)
def test_reads_only_what_counts(patch_score: str, token_score: str) -> None:
    """Invalid words and keys, and what lies around q and k, never show."""
    arguments = everything(case(patch_score=patch_score, token_score=token_score, cls_index=1))
    arguments["token_valid"][:, 1] = True
    clean = serve(smk.sync_topk_mask_qk, "triton", arguments)
    words, keys = ~arguments["token_valid"][:, None, :, None], ~arguments["key_valid"]
    dirty = arguments | {
        "q": inside_nan(arguments["q"].masked_fill(words, NAN)),
        "k": inside_nan(arguments["k"].masked_fill(keys[:, None, :, None], NAN)),
    }
    assert all(map(torch.equal, serve(smk.sync_topk_mask_qk, "triton", dirty), clean))


@NOT_FINITE
@pytest.mark.parametrize("token_score", ["max", "text_softmax", "dual"])
def test_not_finite(token_score: str) -> None:
    arguments = case(4, 1, 5, 70, token_score=token_score)
    arguments["token_valid"][:] = True
    q, k = arguments["q"][0], arguments["k"][0]
    q[0, 0, 1, 0] = NAN
    k[1, 0, 66] = NAN
    k[2, 0, 3] = INF
    k[2, 0, 3, 1:] = 0
    got, plain = (serve(smk.sync_topk_mask_qk, b, arguments) for b in ("triton", "eager"))
    for ours, theirs in zip(got[4:], plain[4:], strict=True):
        assert theirs[:3].isnan().any(dim=1).all()
        assert theirs[3].isfinite().all()
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7, equal_nan=True)


def test_own_scores_need_no_kernel() -> None:
    arguments = case(patch_scores=torch.rand(2, 39), token_scores=torch.rand(2, 6))
    got, plain = (serve(smk.sync_topk_mask_qk, b, arguments) for b in ("triton", "eager"))
    assert all(map(torch.equal, got, plain))


@pytest.mark.parametrize("token_score", ["max", "dual"])
def test_same_bits_in_any_batch_run_after_run(token_score: str) -> None:
    arguments = case(2, 2, 5, 70, token_score=token_score)
    whole = serve(smk.sync_topk_mask_qk, "triton", arguments)
    assert all(map(torch.equal, serve(smk.sync_topk_mask_qk, "triton", arguments), whole))
    row = {name: arguments[name][:, :1] for name in ("q", "k")}
    row["token_valid"] = arguments["token_valid"][:1]
    alone = serve(smk.sync_topk_mask_qk, "triton", arguments | row)
    assert all(torch.equal(ours, theirs[:1]) for ours, theirs in zip(alone, whole, strict=True))


# ---- max_similarity, attentive_mask, vote_keywords ----


def best_tokens(patches: Tensor, tokens: Tensor, valid: Tensor | None = None) -> Any:
    """The kernel's scores and ids, and eager's."""
    moved = [None if t is None else t.to(DEVICE) for t in (patches, tokens, valid)]
    with guarded_outputs():
        got = triton.KERNELS["max_similarity"].run(*moved)
    plain = eager.KERNELS["max_similarity"].run(patches, tokens, valid)
    return [t.cpu() for t in got], plain


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("sizes", [(1, 1, 1), (65, 7, 40), (20, 70, 130)])
def test_max_similarity(sizes: tuple[int, int, int], dtype: torch.dtype) -> None:
    count, words, dim = sizes
    patches = torch.randn(2, count, dim, generator=seeded()).to(dtype)
    tokens = torch.randn(2, words, dim, generator=seeded(1)).to(dtype)
    valid = torch.rand(2, words, generator=seeded(2)) < 0.6
    valid[0] = True
    for mask in (None, valid):
        got, plain = best_tokens(patches, tokens, mask)
        similarity = patches.double() @ tokens.double().mT
        if mask is not None:
            similarity = similarity.masked_fill(~mask[:, None], -INF)
        truth = similarity.amax(dim=-1)
        empty = torch.zeros(2, 1).bool() if mask is None else ~mask.any(dim=-1, keepdim=True)
        assert_as_accurate(got[0], plain[0], truth.masked_fill(empty, 0.0), factor=4.0)
        assert torch.equal(got[1], plain[1])


@NOT_FINITE
def test_max_similarity_of_ties_and_of_what_is_not_finite() -> None:
    """Whole numbers, so that sums are exact; ties and NaN within a tile and between two."""
    tokens = torch.randint(-3, 4, (4, 150, 3), generator=seeded()).float()
    tokens[0, 100:] = tokens[0, :50]
    tokens[1, 40] = tokens[1, 90, 2] = tokens[1, 30, 1] = NAN
    tokens[2, 70] = INF
    tokens[2, 80] = -INF
    tokens[3] = -INF
    patches = torch.randint(-3, 4, (4, 70, 3), generator=seeded(1)).float()
    patches[3] = 1.0
    valid = torch.rand(4, 150, generator=seeded(2)) < 0.8
    for mask in (None, valid, valid & (torch.arange(150) != 40)):
        got, plain = best_tokens(patches, tokens, mask)
        torch.testing.assert_close(got[0], plain[0], rtol=0, atol=0, equal_nan=True)
        assert torch.equal(got[1], plain[1])


@pytest.mark.parametrize("sizes", [(0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 0, 5), (2, 3, 4, 0)])
def test_max_similarity_empty(sizes: tuple[int, ...]) -> None:
    batch, count, words, dim = sizes
    got, plain = best_tokens(torch.ones(batch, count, dim), torch.ones(batch, words, dim))
    assert all(map(torch.equal, got, plain))


def test_max_similarity_reads_only_what_counts() -> None:
    patches, tokens = torch.randn(2, 40, 9), torch.randn(2, 20, 9)
    valid = torch.rand(2, 20, generator=seeded()) < 0.6
    wanted, _ = best_tokens(patches, tokens, valid)
    dirty = inside_nan(tokens.masked_fill(~valid[..., None], NAN))
    got, _ = best_tokens(inside_nan(patches), dirty, valid)
    assert all(map(torch.equal, got, wanted))


def test_similarities_are_never_in_memory() -> None:
    sizes = []
    empty = torch.empty

    def watched(size: Any, **options: Any) -> Tensor:
        sizes.append(torch.Size(size).numel())
        return empty(size, **options)

    patches, tokens = torch.rand(2, 40, 8, device=DEVICE), torch.rand(2, 30, 8, device=DEVICE)
    with mock.patch.object(torch, "empty", watched), smk.use_backend("triton"):
        smk.max_similarity(patches, tokens)
    assert sizes == [80, 80]


def test_attentive_mask() -> None:
    scores = torch.randint(5, (3, 50), generator=seeded()).float()
    valid = torch.rand(3, 50, generator=seeded(1)) < 0.8
    arguments = {"scores": scores.to(DEVICE), "valid": valid.to(DEVICE)}
    answers = []
    for backend in ("triton", "eager"):
        with smk.use_backend(backend):
            answers.append(smk.attentive_mask(**arguments, high_ratio=0.3, low_ratio=0.5))
    for ours, theirs in zip(*answers, strict=True):
        assert all(map(torch.equal, ours, theirs))


def test_vote_keywords() -> None:
    attn_row = torch.rand(3, 4, 20, generator=seeded()).to(DEVICE)
    valid = torch.rand(3, 20, generator=seeded(1)).to(DEVICE) < 0.8
    answers = []
    for backend in ("triton", "eager"):
        with smk.use_backend(backend):
            answers.append(smk.vote_keywords(attn_row, votes=4, keep=5, valid=valid))
    assert torch.equal(*answers)


# ---- registration ----


def test_gradients_are_those_of_eager() -> None:
    grads = []
    patches, tokens = torch.randn(1, 4, 3), torch.randn(1, 5, 3)
    for backend in ("eager", "triton"):
        tensors = [tensor.clone().requires_grad_() for tensor in (patches, tokens)]
        arguments = dict(zip(("patches", "tokens"), tensors, strict=True))
        scores = serve(smk.max_similarity, backend, arguments)
        grads.append(torch.autograd.grad(scores.square().sum(), tensors))
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_opcheck() -> None:
    from syncmask_kernels.backends.triton import scores

    arguments = case(2, 2, 3, 6, 4)
    q, k, valid = (arguments[name].to(DEVICE) for name in ("q", "k", "token_valid"))
    distance = torch.rand(1, 2, 2, 6, device=DEVICE)
    turned = q.transpose(2, 3).contiguous().transpose(2, 3)
    torch.library.opcheck(
        scores._sync_scores_qk, (turned, k, distance, None, valid, None, 0.5, 1, 2, 1)
    )
    torch.library.opcheck(scores._max_similarity, (q[0, 0], k[0, 0], None))


def test_compiles() -> None:
    def scored(q: Tensor, k: Tensor, valid: Tensor) -> tuple[Tensor, ...]:
        chosen = smk.sync_topk_mask_qk(q, k, valid, token_score="dual", token_k=2)
        return *chosen, smk.max_similarity(k[0, :, 0], q[0, :, 0], valid)

    calls = []
    for batch, words, keys in [(2, 5, 7), (4, 6, 9)]:
        arguments = case(batch, 3, words, keys)
        names = ("q", "k", "token_valid")
        calls.append(tuple(arguments[name].to(DEVICE) for name in names))
    with smk.use_backend("triton"):
        assert_compiles_once(scored, calls)


def test_refusals() -> None:
    q = torch.zeros(1, 1, triton.MAX_SHARED_QUERIES + 1, 3, device=DEVICE)
    wide = q.new_zeros(1, 1, 2, triton.MAX_HEAD_DIM + 1)
    many = q.new_zeros(1, 1, triton.MAX_POSITIONS + 2, 3)
    calls = [
        (lambda: smk.sync_topk_mask_qk(q, q, token_score="dual"), "'dual' over 129 words"),
        (lambda: smk.sync_topk_mask_qk(q, many), "at most 8192"),
        (lambda: smk.sync_topk_mask_qk(wide, wide), "heads of 129 columns"),
        (lambda: smk.sync_topk_mask_qk(q.double(), q.double()), "float64"),
        (lambda: smk.max_similarity(q[0].double(), q[0].double()), "float64"),
    ]
    for call, reason in calls:
        with smk.use_backend("triton"), pytest.raises(BackendError, match=reason):
            call()
