"""sync_topk_mask: scores against the oracle, selections exact for the scores that are returned."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

import syncmask_kernels as smk
from reference.ops import selection as oracle
from tests.accuracy import assert_as_accurate
from tests.selection_cases import (
    INF,
    KINDS,
    NAN,
    RULES,
    adversarial,
    assert_chosen,
    flushed_denormals,
    positions,
)
from tests.serving import backend_without_autograd

SHAPES = [
    (1, 4, 12, 30, 257),
    (2, 3, 7, 23, 198),
    (1, 2, 1, 1, 2),
    (3, 2, 2, 9, 18),
    (1, 3, 2, 5, 9),
]


def case(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Attention with its lse, and positions of both sides that count; one row has no word."""
    generator = torch.Generator().manual_seed(seed)
    _, batch, _, tokens, keys = shape
    logits = 3 * torch.randn(shape, generator=generator)
    token_valid = torch.rand(batch, tokens, generator=generator) < 0.7
    token_valid[-1] = False
    token_valid[0, 0] = True
    patch_valid = torch.rand(batch, keys - 1, generator=generator) < 0.8
    return {
        "attn": logits.softmax(dim=-1).to(dtype),
        "lse": logits.logsumexp(dim=-1),
        "token_valid": token_valid,
        "patch_valid": patch_valid,
    }


def oracle_scores(
    inputs: dict[str, Tensor],
    rules: tuple[str, str],
    dtype: torch.dtype,
    with_lse: bool = True,
    cls_index: int = 0,
) -> tuple[Tensor, Tensor]:
    """Both scores in plain PyTorch of one type."""
    layers = list(inputs["attn"].to(dtype))
    lse = list(inputs["lse"].to(dtype)) if with_lse else None
    valid, patches = inputs["token_valid"], inputs["patch_valid"]
    return (
        oracle.patch_scores(layers, valid, rules[0], patch_valid=patches, cls_index=cls_index),
        oracle.token_scores(layers, valid, rules[1], lse=lse, patch_valid=patches),
    )


@pytest.mark.parametrize("with_lse", [False, True], ids=["probabilities", "lse"])
@pytest.mark.parametrize("rules", RULES, ids="-".join)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_scores(
    backend: str, shape: tuple[int, ...], rules: tuple[str, str], with_lse: bool
) -> None:
    inputs = case(*shape)
    cls_index = shape[3] - 1
    given = inputs if with_lse else {k: v for k, v in inputs.items() if k != "lse"}
    chosen = smk.sync_topk_mask(
        **given, patch_score=rules[0], token_score=rules[1], cls_index=cls_index
    )
    truth = oracle_scores(inputs, rules, torch.float64, with_lse, cls_index)
    plain = oracle_scores(inputs, rules, torch.float32, with_lse, cls_index)
    for got, own, exact in zip(chosen[4:], plain, truth, strict=True):
        assert got.dtype == torch.float32
        assert_as_accurate(got, own, exact)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rules", RULES, ids="-".join)
