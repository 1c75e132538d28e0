"""max_similarity and what SyCoCa makes of it: the patches to mask for two tasks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import syncmask_kernels as smk
from reference.ops import selection as oracle
from tests.accuracy import assert_as_accurate
from tests.selection_cases import KINDS, adversarial, assert_chosen, positions
from tests.serving import backend_without_autograd

HALVES_AND_FLOAT = [torch.float16, torch.bfloat16, torch.float32]
SHAPES = [(3, 257, 30, 64), (2, 23, 9, 40), (4, 7, 33, 1), (2, 1, 1, 5), (3, 65, 17, 513)]
EMPTY = [(0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 0, 5), (2, 3, 4, 0)]


def pair(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """patches [B, P, D] and tokens [B, T, D]."""
    batch, patches, tokens, dim = shape
    generator = torch.Generator().manual_seed(0)
    found = (torch.randn(batch, n, dim, generator=generator) for n in (patches, tokens))
    return tuple(x.to(dtype) for x in found)  # type: ignore[return-value]


def plain(patches: Tensor, tokens: Tensor, valid: Tensor) -> Tensor:
    products = (patches.float() @ tokens.float().mT).masked_fill(~valid[:, None], -float("inf"))
    return products.max(dim=-1).values.masked_fill(~valid.any(dim=-1, keepdim=True), 0.0)


@pytest.mark.parametrize("dtype", HALVES_AND_FLOAT)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_max_similarity(backend: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    patches, tokens = pair(shape, dtype)
    everything = torch.ones(shape[0], shape[2], dtype=torch.bool)
    for valid in (None, positions(shape[0], shape[2])):
        got = smk.max_similarity(patches, tokens, valid)
        assert got.dtype == torch.float32
        truth = oracle.max_similarity(patches.double(), tokens.double(), valid)
        own = plain(patches, tokens, everything if valid is None else valid)
        assert_as_accurate(got, own, truth)


@pytest.mark.parametrize("shape", EMPTY, ids=str)
def test_nothing_to_compare_scores_zero(backend: str, shape: tuple[int, ...]) -> None:
    patches, tokens = (x.requires_grad_() for x in pair(shape))
    for valid in (None, torch.ones(shape[0], shape[2], dtype=torch.bool)):
        scores = smk.max_similarity(patches, tokens, valid)
        assert scores.shape == shape[:2]
        assert scores.dtype == torch.float32
        assert (scores == 0).all()
        grads = torch.autograd.grad(scores.sum(), (patches, tokens), materialize_grads=True)
        assert all((grad == 0).all() for grad in grads)


def test_float64_is_compared_in_full() -> None:
    patches = torch.ones(1, 1, 1, dtype=torch.float64)
    tokens = torch.tensor([[[1.0], [1.0 + 1e-12]]], dtype=torch.float64)
    scores = smk.max_similarity(patches, tokens)
    assert scores.dtype == torch.float64
    assert scores.item() == 1.0 + 1e-12


def test_views(backend: str) -> None:
    patches, tokens = pair((3, 20, 9, 24))
    valid = positions(3, 9)
    truth = oracle.max_similarity(patches.double(), tokens.double(), valid)
    own = plain(patches, tokens, valid)
    layouts: list[Callable[[Tensor], Tensor]] = [
        lambda x: x.mT.contiguous().mT,
        lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
        lambda x: x.repeat_interleave(2, dim=-1)[..., ::2],
    ]
    for layout in layouts:
        views = layout(patches), layout(tokens)
        assert not views[0].is_contiguous()
        assert_as_accurate(smk.max_similarity(*views, layout(valid[None])[0]), own, truth)
    expanded = patches[:1].expand(3, 20, 24)
    truth = oracle.max_similarity(expanded.double(), tokens.double())
    own = plain(expanded, tokens, torch.ones(3, 9, dtype=torch.bool))
    assert_as_accurate(smk.max_similarity(expanded, tokens), own, truth)


def test_a_row_is_compared_alike_in_any_batch(backend: str) -> None:
    if backend == "eager":
        pytest.skip("PyTorch's own products may depend on the batch")
    patches, tokens = pair((5, 70, 13, 40))
    valid = positions(5, 13)
    whole = smk.max_similarity(patches, tokens, valid)
    for b in range(5):
        row = slice(b, b + 1)
        assert torch.equal(smk.max_similarity(patches[row], tokens[row], valid[row]), whole[row])


def test_nan_and_infinities_are_those_of_eager(backend: str) -> None:
    patches, tokens = pair((3, 20, 9, 24))
    patches[0, 3, 5], patches[1, 4, 0] = float("nan"), float("inf")
    tokens[2, 7, 3], tokens[0, 0, 0] = float("nan"), -float("inf")
    got = smk.max_similarity(patches, tokens)
    with smk.use_backend("eager"):
        wanted = smk.max_similarity(patches, tokens)
    assert 0 < wanted.isnan().sum() < wanted.numel()
    torch.testing.assert_close(got, wanted, equal_nan=True)


def test_minus_infinity_is_a_similarity(backend: str) -> None:
    tokens = torch.full((1, 2, 1), -float("inf"))
    assert smk.max_similarity(torch.ones(1, 1, 1), tokens).item() == -float("inf")


def test_minus_infinity_of_a_valid_token_beats_excluded_ones(backend: str) -> None:
    patches = torch.tensor([[[1.0, 0.0]]], requires_grad=True)
    tokens = torch.tensor([[[5.0, 5.0], [-float("inf"), 0.0]]], requires_grad=True)
    score = smk.max_similarity(patches, tokens, torch.tensor([[False, True]]))
    grads = torch.autograd.grad(score.sum(), [patches, tokens])
    assert grads[0].tolist() == [[[-float("inf"), 0.0]]]
    assert grads[1].tolist() == [[[0.0, 0.0], [1.0, 0.0]]]


def test_the_first_of_several_nan_gets_the_gradient(backend: str) -> None:
    patches, tokens = torch.ones(1, 2, 3), torch.ones(1, 5, 3)
    tokens[0, [1, 3]] = float("nan")
    tokens.requires_grad_()
    smk.max_similarity(patches, tokens).sum().backward()
    assert tokens.grad is not None
    assert tokens.grad[0, :, 0].tolist() == [0, 2, 0, 0, 0]


def test_excluded_tokens_may_hold_anything(backend: str) -> None:
    patches, tokens = pair((3, 20, 9, 24))
    valid = positions(3, 9)
    poisoned = tokens.masked_fill(~valid[..., None], float("nan"))

    def found(given: Tensor) -> tuple[Tensor, ...]:
        leaves = [part.clone().requires_grad_() for part in (patches, given)]
        scores = smk.max_similarity(leaves[0], leaves[1], valid)
        return scores.detach(), *torch.autograd.grad(scores.square().sum(), leaves)

    assert all(map(torch.equal, found(poisoned), found(tokens)))


def test_the_gradient_goes_to_the_lower_of_equal_tokens(backend: str) -> None:
    patches = torch.tensor([[[1.0, 2.0], [0.0, 0.0]]], requires_grad=True)
    tokens = torch.tensor([[[9.0, 9.0], [0.5, 0.25], [0.5, 0.25], [1.0, 0.0]]], requires_grad=True)
    valid = torch.tensor([[False, True, True, True]])
    scores = smk.max_similarity(patches, tokens, valid)
    assert scores.tolist() == [[1.0, 0.0]]
    grads = torch.autograd.grad((scores * torch.tensor([3.0, 1.0])).sum(), (patches, tokens))
    assert grads[0].tolist() == [[[1.5, 0.75], [0.5, 0.25]]]
    assert grads[1].tolist() == [[[0.0, 0.0], [3.0, 6.0], [0.0, 0.0], [0.0, 0.0]]]


@pytest.mark.parametrize("dtype", HALVES_AND_FLOAT)
def test_gradients_are_as_accurate_as_plain_ones(backend: str, dtype: torch.dtype) -> None:
    inputs = pair((3, 20, 9, 24), dtype)
    valid = positions(3, 9)
    weights = torch.randn(3, 20, generator=torch.Generator().manual_seed(3))

    def plain(*pair: Tensor) -> Tensor:
        wide = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in pair)
        return oracle.max_similarity(*wide, valid)

    def mine(*pair: Tensor) -> Tensor:
        return smk.max_similarity(*pair, valid)

    def grads(call: Callable[..., Tensor], of: torch.dtype) -> tuple[Tensor, ...]:
        leaves = [x.to(of).requires_grad_() for x in inputs]
        return torch.autograd.grad((call(*leaves) * weights).sum(), leaves)

    for got, own, truth in zip(
        grads(mine, dtype), grads(plain, dtype), grads(plain, torch.float64), strict=True
    ):
        assert got.dtype == dtype
        assert_as_accurate(got, own, truth)


@pytest.mark.parametrize("wanted", [0, 1])
def test_gradient_only_of_what_asks_for_it(wanted: int) -> None:
    inputs = [x.double() for x in pair((2, 6, 4, 5))]
    inputs[wanted].requires_grad_()
    results = []
    for served in (backend_without_autograd(), smk.use_backend("eager")):
        with served:
            scores = smk.max_similarity(*inputs)
        results.append(torch.autograd.grad((scores**2).sum(), inputs[wanted])[0])
    torch.testing.assert_close(*results)


def test_autocast_changes_nothing(backend: str) -> None:
    inputs = [x.requires_grad_() for x in pair((3, 20, 9, 24))]
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            scores = smk.max_similarity(*inputs)
        results.append((scores, *torch.autograd.grad((scores**2).sum(), inputs)))
    assert all(torch.equal(once, cast) for once, cast in zip(*results, strict=True))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"patches": None}, TypeError, "patches must be a torch.Tensor, got NoneType"),
        ({"patches": torch.ones(3, 4)}, ValueError, r"patches must be \[B, P, D\], got shape"),
        ({"patches": torch.ones(2, 3, 4).long()}, TypeError, "patches must be of type float16"),
        ({"tokens": torch.ones(2, 5, 3)}, ValueError, r"tokens must be \[B, T, D\] = \(2, 5, 4\)"),
        ({"tokens": torch.ones(1, 5, 4)}, ValueError, r"tokens must be \[B, T, D\] = \(2, 5, 4\)"),
        ({"tokens": torch.ones(2, 5, 4).half()}, TypeError, "tokens must be of type float32"),
        ({"tokens": torch.ones(2, 5, 4, device="meta")}, ValueError, "device of patches"),
        ({"token_valid": torch.ones(2, 5)}, TypeError, "token_valid must be of type bool"),
        ({"token_valid": torch.ones(2, 4).bool()}, ValueError, r"token_valid must be \[B, T\] ="),
    ],
)
def test_bad_input(change: dict[str, Any], error: type[Exception], message: str) -> None:
    inputs = {"patches": torch.ones(2, 3, 4), "tokens": torch.ones(2, 5, 4)}
    with pytest.raises(error, match=message):
        smk.max_similarity(**{**inputs, **change})


# ---- attentive_mask ----


@pytest.mark.parametrize(("high", "low"), [(0.5, 0.25), (0.07, 1.0), (0.0, 1 / 3)])
@pytest.mark.parametrize("n", [1, 49, 196])
def test_attentive_mask_is_the_two_ends_of_the_order(
    backend: str, n: int, high: float, low: float
) -> None:
    scores = adversarial(len(KINDS), n)
    for valid in (None, positions(len(KINDS), n)):
        chosen = smk.attentive_mask(scores, high_ratio=high, low_ratio=low, valid=valid)
        for part, ratio, largest in [(chosen.high, high, True), (chosen.low, low, False)]:
            assert_chosen(part.mask, part.ids, scores, valid, ratio=ratio, largest=largest)


def test_attentive_mask_of_similarities_has_their_gradient(backend: str) -> None:
    scores = torch.tensor([[3.0, 0.0, 2.0, 1.0]], requires_grad=True)
    chosen = smk.attentive_mask(scores, high_ratio=0.5, low_ratio=0.25)
    loss = chosen.high.scores.sum() - 5 * chosen.low.scores.sum()
    assert torch.autograd.grad(loss, scores)[0].tolist() == [[1.0, -5.0, 1.0, 0.0]]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"high_ratio": 1.1}, ValueError, r"high_ratio must be in \[0, 1\], got 1.1"),
        ({"low_ratio": -0.1}, ValueError, r"low_ratio must be in \[0, 1\], got -0.1"),
        ({"low_ratio": None}, TypeError, "low_ratio must be a number, got NoneType"),
        ({"scores": torch.ones(2, 3).long()}, TypeError, "scores must be of type"),
        ({"valid": torch.ones(2, 3)}, TypeError, "valid must be of type bool"),
    ],
)
def test_attentive_mask_bad_input(
    change: dict[str, Any], error: type[Exception], message: str
) -> None:
    inputs = {"scores": torch.ones(2, 3), "high_ratio": 0.5, "low_ratio": 0.5}
    with pytest.raises(error, match=message):
        smk.attentive_mask(**{**inputs, **change})
