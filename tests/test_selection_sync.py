"""sync_topk_mask: scores against the oracle, selections exact for the scores that are returned."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import syncmask_kernels as smk
from reference.ops import attention as attention_oracle
from reference.ops import selection as oracle
from tests.accuracy import assert_as_accurate
from tests.compiling import assert_compiles_once

SHAPES = [
    (1, 4, 12, 30, 257),
    (2, 3, 7, 23, 198),
    (1, 2, 1, 1, 2),
    (3, 2, 2, 9, 18),
    (1, 3, 2, 5, 9),
]
RULES = [(p, t) for p in ("mean", "cls") for t in ("max", "text_softmax", "dual")]


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
    inputs: dict[str, Tensor], patch_score: str, token_score: str, with_lse: bool, cls_index: int
) -> tuple[Tensor, Tensor]:
    layers = list(inputs["attn"].double())
    lse = list(inputs["lse"].double()) if with_lse else None
    valid, patches = inputs["token_valid"], inputs["patch_valid"]
    return (
        oracle.patch_scores(layers, valid, patch_score, patch_valid=patches, cls_index=cls_index),
        oracle.token_scores(layers, valid, token_score, lse=lse, patch_valid=patches),
    )


def eager_scores(inputs: dict[str, Tensor], **options: Any) -> tuple[Tensor, Tensor]:
    with smk.use_backend("eager"):
        chosen = smk.sync_topk_mask(**inputs, **options)
    return chosen.patch_scores, chosen.token_scores


@pytest.mark.parametrize("with_lse", [False, True], ids=["probabilities", "lse"])
@pytest.mark.parametrize("rules", RULES, ids="-".join)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_scores(
    backend: str, shape: tuple[int, ...], rules: tuple[str, str], with_lse: bool
) -> None:
    inputs = case(*shape)
    cls_index = shape[3] - 1
    given = inputs if with_lse else {k: v for k, v in inputs.items() if k != "lse"}
    options: dict[str, Any] = {
        "patch_score": rules[0],
        "token_score": rules[1],
        "cls_index": cls_index,
    }
    chosen = smk.sync_topk_mask(**given, **options)
    truth = oracle_scores(inputs, *rules, with_lse, cls_index)
    plain = eager_scores(given, **options)
    for got, own, exact in zip(chosen[4:], plain, truth, strict=True):
        assert got.dtype == torch.float32
        assert_as_accurate(got, own, exact, factor=4.0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rules", RULES, ids="-".join)
def test_half_types_are_summed_in_float32(
    backend: str, dtype: torch.dtype, rules: tuple[str, str]
) -> None:
    inputs = case(2, 3, 5, 12, 50, dtype=dtype)
    if dtype == torch.float16:
        inputs["attn"][0, 0, 0, 0, 1:4] = torch.tensor([6e-8, 1.2e-5, 0.0])  # its denormals
    chosen = smk.sync_topk_mask(**inputs, patch_score=rules[0], token_score=rules[1])
    truth = oracle_scores(inputs, *rules, True, 0)
    plain = eager_scores(
        {**inputs, "attn": inputs["attn"].float()}, patch_score=rules[0], token_score=rules[1]
    )
    for got, own, exact in zip(chosen[4:], plain, truth, strict=True):
        assert_as_accurate(got, own, exact, factor=4.0)


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
    for side, positions, mask, ids, scores in sides:
        default = {"patch": 0.5, "token": 0.15}[side]
        k = options.get(f"{side}_k")
        ratio = None if k is not None else options.get(f"{side}_ratio", default)
        scores = scores + options.get(f"{side}_noise", 0.0)
        expected = oracle.topk_mask(scores, k=k, ratio=ratio, valid=inputs[f"{side}_valid"])
        assert torch.equal(mask, expected)
        width = k if k is not None else oracle.wanted(positions, None, ratio)
        assert torch.equal(ids, oracle.ids_of(expected, width))


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


def test_rows_of_invalid_words_are_not_read(backend: str) -> None:
    inputs = case(1, 3, 2, 7, 12)
    before = smk.sync_topk_mask(**inputs)
    poisoned = inputs["attn"].masked_fill(~inputs["token_valid"][:, None, :, None], float("nan"))
    after = smk.sync_topk_mask(**{**inputs, "attn": poisoned})
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


@pytest.mark.parametrize("shape", [(0, 2, 3, 5), (2, 2, 0, 5), (2, 2, 3, 1), (0, 1, 0, 1)], ids=str)
@pytest.mark.parametrize("token_score", ["max", "text_softmax", "dual"])
def test_empty(backend: str, shape: tuple[int, ...], token_score: str) -> None:
    batch, _, tokens, keys = shape
    chosen = smk.sync_topk_mask(
        torch.ones(shape), lse=torch.ones(shape[:-1]), token_score=token_score, patch_k=2
    )
    assert chosen.patch_mask.shape == chosen.patch_scores.shape == (batch, keys - 1)
    assert chosen.token_mask.shape == chosen.token_scores.shape == (batch, tokens)
    assert chosen.patch_ids.shape == (batch, 2)
    assert (chosen.token_scores == 0).all()


@pytest.mark.parametrize("with_lse", [False, True], ids=["probabilities", "lse"])
@pytest.mark.parametrize("rules", RULES, ids="-".join)
def test_gradients(rules: tuple[str, str], with_lse: bool) -> None:
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in case(2, 2, 2, 4, 6).items()}
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

    with smk.use_backend("eager"):
        assert torch.autograd.gradcheck(scores, (attn, lse))


@pytest.mark.parametrize("with_lse", [False, True], ids=["probabilities", "lse"])
@pytest.mark.parametrize("rules", RULES, ids="-".join)
def test_the_kernel_has_the_gradients_of_eager(rules: tuple[str, str], with_lse: bool) -> None:
    pytest.importorskip("syncmask_kernels.backends.cpu.selection")
    inputs = case(2, 3, 5, 7, 20)
    grads = []
    for name in ("eager", "cpu"):
        attn, lse = (inputs[k].clone().requires_grad_() for k in ("attn", "lse"))
        rest = {k: inputs[k] for k in ("token_valid", "patch_valid")}
        with smk.use_backend(name):
            chosen = smk.sync_topk_mask(
                attn,
                lse=lse if with_lse else None,
                patch_score=rules[0],
                token_score=rules[1],
                **rest,
            )
        assert not chosen.patch_mask.requires_grad
        weights = torch.arange(19.0), torch.arange(7.0)
        loss = (chosen.patch_scores * weights[0]).sum() + (chosen.token_scores * weights[1]).sum()
        grads.append(torch.autograd.grad(loss, (attn, lse), materialize_grads=True))
    for got, expected in zip(*grads, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_gradient_of_the_callers_scores(backend: str) -> None:
    mine = torch.randn(2, 5, requires_grad=True)
    chosen = smk.sync_topk_mask(torch.rand(2, 2, 3, 6), patch_scores=mine)
    assert torch.equal(torch.autograd.grad(chosen.patch_scores.sum(), mine)[0], torch.ones(2, 5))


# ---- from queries and keys ----


def qkv(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(3, 4, n, 8, generator=generator) for n in (6, 17, 17))  # type: ignore[return-value]


@pytest.mark.parametrize("token_score", ["max", "text_softmax", "dual"])
def test_qk_is_exact(backend: str, token_score: str) -> None:
    q, k, _ = qkv()
    token_valid = torch.rand(3, 6, generator=torch.Generator().manual_seed(1)) < 0.8
    key_valid = torch.rand(3, 17, generator=torch.Generator().manual_seed(2)) < 0.9
    chosen = smk.sync_topk_mask_qk(
        q, k, token_valid, key_valid=key_valid, scale=0.5, token_score=token_score
    )
    attn, lse = attention_oracle.attention(q.double(), k.double(), key_valid, 0.5)
    truth = oracle.token_scores([attn], token_valid, token_score, lse=[lse])
    torch.testing.assert_close(chosen.token_scores.double(), truth, rtol=1e-5, atol=1e-6)
    patches = oracle.patch_scores([attn], token_valid)
    torch.testing.assert_close(chosen.patch_scores.double(), patches, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("patch_score", ["mean", "cls"])
def test_values_weight_the_patches(backend: str, patch_score: str) -> None:
    q, k, v = qkv()
    token_valid = torch.ones(3, 6, dtype=torch.bool)
    patch_valid = torch.rand(3, 16, generator=torch.Generator().manual_seed(2)) < 0.7
    chosen = smk.sync_topk_mask_qk(
        q, k, token_valid, v=v, patch_valid=patch_valid, patch_score=patch_score
    )
    attn, _ = attention_oracle.attention(q.double(), k.double())
    weighted = oracle.value_weighted(attn, v.double(), patch_valid)
    truth = oracle.patch_scores([weighted], token_valid, patch_score, patch_valid=patch_valid)
    torch.testing.assert_close(chosen.patch_scores.double(), truth, rtol=1e-5, atol=1e-6)


def test_qkv_gradients() -> None:
    q, k, v = (t[:1, :2, :4, :3].double().requires_grad_() for t in qkv())

    def scores(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        chosen = smk.sync_topk_mask_qk(q, k, v=v, token_score="dual")
        return chosen.patch_scores, chosen.token_scores

    assert torch.autograd.gradcheck(scores, (q, k, v))


# ---- compilers and bad input ----


def test_compiles(backend: str) -> None:
    def selected(q: Tensor, k: Tensor, valid: Tensor) -> tuple[Tensor, ...]:
        attn = (q @ k.mT).softmax(dim=-1)
        return (
            *smk.sync_topk_mask(attn, valid),
            *smk.sync_topk_mask_qk(q, k, valid, v=k, token_k=2),
        )

    calls = []
    for b, t, s in [(2, 7, 9), (3, 9, 12), (4, 12, 20)]:  # sizes that are no special cases
        calls.append((torch.randn(b, 3, t, 8), torch.randn(b, 3, s, 8), torch.rand(b, t) < 0.8))
    assert_compiles_once(selected, calls, rtol=1e-5, atol=1e-6)


def test_compiled_gradient(backend: str) -> None:
    def loss(attn: Tensor) -> Tensor:
        chosen = smk.sync_topk_mask(attn, token_score="dual", patch_score="cls")
        return (chosen.patch_scores**2).sum() + (chosen.token_scores**2).sum()

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True, dynamic=True)
    for shape in [(2, 3, 5, 9), (4, 3, 6, 12)]:
        attn = torch.randn(shape).softmax(dim=-1).requires_grad_()
        grads = [torch.autograd.grad(f(attn), attn)[0] for f in (compiled, loss)]
        torch.testing.assert_close(*grads)


def test_opcheck() -> None:
    selection = pytest.importorskip("syncmask_kernels.backends.cpu.selection")
    for dtype in (torch.float32, torch.bfloat16):
        inputs = case(2, 3, 2, 5, 9, dtype=dtype)
        strided = inputs["attn"].transpose(1, 3).contiguous().transpose(1, 3)
        tensors = (strided, inputs["lse"], inputs["token_valid"], inputs["patch_valid"])
        ks = torch.tensor([1, 2, 3])
        arguments = (*tensors, -1, 2, 1, None, 1, 2, 4, ks, 0, 0, 5, None, None, None, None, None)
        torch.library.opcheck(selection._sync_topk_mask, arguments)


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
        ({"word_ids": torch.ones(2, 4)}, TypeError, "word_ids must be of type int64"),
        ({"patch_scores": torch.ones(2, 5)}, ValueError, r"patch_scores must be \[B, P\]"),
        ({"token_noise": torch.ones(2, 4).long()}, TypeError, "token_noise must be of type"),
    ],
)
def test_bad_input(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        smk.sync_topk_mask(**{"attn": torch.ones(2, 3, 4, 5), **change})


def test_v_and_patch_scores_exclude_each_other() -> None:
    q, k, v = qkv()
    with pytest.raises(ValueError, match="v and patch_scores exclude each other"):
        smk.sync_topk_mask_qk(q, k, v=v, patch_scores=torch.ones(3, 16))