def test_half_types_are_summed_in_float32(
    backend: str, dtype: torch.dtype, rules: tuple[str, str]
) -> None:
    inputs = case(2, 3, 5, 12, 50, dtype=dtype)
    if dtype == torch.float16:
        inputs["attn"][0, 0, 0, 0, 1:4] = torch.tensor([6e-8, 1.2e-5, 0.0])  # its denormals
    chosen = smk.sync_topk_mask(**inputs, patch_score=rules[0], token_score=rules[1])
    truth = oracle_scores(inputs, rules, torch.float64)
    plain = oracle_scores(inputs, rules, torch.float32)
    for got, own, exact in zip(chosen[4:], plain, truth, strict=True):
        assert_as_accurate(got, own, exact)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"patch_ratio": 0.07, "token_ratio": 1 / 3},
        {"patch_ratio": 0.0, "token_ratio": 1.0},
        {"patch_k": 3, "token_k": 100},
        {"patch_k": 0, "token_k": 1},
    ],
    ids=str,
)
@pytest.mark.parametrize("noisy", [False, True], ids=["", "noise"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_selection_is_exact_for_the_scores_returned(
    backend: str, shape: tuple[int, ...], noisy: bool, options: dict[str, Any]
) -> None:
    inputs = case(*shape)
    _, batch, _, tokens, keys = shape
    if noisy:
        options = {
            **options,
            "patch_noise": torch.randn(batch, keys - 1),
            "token_noise": torch.randn(batch, tokens),
        }
    chosen = smk.sync_topk_mask(**inputs, **options)
    sides = [
        ("patch", keys - 1, chosen.patch_mask, chosen.patch_ids, chosen.patch_scores),
        ("token", tokens, chosen.token_mask, chosen.token_ids, chosen.token_scores),
    ]
    for side, n, mask, ids, scores in sides:
        default = {"patch": 0.5, "token": 0.15}[side]
        k = options.get(f"{side}_k")
        ratio = None if k is not None else options.get(f"{side}_ratio", default)
        scores = scores + options.get(f"{side}_noise", 0.0)
        expected = oracle.topk_mask(scores, k=k, ratio=ratio, valid=inputs[f"{side}_valid"])
        assert torch.equal(mask, expected)
        width = k if k is not None else oracle.wanted(n, None, ratio)
        assert torch.equal(ids, oracle.ids_of(expected, width))


@pytest.mark.parametrize("patch_score", ["mean", "cls"])
def test_scores_of_many_words(backend: str, patch_score: str) -> None:
    inputs = case(1, 2, 5, 150, 301)
    chosen = smk.sync_topk_mask(**inputs, patch_score=patch_score, cls_index=140)
    rules = (patch_score, "max")
    truth = oracle_scores(inputs, rules, torch.float64, cls_index=140)
    plain = oracle_scores(inputs, rules, torch.float32, cls_index=140)
    for got, own, exact in zip(chosen[4:], plain, truth, strict=True):
        assert_as_accurate(got, own, exact)


def test_tied_and_broken_scores(backend: str) -> None:
    attn = torch.full((2, 2, 6, 9), 1 / 9)
    attn[1, 0, 2, 4] = float("nan")
    chosen = smk.sync_topk_mask(attn, patch_k=3, token_k=2)
    assert chosen.patch_ids.tolist() == [[0, 1, 2], [0, 1, 2]]
    assert chosen.token_ids.tolist() == [[0, 1], [0, 1]]
    assert chosen.patch_scores[1].isnan().tolist() == [i == 3 for i in range(8)]
    assert chosen.token_scores[1].isnan().tolist() == [i == 2 for i in range(6)]
    everything = smk.sync_topk_mask(attn, patch_k=7, token_k=5)
    assert everything.patch_mask[1].tolist() == [i != 3 for i in range(8)]
    assert everything.token_mask[1].tolist() == [i != 2 for i in range(6)]


@pytest.mark.parametrize("token_score", ["max", "text_softmax", "dual"])
def test_rows_of_invalid_words_are_not_read(backend: str, token_score: str) -> None:
    inputs = case(1, 3, 2, 7, 12)
    before = smk.sync_topk_mask(**inputs, token_score=token_score)
    poisoned = inputs["attn"].masked_fill(~inputs["token_valid"][:, None, :, None], NAN)
    after = smk.sync_topk_mask(**{**inputs, "attn": poisoned}, token_score=token_score)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_row_without_valid_words(backend: str) -> None:
    inputs = case(1, 3, 2, 7, 13)
    chosen = smk.sync_topk_mask(inputs["attn"], inputs["token_valid"], patch_k=3, token_k=2)
    assert (chosen.patch_scores[-1] == 0).all()
    assert (chosen.token_scores[-1] == 0).all()
    assert not chosen.token_mask[-1].any()
    assert chosen.token_ids[-1].tolist() == [-1, -1]
    assert chosen.patch_ids[-1].tolist() == [0, 1, 2]


@pytest.mark.parametrize("token_score", ["max", "text_softmax", "dual"])
def test_no_word_score_is_constant(backend: str, token_score: str) -> None:
    """Rows of attention sum to one, so that a sum over patches would say nothing of a word."""
    inputs = case(1, 4, 4, 8, 26, seed=3)
    scores = smk.sync_topk_mask(
        inputs["attn"], lse=inputs["lse"], skip_keys=0, token_score=token_score
    ).token_scores
    assert (scores.std(dim=1) > 0.01 * scores.mean(dim=1)).all()


@pytest.mark.parametrize("options", [{"token_k": 2}, {"token_ratio": 0.4}], ids=str)
def test_word_pieces_are_chosen_together(backend: str, options: dict[str, Any]) -> None:
    inputs = case(1, 6, 2, 14, 9)
    generator = torch.Generator().manual_seed(5)
    word_ids = torch.randint(-1, 6, (6, 14), generator=generator)
    inputs["attn"][0, 1] = inputs["attn"][0, 1].round(decimals=1)  # ties between words
    chosen = smk.sync_topk_mask(**inputs, word_ids=word_ids, **options)
    expected = oracle.word_mask(
        chosen.token_scores,
        word_ids,
        k=options.get("token_k"),
        ratio=options.get("token_ratio"),
        valid=inputs["token_valid"],
    )
    assert torch.equal(chosen.token_mask, expected)
    assert torch.equal(chosen.token_ids, oracle.ids_of(expected, 14))


@pytest.mark.parametrize("n", [1, 49, 196, 257, 577])
@pytest.mark.parametrize("noisy", [False, True], ids=["", "noise"])
def test_broken_scores_of_the_caller(backend: str, n: int, noisy: bool) -> None:
    rows = len(KINDS)
    sides = {"patch": adversarial(rows, n), "token": adversarial(rows, n + 7, seed=1)}
    valid = {side: positions(*scores.shape) for side, scores in sides.items()}
    given = {f"{side}_scores": scores for side, scores in sides.items()}
    if noisy:
        noise = {side: adversarial(*x.shape, seed=2) for side, x in sides.items()}
        given |= {f"{side}_noise": added for side, added in noise.items()}
        sides = {side: scores + noise[side] for side, scores in sides.items()}
    attn = torch.full((rows, 1, n + 7, n + 1), NAN)
    with nullcontext() if noisy else flushed_denormals():
        chosen = smk.sync_topk_mask(
            attn,
            valid["token"],
            patch_valid=valid["patch"],
            patch_ratio=0.4,
            token_k=n // 2,
            **given,
        )
    assert_chosen(chosen.patch_mask, chosen.patch_ids, sides["patch"], valid["patch"], ratio=0.4)
    assert_chosen(chosen.token_mask, chosen.token_ids, sides["token"], valid["token"], k=n // 2)


def test_words_of_broken_scores(backend: str) -> None:
    rows = 2 * len(KINDS)
    scores, valid = adversarial(rows, 40), positions(rows, 40)
    word_ids = torch.randint(-1, 15, (rows, 40), generator=torch.Generator().manual_seed(5))
    attn = torch.full((rows, 1, 40, 3), NAN)
    for count in ({"token_k": 5}, {"token_ratio": 0.3}, {"token_k": 0}, {"token_k": 99}):
        chosen = smk.sync_topk_mask(
            attn, valid, word_ids=word_ids, token_scores=scores, patch_scores=scores[:, :2], **count
        )
        expected = oracle.word_mask(
            scores,
            word_ids,
            k=count.get("token_k"),  # type: ignore[arg-type]
            ratio=count.get("token_ratio"),
            valid=valid,
        )
        assert torch.equal(chosen.token_mask, expected)
        assert torch.equal(chosen.token_ids, oracle.ids_of(expected, 40))


@pytest.mark.parametrize("given", ["patch_scores", "token_scores"])
def test_scores_of_one_side_leave_the_rule_of_the_other(backend: str, given: str) -> None:
    inputs = case(1, 3, 2, 7, 12)
    by_rule = smk.sync_topk_mask(**inputs)
    own = smk.sync_topk_mask(**inputs, **{given: torch.zeros_like(getattr(by_rule, given))})
    assert (getattr(own, given) == 0).all()
    other = "token_scores" if given == "patch_scores" else "patch_scores"
    assert torch.equal(getattr(own, other), getattr(by_rule, other))


def test_scores_and_counts_of_the_caller(backend: str) -> None:
    inputs = case(1, 3, 2, 7, 12)
    mine = {"patch_scores": torch.randn(3, 11).bfloat16(), "token_scores": torch.randn(3, 7)}
    counts = {"patch_k": torch.tensor([0, 5, 99]), "token_k": torch.tensor([2, 0, 1])}
    chosen = smk.sync_topk_mask(**inputs, **mine, **counts)
    for side, mask, ids in [
        ("patch", chosen.patch_mask, chosen.patch_ids),
        ("token", chosen.token_mask, chosen.token_ids),
    ]:
        expected = oracle.topk_mask(
            mine[f"{side}_scores"], k=counts[f"{side}_k"].tolist(), valid=inputs[f"{side}_valid"]
        )
        assert torch.equal(mask, expected)
        assert torch.equal(ids, oracle.ids_of(expected, mask.shape[1]))
    assert torch.equal(chosen.patch_scores, mine["patch_scores"].float())
    assert torch.equal(chosen.token_scores, mine["token_scores"])


def test_the_kernel_scores_a_row_alike_in_any_batch_and_layout(backend: str) -> None:
    if backend == "eager":
        pytest.skip("PyTorch's own sums depend on the layout")
    inputs = case(2, 5, 3, 9, 20)
    whole = smk.sync_topk_mask(**inputs, token_score="dual")
    for b in range(5):
        row = {"attn": inputs["attn"][:, b : b + 1], "lse": inputs["lse"][:, b : b + 1]}
        row |= {name: inputs[name][b : b + 1] for name in ("token_valid", "patch_valid")}
        alone = smk.sync_topk_mask(**row, token_score="dual")
        assert all(torch.equal(a[b : b + 1], c) for a, c in zip(whole, alone, strict=True))
    views = {**inputs, "attn": inputs["attn"].transpose(0, 4).contiguous().transpose(0, 4)}
    assert views["attn"].stride(-1) != 1
    again = smk.sync_topk_mask(**views, token_score="dual")
    assert all(torch.equal(a, c) for a, c in zip(whole, again, strict=True))


@pytest.mark.parametrize("words", [slice(None), slice(2, 3)], ids=["every word", "one word"])
@pytest.mark.parametrize("rules", RULES, ids="-".join)
def test_a_word_that_sees_no_key_scores_zero(
    backend: str, rules: tuple[str, str], words: slice
) -> None:
    """Attention over no key is zero and its lse is -inf."""
    inputs = case(1, 3, 2, 7, 12)
    inputs["token_valid"][:] = True
    inputs["attn"][:, 1, :, words], inputs["lse"][:, 1, :, words] = 0.0, -INF
    leaves = {name: inputs[name].clone().requires_grad_() for name in ("attn", "lse")}
    chosen = smk.sync_topk_mask(**{**inputs, **leaves}, patch_score=rules[0], token_score=rules[1])
    assert (chosen.token_scores[1, words] == 0).all()
    truth = oracle_scores(inputs, rules, torch.float64)
    plain = oracle_scores(inputs, rules, torch.float32)
    for got, own, exact in zip(chosen[4:], plain, truth, strict=True):
        assert_as_accurate(got, own, exact)
    loss = chosen.patch_scores.sum() + chosen.token_scores.square().sum()
    grads = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
    assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("token_score", ["text_softmax", "dual"])
def test_not_finite_beside_a_word_without_weight(backend: str, token_score: str) -> None:
    """NaN of one word is in the share of all; NaN of a word without weight is in no other's."""
    inputs = case(1, 2, 2, 5, 9)
    inputs["token_valid"][:] = inputs["patch_valid"][:] = True
    inputs["lse"][..., 1] = -INF
    inputs["attn"][0, 0, 0, 3, 2] = inputs["attn"][0, 1, 0, 1, 2] = NAN
    got = smk.sync_topk_mask(**inputs, token_score=token_score).token_scores
    _, truth = oracle_scores(inputs, ("mean", token_score), torch.float64)
    torch.testing.assert_close(got, truth.float(), rtol=1e-6, atol=0, equal_nan=True)
    assert got[0].isnan().all()
    assert got[1, [0, 2, 3, 4]].isfinite().all()


@pytest.mark.parametrize("token_score", ["text_softmax", "dual"])
def test_excluded_patches_score_nothing_whatever_lse_is(backend: str, token_score: str) -> None:
    inputs = case(1, 2, 2, 5, 9)
    inputs["patch_valid"][:] = False
    inputs["lse"][0, 0, 0, 1], inputs["lse"][0, 1, 0, 2] = NAN, INF
    chosen = smk.sync_topk_mask(**inputs, token_score=token_score)
    assert (chosen.token_scores == 0).all()


@pytest.mark.parametrize("garbage", [NAN, INF])
@pytest.mark.parametrize("rules", RULES, ids="-".join)
def test_gradients_do_not_depend_on_what_does_not_count(
    backend: str, rules: tuple[str, str], garbage: float
) -> None:
    """Rows of other words and excluded patches may hold anything."""
    inputs = case(1, 3, 2, 7, 12)
    inputs["token_valid"][:, 0] = True  # the CLS row is read
    counts = inputs["token_valid"][:, :, None] & torch.nn.functional.pad(
        inputs["patch_valid"], (1, 0)
    ).unsqueeze(1)

    def grads(attn: Tensor, lse: Tensor) -> tuple[Tensor, ...]:
        leaves = {"attn": attn.requires_grad_(), "lse": lse.requires_grad_()}
        chosen = smk.sync_topk_mask(**(inputs | leaves), patch_score=rules[0], token_score=rules[1])
        loss = (chosen.patch_scores * torch.arange(11)).sum() + chosen.token_scores.square().sum()
        return torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)

    dirty = (
        inputs["attn"].masked_fill(~counts[:, None], garbage),
        inputs["lse"].masked_fill(~inputs["token_valid"][:, None], garbage),
    )
    clean = grads(inputs["attn"].clone(), inputs["lse"].clone())
    assert all(map(torch.equal, grads(*dirty), clean))


@pytest.mark.parametrize("rules", RULES, ids="-".join)
def test_own_token_scores_ask_no_rule_for_gradients(backend: str, rules: tuple[str, str]) -> None:
    attn = torch.rand(1, 2, 3, 5).requires_grad_()
    lse = torch.full((1, 2, 3), NAN, requires_grad=True)
    chosen = smk.sync_topk_mask(
        attn,
        lse=lse,
        patch_score=rules[0],
        token_score=rules[1],
        token_scores=torch.zeros(1, 3),
    )
    got = torch.autograd.grad(chosen.patch_scores.sum(), [attn, lse], allow_unused=True)
    assert got[1] is None
    wanted = torch.zeros(3, 5)
    wanted[slice(None) if rules[0] == "mean" else 0, 1:] = 1 / 6 if rules[0] == "mean" else 1 / 2
    torch.testing.assert_close(got[0], wanted.expand(1, 2, 3, 5))


@pytest.mark.parametrize("token_score", ["text_softmax", "dual"])
def test_a_patch_that_no_word_sees_is_shared_by_none(backend: str, token_score: str) -> None:
    inputs = case(1, 3, 2, 7, 12)
    inputs["attn"][..., 4] = 0.0
    chosen = smk.sync_topk_mask(inputs["attn"], inputs["token_valid"], token_score=token_score)
    inputs["patch_valid"][:] = True
    rules = ("mean", token_score)
    _, truth = oracle_scores(inputs, rules, torch.float64, with_lse=False)
    _, plain = oracle_scores(inputs, rules, torch.float32, with_lse=False)
    assert_as_accurate(chosen.token_scores, plain, truth)


@pytest.mark.parametrize("shape", [(0, 2, 3, 5), (2, 2, 0, 5), (2, 2, 3, 1), (0, 1, 0, 1)], ids=str)
@pytest.mark.parametrize("rules", RULES, ids="-".join)
def test_empty(backend: str, shape: tuple[int, ...], rules: tuple[str, str]) -> None:
    batch, _, tokens, keys = shape
    attn, lse = torch.ones(shape, requires_grad=True), torch.ones(shape[:-1])
    chosen = smk.sync_topk_mask(
        attn, lse=lse, patch_score=rules[0], token_score=rules[1], patch_k=2
    )
    loss = chosen.patch_scores.sum() + chosen.token_scores.sum()
    assert torch.autograd.grad(loss, attn)[0].shape == shape
    if tokens == 0:
        assert (chosen.patch_scores == 0).all()
    assert chosen.patch_mask.shape == chosen.patch_scores.shape == (batch, keys - 1)
    assert chosen.token_mask.shape == chosen.token_scores.shape == (batch, tokens)
    assert chosen.patch_ids.shape == (batch, 2)
    assert (chosen.token_scores == 0).all()


@pytest.mark.parametrize("with_lse", [False, True], ids=["probabilities", "lse"])
@pytest.mark.parametrize("rules", RULES, ids="-".join)
def test_gradients(rules: tuple[str, str], with_lse: bool) -> None:
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in case(2, 2, 2, 3, 5).items()}
    attn, lse = inputs.pop("attn").requires_grad_(), inputs.pop("lse").requires_grad_()

    def scores(attn: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
        chosen = smk.sync_topk_mask(
            attn,
            lse=lse if with_lse else None,
            patch_score=rules[0],
            token_score=rules[1],
            **inputs,
        )
        return chosen.patch_scores, chosen.token_scores

    for served in (smk.use_backend("eager"), backend_without_autograd()):
        with served:
            assert torch.autograd.gradcheck(scores, (attn, lse), fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rules", RULES, ids="-".join)
def test_gradients_are_as_accurate_as_plain_ones(
    backend: str, rules: tuple[str, str], dtype: torch.dtype
) -> None:
    inputs = case(2, 3, 5, 7, 20, dtype=dtype)
    weights = torch.arange(19.0), torch.arange(7.0)

    def grads(scores: Callable[..., tuple[Tensor, Tensor]], of: torch.dtype) -> tuple[Tensor, ...]:
        leaves = {k: inputs[k].to(of).requires_grad_() for k in ("attn", "lse")}
        patch, token = scores({**inputs, **leaves})
        loss = (patch * weights[0]).sum() + (token * weights[1]).sum()
        return torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)

    def mine(given: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        chosen = smk.sync_topk_mask(**given, patch_score=rules[0], token_score=rules[1])
        assert not chosen.patch_mask.requires_grad
        return chosen.patch_scores, chosen.token_scores

    def plain(given: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(given["attn"].dtype, torch.float32)
        return oracle_scores(given, rules, wide)

    for got, own, truth in zip(
        grads(mine, dtype), grads(plain, dtype), grads(plain, torch.float64), strict=True
    ):
        assert got.dtype == dtype
        assert_as_accurate(got, own, truth)


def test_gradient_of_the_callers_scores(backend: str) -> None:
    mine = torch.randn(2, 5, requires_grad=True)
    chosen = smk.sync_topk_mask(torch.rand(2, 2, 3, 6), patch_scores=mine)
    assert torch.equal(torch.autograd.grad(chosen.patch_scores.sum(), mine)[0], torch.ones(2, 5))


# ---- bad input ----


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"attn": torch.ones(3)}, ValueError, r"attn must be \[B, H, T, S\] or \[L, B, H, T, S\]"),
        ({"attn": torch.ones(2, 3, 4, 5).long()}, TypeError, "attn must be of type float16"),
        (
            {"token_valid": torch.ones(2, 5).bool()},
            ValueError,
            r"token_valid must be \[B, T\] = \(2, 4\)",
        ),
        ({"token_valid": torch.ones(2, 4)}, TypeError, "token_valid must be of type bool"),
        ({"token_valid": torch.ones(2, 4, device="meta").bool()}, ValueError, "device of attn"),
        (
            {"patch_valid": torch.ones(2, 5).bool()},
            ValueError,
            r"patch_valid must be \[B, P\] = \(2, 4\)",
        ),
        ({"patch_ratio": -0.1}, ValueError, r"patch_ratio must be in \[0, 1\], got -0.1"),
        ({"token_ratio": 1.1}, ValueError, r"token_ratio must be in \[0, 1\], got 1.1"),
        ({"patch_k": -1}, ValueError, "patch_k must be at least 0"),
        ({"token_k": torch.ones(3).long()}, ValueError, "token_k"),
        ({"patch_score": "max"}, ValueError, "patch_score must be one of 'mean', 'cls', got 'max'"),
        ({"token_score": "sum"}, ValueError, "token_score must be one of 'max', .* got 'sum'"),
        ({"lse": torch.ones(2, 3, 5)}, ValueError, r"lse must be \[\(L,\) B, H, T\]"),
        ({"skip_keys": 6}, ValueError, r"skip_keys must be in \[0, S\] = \[0, 5\], got 6"),
        ({"cls_index": 4}, ValueError, "cls_index must be in"),
        ({"cls_index": 1.0}, TypeError, "cls_index must be an int, got float"),
        ({"patch_ratio": None}, ValueError, "one of patch_k and patch_ratio must be given"),
        ({"token_ratio": "all"}, TypeError, "token_ratio must be a number, got str"),
        ({"word_ids": torch.ones(2, 4)}, TypeError, "word_ids must be of type int64"),
        ({"patch_scores": torch.ones(2, 5)}, ValueError, r"patch_scores must be \[B, P\]"),
        ({"token_noise": torch.ones(2, 4).long()}, TypeError, "token_noise must be of type"),
    ],
)
def test_bad_input(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        smk.sync_topk_mask(**{"attn": torch.ones(2, 3, 4, 5), **change})
