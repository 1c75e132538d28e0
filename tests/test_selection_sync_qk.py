"""sync_topk_mask_qk: the rules from queries and keys, where every one of them is exact."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import syncmask_kernels as smk
from reference.ops import attention as attention_oracle
from reference.ops import selection as oracle
from tests.accuracy import assert_as_accurate
from tests.attention_cases import LAYOUTS
from tests.selection_cases import INF, RULES, assert_chosen, positions

SHAPES = [(2, 4, 4, 9, 33, 16), (1, 3, 12, 17, 198, 40), (1, 1, 2, 1, 2, 1), (1, 3, 3, 30, 66, 64)]


def case(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, Tensor]:
    """q, k, v with layers, and what counts of all sides; a last caption has no word and no key."""
    layers, batch, heads, words, keys, dim = shape
    generator = torch.Generator().manual_seed(seed)
    q = 2 * torch.randn(layers, batch, heads, words, dim, generator=generator)
    k, v = (torch.randn(layers, batch, heads, keys, dim, generator=generator) for _ in range(2))
    return {
        "q": q.to(dtype),
        "k": k.to(dtype),
        "v": v.to(dtype),
        "token_valid": positions(batch, words, 0.5, seed=1),
        "patch_valid": positions(batch, keys - 1, 0.8, seed=2),
        "key_valid": positions(batch, keys, 0.9, seed=3),
    }


def oracle_scores(
    inputs: dict[str, Tensor],
    rules: tuple[str, str],
    dtype: torch.dtype,
    scale: float = 0.3,
    cls_index: int = 0,
) -> tuple[Tensor, Tensor]:
    """Both scores in plain PyTorch of one type."""
    q, k = inputs["q"].to(dtype), inputs["k"].to(dtype)
    every_patch = torch.ones(k.shape[1], k.shape[3] - 1, dtype=torch.bool)
    every_word = torch.ones(q.shape[1], q.shape[3], dtype=torch.bool)
    words, patches = inputs.get("token_valid", every_word), inputs.get("patch_valid", every_patch)
    per_layer = [
        attention_oracle.attention(q[i], k[i], inputs.get("key_valid"), scale)
        for i in range(len(q))
    ]
    attn, lse = (list(part) for part in zip(*per_layer, strict=True))
    token = oracle.token_scores(attn, words, rules[1], lse=lse, patch_valid=patches)
    if "v" in inputs:
        v = inputs["v"].to(dtype)
        attn = [oracle.value_weighted(attn[i], v[i], patches) for i in range(len(v))]
    patch = oracle.patch_scores(attn, words, rules[0], patch_valid=patches, cls_index=cls_index)
    return patch, token


def check_scores(
    chosen: smk.SyncMask, inputs: dict[str, Tensor], rules: tuple[str, str], **options: Any
) -> None:
    truth = oracle_scores(inputs, rules, torch.float64, **options)
    plain = oracle_scores(inputs, rules, torch.float32, **options)
    for got, own, exact in zip(chosen[4:], plain, truth, strict=True):
        assert got.dtype == torch.float32
        # The worst score hangs on the rounding of a few logits, which is luck.
        assert_as_accurate(got, own, exact, factor=8.0)


def test_cases_have_captions_of_some_words() -> None:
    """Captions of all words or of none hide what is done with the words that do not count."""
    for shape in SHAPES[:2]:
        inputs = case(*shape)
        counted = inputs["token_valid"].float().mean(dim=1)
        assert ((counted > 0) & (counted < 1) & inputs["key_valid"].any(dim=1)).any()


@pytest.mark.parametrize("rules", RULES[:3], ids="-".join)
def test_words_that_do_not_count_have_no_weight(backend: str, rules: tuple[str, str]) -> None:
    inputs = case(*SHAPES[0])
    options = {"patch_score": rules[0], "token_score": rules[1]}
    wanted = smk.sync_topk_mask_qk(**inputs, **options)
    counted = inputs["token_valid"][None, :, None, :, None]
    inputs["q"] = torch.where(counted, inputs["q"], 100 * inputs["q"])
    torch.testing.assert_close(smk.sync_topk_mask_qk(**inputs, **options), wanted)


@pytest.mark.parametrize("weighted", [False, True], ids=["", "values"])
@pytest.mark.parametrize("rules", RULES, ids="-".join)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_scores(
    backend: str, shape: tuple[int, ...], rules: tuple[str, str], weighted: bool
) -> None:
    inputs = case(*shape)
    if not weighted:
        del inputs["v"]
    options: dict[str, Any] = {"scale": 0.3, "cls_index": shape[3] - 1}
    chosen = smk.sync_topk_mask_qk(**inputs, patch_score=rules[0], token_score=rules[1], **options)
    check_scores(chosen, inputs, rules, **options)
    sides = [
        (chosen.patch_mask, chosen.patch_ids, chosen.patch_scores, inputs["patch_valid"], 0.5),
        (chosen.token_mask, chosen.token_ids, chosen.token_scores, inputs["token_valid"], 0.15),
    ]
    for mask, ids, scores, valid, ratio in sides:
        assert_chosen(mask, ids, scores.detach(), valid, ratio=ratio)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rules", RULES, ids="-".join)
def test_half_types_are_summed_in_float32(
    backend: str, dtype: torch.dtype, rules: tuple[str, str]
) -> None:
    inputs = case(2, 3, 4, 9, 33, 40, dtype=dtype)
    chosen = smk.sync_topk_mask_qk(**inputs, scale=0.3, patch_score=rules[0], token_score=rules[1])
    check_scores(chosen, inputs, rules)


@pytest.mark.parametrize("rules", RULES, ids="-".join)
def test_everything_counts_by_default(backend: str, rules: tuple[str, str]) -> None:
    inputs = {name: case(2, 3, 4, 9, 33, 16)[name] for name in "qkv"}
    chosen = smk.sync_topk_mask_qk(**inputs, patch_score=rules[0], token_score=rules[1])
    check_scores(chosen, inputs, rules, scale=16**-0.5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_views(backend: str, layout: str) -> None:
    inputs = {name: LAYOUTS[layout](case(1, 3, 4, 9, 33, 16)[name][0])[None] for name in "qkv"}
    assert not inputs["q"].is_contiguous()
    chosen = smk.sync_topk_mask_qk(
        inputs["q"][0], inputs["k"][0], v=inputs["v"][0], token_score="dual"
    )
    check_scores(chosen, inputs, ("mean", "dual"), scale=0.25)


def test_layers_may_be_listed(backend: str) -> None:
    inputs = case(2, 3, 4, 9, 33, 16)
    listed = {name: list(inputs[name]) if name in "qkv" else inputs[name] for name in inputs}
    stacked = smk.sync_topk_mask_qk(**inputs, token_score="dual")
    chosen = smk.sync_topk_mask_qk(**listed, token_score="dual")  # type: ignore[arg-type]
    assert all(torch.equal(a, b) for a, b in zip(stacked, chosen, strict=True))


def test_keys_that_are_no_patches(backend: str) -> None:
    inputs = case(1, 2, 3, 7, 21, 16)
    for skip_keys in (0, 7, 21):
        chosen = smk.sync_topk_mask_qk(inputs["q"], inputs["k"], skip_keys=skip_keys)
        attn, _ = attention_oracle.attention(inputs["q"][0].double(), inputs["k"][0].double())
        valid = torch.ones(2, 7, dtype=torch.bool)
        truth = oracle.patch_scores([attn], valid, skip_keys=skip_keys)
        torch.testing.assert_close(chosen.patch_scores.double(), truth, rtol=1e-5, atol=1e-6)
        assert chosen.patch_mask.shape == (2, 21 - skip_keys)
        if skip_keys == 21:
            assert (chosen.token_scores == 0).all()


def test_own_scores_and_noise_and_words(backend: str) -> None:
    inputs = case(1, 4, 3, 11, 21, 16)
    del inputs["v"]
    rules = smk.sync_topk_mask_qk(**inputs)
    generator = torch.Generator().manual_seed(4)
    patch, token = (torch.randn(4, n, generator=generator) for n in (20, 11))
    word_ids = torch.randint(-1, 5, (4, 11), generator=generator)
    for given in ({"patch_scores": patch}, {"token_scores": token}):
        chosen = smk.sync_topk_mask_qk(**inputs, **given)
        assert torch.equal(chosen.patch_scores, given.get("patch_scores", rules.patch_scores))
        assert torch.equal(chosen.token_scores, given.get("token_scores", rules.token_scores))
    chosen = smk.sync_topk_mask_qk(
        **inputs,
        patch_noise=patch,
        token_noise=token,
        word_ids=word_ids,
        patch_k=torch.tensor([0, 3, 99, 5]),
        token_k=2,
    )
    assert torch.equal(chosen.patch_scores, rules.patch_scores)
    ks = torch.tensor([0, 3, 20, 5])
    noisy = rules.patch_scores + patch
    assert_chosen(chosen.patch_mask, chosen.patch_ids, noisy, inputs["patch_valid"], k=ks)
    words = oracle.word_mask(rules.token_scores + token, word_ids, k=2, valid=inputs["token_valid"])
    assert torch.equal(chosen.token_mask, words)
    assert torch.equal(chosen.token_ids, oracle.ids_of(words, 11))


def test_values_weight_patches_beside_own_word_scores(backend: str) -> None:
    inputs = case(1, 3, 4, 9, 33, 16)
    token = torch.randn(3, 9, generator=torch.Generator().manual_seed(4))
    chosen = smk.sync_topk_mask_qk(**inputs, scale=0.3, token_scores=token)
    patch, _ = oracle_scores(inputs, ("mean", "max"), torch.float64)
    plain, _ = oracle_scores(inputs, ("mean", "max"), torch.float32)
    assert_as_accurate(chosen.patch_scores, plain, patch)
    assert torch.equal(chosen.token_scores, token)


def test_nothing_is_scored_where_both_scores_are_given(backend: str) -> None:
    q, k = torch.full((3, 2, 9, 4), float("nan")), torch.full((3, 2, 12, 4), float("nan"))
    patch, token = torch.rand(3, 11, requires_grad=True), torch.rand(3, 9)
    chosen = smk.sync_topk_mask_qk(q, k, patch_scores=patch, token_scores=token)
    assert_chosen(chosen.patch_mask, chosen.patch_ids, patch.detach(), None, ratio=0.5)
    assert torch.equal(torch.autograd.grad(chosen.patch_scores.sum(), patch)[0], torch.ones(3, 11))


@pytest.mark.parametrize("rules", RULES, ids="-".join)
def test_broken_queries_are_those_of_eager(backend: str, rules: tuple[str, str]) -> None:
    inputs = case(1, 3, 2, 7, 21, 8)
    inputs["q"][0, 0, 1, 3, 2], inputs["k"][0, 1, 0, 5, 1] = float("nan"), INF
    chosen = smk.sync_topk_mask_qk(**inputs, patch_score=rules[0], token_score=rules[1])
    with smk.use_backend("eager"):
        wanted = smk.sync_topk_mask_qk(**inputs, patch_score=rules[0], token_score=rules[1])
    for got, expected in zip(chosen[4:], wanted[4:], strict=True):
        torch.testing.assert_close(got, expected, equal_nan=True)


def test_a_row_is_scored_alike_in_any_batch(backend: str) -> None:
    if backend == "eager":
        pytest.skip("PyTorch's own products may depend on the batch")
    inputs = case(2, 4, 3, 9, 33, 16)
    whole = smk.sync_topk_mask_qk(**inputs, token_score="dual")
    for b in range(4):
        row = {k: x[:, b : b + 1] if k in "qkv" else x[b : b + 1] for k, x in inputs.items()}
        alone = smk.sync_topk_mask_qk(**row, token_score="dual")
        assert all(torch.equal(a[b : b + 1], c) for a, c in zip(whole, alone, strict=True))


@pytest.mark.parametrize("factor", [1.0, 0.45, 0.1])
def test_words_share_a_patch_that_is_none_of_theirs(backend: str, factor: float) -> None:
    """Far below the CLS key a patch has no probability left, but its logits still differ."""
    q = (factor * torch.tensor([[[[10.0], [9.0]]]])).requires_grad_()
    k = torch.tensor([[[[20.0], [-1.0]]]], requires_grad=True)
    share = (k[0, 0, 1] * q[0, 0]).softmax(dim=0).T
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            scores = smk.sync_topk_mask_qk(q, k, scale=1.0, token_score="text_softmax").token_scores
        torch.testing.assert_close(scores, share.detach(), rtol=1e-5, atol=0.0)
    got = torch.autograd.grad(scores[0, 0], [q, k])
    for ours, wanted in zip(got, torch.autograd.grad(share[0, 0], [q, k]), strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("rules", RULES, ids="-".join)
def test_gradients_of_words_do_not_depend_on_what_does_not_count(
    backend: str, rules: tuple[str, str]
) -> None:
    inputs = {**case(1, 2, 2, 5, 9, 8), "patch_score": rules[0], "token_score": rules[1]}
    inputs["token_valid"] = torch.tensor([[True, True, False, True, False]] * 2)

    def grads(q: Tensor) -> tuple[Tensor, ...]:
        leaves = {"q": q.requires_grad_(), "k": inputs["k"].clone().requires_grad_()}
        chosen = smk.sync_topk_mask_qk(**(inputs | leaves))
        loss = (chosen.patch_scores * torch.arange(8)).sum() + chosen.token_scores.square().sum()
        return torch.autograd.grad(loss, list(leaves.values()))

    clean = inputs["q"].clone()
    dirty = clean.detach().masked_fill(~inputs["token_valid"][:, None, :, None], float("nan"))
    assert all(map(torch.equal, grads(dirty), grads(clean)))


@pytest.mark.parametrize("rules", RULES, ids="-".join)
@pytest.mark.parametrize("shape", [(1, 0, 2, 3, 5, 4), (1, 2, 2, 0, 5, 4), (1, 2, 2, 3, 1, 4)])
def test_empty(backend: str, shape: tuple[int, ...], rules: tuple[str, str]) -> None:
    _, batch, _, words, keys, _ = shape
    inputs = {name: case(*shape)[name] for name in "qkv"}
    chosen = smk.sync_topk_mask_qk(**inputs, patch_score=rules[0], token_score=rules[1])
    assert chosen.patch_scores.shape == chosen.patch_mask.shape == (batch, keys - 1)
    assert chosen.token_scores.shape == chosen.token_mask.shape == (batch, words)
    assert (chosen.token_scores == 0).all()
    if words == 0:
        assert (chosen.patch_scores == 0).all()


@pytest.mark.parametrize("rules", RULES, ids="-".join)
def test_gradients_are_those_of_the_plain_scores(backend: str, rules: tuple[str, str]) -> None:
    inputs = case(2, 3, 2, 5, 9, 8)

    def grads(scores: Callable[..., tuple[Tensor, Tensor]], of: torch.dtype) -> tuple[Tensor, ...]:
        leaves = {name: inputs[name].to(of).requires_grad_() for name in "qkv"}
        patch, token = scores({**inputs, **leaves})
        loss = (patch * torch.arange(8)).sum() + (token * torch.arange(5)).sum()
        return torch.autograd.grad(loss, list(leaves.values()))

    def mine(given: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        chosen = smk.sync_topk_mask_qk(
            **given, scale=0.3, patch_score=rules[0], token_score=rules[1]
        )
        return chosen.patch_scores, chosen.token_scores

    # The last caption has no key: the oracle's derivative does not exist there.
    del inputs["key_valid"]
    inputs["token_valid"][-1] = inputs["patch_valid"][-1] = True
    for got, own, truth in zip(
        grads(mine, torch.float32),
        grads(lambda given: oracle_scores(given, rules, torch.float32), torch.float32),
        grads(lambda given: oracle_scores(given, rules, torch.float64), torch.float64),
        strict=True,
    ):
        assert_as_accurate(got, own, truth)


@pytest.mark.parametrize("rules", RULES, ids="-".join)
def test_gradient_of_a_caption_without_keys_is_zero(backend: str, rules: tuple[str, str]) -> None:
    inputs = case(1, 3, 2, 5, 9, 8)
    inputs["token_valid"][:] = True
    leaves = {name: inputs.pop(name).requires_grad_() for name in "qkv"}
    chosen = smk.sync_topk_mask_qk(**leaves, **inputs, patch_score=rules[0], token_score=rules[1])
    loss = chosen.patch_scores.square().sum() + chosen.token_scores.square().sum()
    for grad in torch.autograd.grad(loss, list(leaves.values())):
        assert grad.isfinite().all()
        assert (grad[:, 2] == 0).all()
        assert (grad[:, 0] != 0).any()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"k": torch.ones(2, 3, 5, 7)}, ValueError, r"k must be \[\(L,\) B, H, S, D\]"),
        ({"v": torch.ones(2, 3, 4, 8)}, ValueError, r"v must be \[\(L,\) B, H, S, E\]"),
        ({"v": torch.ones(2, 3, 5, 8).half()}, TypeError, "v must be of type float32, got float16"),
        (
            {"v": torch.ones(2, 3, 5, 8), "patch_scores": torch.ones(2, 4)},
            ValueError,
            "v and patch_scores exclude each other",
        ),
        (
            {
                "v": torch.ones(2, 3, 5, 8),
                "patch_scores": torch.ones(2, 4),
                "token_scores": torch.ones(2, 4),
            },
            ValueError,
            "v and patch_scores exclude each other",
        ),
        ({"lse": torch.ones(2, 3, 4)}, TypeError, "unexpected keyword argument 'lse'"),
        ({"patch_score": "max"}, ValueError, "patch_score must be one of 'mean', 'cls'"),
        ({"token_valid": torch.ones(2, 5).bool()}, ValueError, r"token_valid must be \[B, T\] ="),
        ({"patch_valid": torch.ones(2, 5).bool()}, ValueError, r"patch_valid must be \[B, P\] ="),
        ({"token_valid": torch.ones(2, 4, device="meta").bool()}, ValueError, "device of q"),
        ({"patch_ratio": 1.5}, ValueError, r"patch_ratio must be in \[0, 1\], got 1.5"),
        ({"token_noise": torch.ones(2, 5)}, ValueError, r"token_noise must be \[B, T\] = \(2, 4\)"),
        ({"word_ids": torch.ones(2, 4)}, TypeError, "word_ids must be of type int64"),
        ({"cls_index": 4}, ValueError, "cls_index must be in"),
    ],
)
def test_bad_input_is_refused_before_scoring(
    change: dict[str, Any],
    error: type[Exception],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(smk.selection.sync, "_scores_qk", None)
    arguments = {"q": torch.ones(2, 3, 4, 8), "k": torch.ones(2, 3, 5, 8), **change}
    with pytest.raises(error, match=message):
        smk.sync_topk_mask_qk(**arguments)
