"""head_average and attention_map against their definitions."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor

import syncmask_kernels as smk
from reference.ops import attention as oracle
from tests.accuracy import assert_as_accurate
from tests.attention_cases import EMPTY, LAYOUTS, SHAPES, broken, qkv, some_keys
from tests.serving import backend_without_autograd

HALVES_AND_FLOAT = [torch.float16, torch.bfloat16, torch.float32]


def probabilities(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).softmax(dim=-1)


# ---- head_average ----


@pytest.mark.parametrize("dtype", HALVES_AND_FLOAT)
@pytest.mark.parametrize("shape", [shape[:4] for shape in SHAPES + EMPTY], ids=str)
def test_head_average(backend: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    attn = probabilities(*shape).to(dtype)
    for skip_keys in {0, 1, shape[3]}:
        got = smk.head_average(attn, skip_keys=skip_keys)
        assert got.dtype == torch.float32
        truth = oracle.head_average([attn.double()], skip_keys)
        assert_as_accurate(got, attn.float().mean(dim=1)[..., skip_keys:], truth, factor=2.0)


@pytest.mark.parametrize("words", [1, 3])
@pytest.mark.parametrize("heads", range(5, 10))
def test_head_average_of_any_number_of_heads(backend: str, heads: int, words: int) -> None:
    for patches in (5, 8, 13):
        attn = torch.randint(-9, 9, (2, heads, words, patches)).float()
        expected = attn.sum(dim=1) / heads
        assert torch.equal(smk.head_average(attn, skip_keys=0), expected)


def test_head_average_of_many_words(backend: str) -> None:
    attn = torch.randint(-9, 9, (2, 4, 150, 300)).float()
    assert torch.equal(smk.head_average(attn), attn[..., 1:].sum(dim=1) / 4)


def test_layers_are_averaged_whether_stacked_or_listed(backend: str) -> None:
    layers = [probabilities(2, 3, 4, 37, seed=i) for i in range(3)]
    truth = oracle.head_average([layer.double() for layer in layers], skip_keys=2)
    plain = torch.stack(layers).mean(dim=(0, 2))[..., 2:]
    assert_as_accurate(smk.head_average(torch.stack(layers), skip_keys=2), plain, truth)
    assert_as_accurate(smk.head_average(layers, skip_keys=2), plain, truth)


def test_head_average_of_float64_is_float64() -> None:
    attn = probabilities(2, 3, 4, 9).double()
    torch.testing.assert_close(smk.head_average(attn), oracle.head_average([attn]))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_head_average_of_a_view(backend: str, layout: str) -> None:
    attn = LAYOUTS[layout](probabilities(2, 3, 5, 21))
    assert not attn.is_contiguous()
    truth = oracle.head_average([attn.double()])
    assert_as_accurate(smk.head_average(attn), attn.mean(dim=1)[..., 1:], truth, factor=2.0)


@pytest.mark.parametrize("dtype", HALVES_AND_FLOAT)
def test_head_average_keeps_nan_and_infinities(backend: str, dtype: torch.dtype) -> None:
    attn = broken(probabilities(3, 3, 5, 21)).to(dtype)
    attn[2, 0, 2, 0], attn[2, 1, 2, 0] = float("inf"), -float("inf")
    torch.testing.assert_close(
        smk.head_average(attn, skip_keys=0), oracle.head_average([attn.float()], 0), equal_nan=True
    )


# ---- attention_map ----


def plain_map(q: Tensor, k: Tensor, valid: Tensor, scale: float) -> Tensor:
    logits = (q.float() @ k.float().mT * scale).masked_fill(~valid[:, None, None], float("-inf"))
    return logits.softmax(dim=-1).nan_to_num().mean(dim=1)


@pytest.mark.parametrize("dtype", HALVES_AND_FLOAT)
@pytest.mark.parametrize("shape", SHAPES + EMPTY, ids=str)
def test_attention_map(backend: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    q, k, _ = qkv(shape, dtype)
    valid = some_keys(shape[0], shape[3])
    for skip_keys in {0, 1, min(shape[2], shape[3]), shape[3]}:
        got = smk.attention_map(q, k, key_valid=valid, scale=0.2, skip_keys=skip_keys)
        assert got.dtype == torch.float32
        truth = oracle.attention_map(q.double(), k.double(), valid, 0.2, skip_keys)
        assert_as_accurate(got, plain_map(q, k, valid, 0.2)[..., skip_keys:], truth)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_attention_map_of_views(backend: str, layout: str) -> None:
    q, k = (LAYOUTS[layout](x) for x in qkv((2, 3, 6, 70, 40))[:2])
    valid = some_keys(2, 140)[:, ::2]
    assert not q.is_contiguous()
    got = smk.attention_map(q, k, key_valid=valid)
    truth = oracle.attention_map(q.double(), k.double(), valid)
    assert_as_accurate(got, plain_map(q, k, valid, 40**-0.5)[..., 1:], truth)


def test_attention_map_of_layers(backend: str) -> None:
    layers = [qkv((2, 3, 6, 33, 16), seed=i)[:2] for i in range(3)]
    valid = some_keys(2, 33)
    truth = torch.stack([oracle.attention_map(q.double(), k.double(), valid) for q, k in layers])
    plain = torch.stack([plain_map(q, k, valid, 0.25)[..., 1:] for q, k in layers])
    listed = [list(side) for side in zip(*layers, strict=True)]
    for q, k in [listed, [torch.stack(side) for side in listed]]:
        got = smk.attention_map(q, k, key_valid=valid)
        assert_as_accurate(got, plain.mean(dim=0), truth.mean(dim=0))


def test_logits_beyond_the_range_of_exp(backend: str) -> None:
    q, k, _ = qkv((2, 3, 6, 33, 16))
    shift = torch.full_like(q[..., :1], 100.0)
    shifted = torch.cat([q, shift], dim=-1), torch.cat([k, torch.ones_like(k[..., :1])], dim=-1)
    for sign in (1.0, -1.0):
        got = smk.attention_map(shifted[0] * sign, shifted[1], scale=4.0)
        truth = oracle.attention_map(q.double() * sign, k.double(), scale=4.0)
        plain = plain_map(shifted[0] * sign, shifted[1], torch.ones(2, 33).bool(), 4.0)[..., 1:]
        assert_as_accurate(got, plain, truth)


@pytest.mark.parametrize("size", [1e5, 1e10, 1e30])
def test_huge_logits_look_at_the_largest_alone(backend: str, size: float) -> None:
    q = size * torch.tensor([1.1, -0.7, 0.3]).view(1, 1, 3, 1)
    k = torch.linspace(-1.0, 1.0, 20).view(1, 1, 20, 1)
    wanted = torch.zeros(1, 3, 20)
    wanted[0, [0, 1, 2], [19, 0, 19]] = 1.0
    assert torch.equal(smk.attention_map(q, k, skip_keys=0), wanted)


def test_scale_is_any_number(backend: str) -> None:
    q, k, _ = qkv((2, 3, 6, 33, 16))
    half = smk.attention_map(q, k, scale=0.5)
    assert torch.equal(smk.attention_map(q, k, scale=Fraction(1, 2)), half)  # type: ignore[arg-type]


def test_broken_logits_are_those_of_eager(backend: str) -> None:
    q, k, _ = qkv((3, 2, 5, 21, 8))
    for queries, keys in [(broken(q), k), (q, broken(k))]:
        got = smk.attention_map(queries, keys, skip_keys=0)
        with smk.use_backend("eager"):
            wanted = smk.attention_map(queries, keys, skip_keys=0)
        assert 0 < wanted.isnan().sum() < wanted.numel()
        torch.testing.assert_close(got, wanted, equal_nan=True)


def test_keys_outside_the_softmax_may_hold_anything(backend: str) -> None:
    q, k, _ = qkv((2, 3, 6, 33, 16))
    valid = some_keys(2, 33)
    poisoned = k.masked_fill(~valid[:, None, :, None], float("nan"))
    wanted = smk.attention_map(q, k, key_valid=valid)
    assert torch.equal(smk.attention_map(q, poisoned, key_valid=valid), wanted)
    assert (wanted[1] == 0).all()
    assert (wanted[0].sum(dim=-1) > 0).all()


def test_gradient_of_a_row_without_a_valid_key_is_zero(backend: str) -> None:
    q, k, _ = (x.requires_grad_() for x in qkv((2, 3, 6, 33, 16)))
    weights = torch.arange(32.0)
    result = smk.attention_map(q, k, key_valid=some_keys(2, 33))
    grads = torch.autograd.grad((result * weights).sum(), (q, k))
    for grad in grads:
        assert (grad[1] == 0).all()
        assert (grad[0] != 0).any()


# ---- gradients and what holds for both ----


@pytest.mark.parametrize("dtype", HALVES_AND_FLOAT)
def test_gradients_are_as_accurate_as_plain_ones(backend: str, dtype: torch.dtype) -> None:
    inputs = probabilities(2, 2, 3, 6, 33), *qkv((2, 3, 6, 33, 16))[:2]
    valid = some_keys(2, 33)
    weights = torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(3))

    def mine(attn: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return smk.head_average(attn) + smk.attention_map(q, k, key_valid=valid)

    def plain(attn: Tensor, q: Tensor, k: Tensor) -> Tensor:
        wide = [x.to(torch.promote_types(x.dtype, torch.float32)) for x in (attn, q, k)]
        return oracle.head_average(list(wide[0])) + oracle.attention_map(*wide[1:], valid)

    def grads(call: Callable[..., Tensor], of: torch.dtype) -> tuple[Tensor, ...]:
        leaves = [x.to(dtype).to(of).requires_grad_() for x in inputs]
        return torch.autograd.grad((call(*leaves) * weights).sum(), leaves)

    for got, own, truth in zip(
        grads(mine, dtype), grads(plain, dtype), grads(plain, torch.float64), strict=True
    ):
        assert got.dtype == dtype
        assert_as_accurate(got, own, truth)


@pytest.mark.parametrize("wanted", ["q", "k"])
def test_gradient_only_of_what_asks_for_it(wanted: str) -> None:
    q, k, _ = (torch.stack([x, x.flip(0)]).double() for x in qkv((2, 3, 4, 9, 8)))
    inputs = {"q": q, "k": k}  # of two layers
    inputs[wanted].requires_grad_()
    results = []
    for served in (backend_without_autograd(), smk.use_backend("eager")):
        with served:
            loss = (smk.attention_map(**inputs) * torch.arange(8)).sum()
        results.append(torch.autograd.grad(loss, inputs[wanted])[0])
    torch.testing.assert_close(*results)


def test_nothing_is_recorded_without_gradients(backend: str) -> None:
    q, k, _ = (x.requires_grad_() for x in qkv((2, 3, 4, 9, 8)))
    with torch.no_grad():
        assert not smk.attention_map(q, k).requires_grad
        assert not smk.head_average(q).requires_grad


def test_autocast_changes_nothing(backend: str) -> None:
    q, k, _ = (x.requires_grad_() for x in qkv((2, 3, 6, 33, 16)))
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            attn = smk.attention_map(q, k)
        grads = torch.autograd.grad((attn * torch.arange(32)).sum(), (q, k))
        results.append((attn, *grads))
    for plain, cast in zip(*results, strict=True):
        assert torch.equal(plain, cast)


def test_a_row_is_averaged_alike_in_any_batch(backend: str) -> None:
    if backend == "eager":
        pytest.skip("PyTorch's own products may depend on the batch")
    q, k, _ = qkv((5, 3, 7, 70, 40))
    attn = probabilities(5, 3, 7, 70)
    valid = some_keys(5, 70)
    maps, means = smk.attention_map(q, k, key_valid=valid), smk.head_average(attn)
    for b in range(5):
        row = slice(b, b + 1)
        assert torch.equal(smk.attention_map(q[row], k[row], key_valid=valid[row]), maps[row])
        assert torch.equal(smk.head_average(attn[row]), means[row])


# ---- bad input ----


@pytest.mark.parametrize(
    ("attn", "options", "error", "message"),
    [
        ([], {}, ValueError, "attn must hold at least one layer"),
        (None, {}, TypeError, "attn must be a torch.Tensor, got NoneType"),
        (torch.ones(2, 3), {}, ValueError, r"attn must be \[B, H, T, S\] or \[L, B, H, T, S\]"),
        (torch.ones(0, 1, 1, 2, 3), {}, ValueError, "attn must hold at least one layer, got shape"),
        (torch.ones(1, 0, 2, 3), {}, ValueError, "attn must have at least one head"),
        (torch.ones(1, 1, 2, 3, dtype=torch.int32), {}, TypeError, "attn must be of type float16"),
        (torch.ones(1, 1, 2, 3), {"skip_keys": 4}, ValueError, r"skip_keys must be in .* got 4"),
        (torch.ones(1, 1, 2, 3), {"skip_keys": -1}, ValueError, r"skip_keys must be in .* got -1"),
        (torch.ones(1, 1, 2, 3), {"skip_keys": 1.0}, TypeError, "skip_keys must be an int, got"),
        ([torch.ones(1, 1, 2, 3), torch.ones(1, 1, 2, 4)], {}, ValueError, r"attn\[1\] must be"),
        (
            [torch.ones(1, 1, 2, 3), torch.ones(1, 1, 2, 3).half()],
            {},
            TypeError,
            r"attn\[1\] must be of type float32",
        ),
    ],
)
def test_head_average_bad_input(
    attn: object, options: dict[str, int], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        smk.head_average(attn, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"k": torch.ones(2, 3, 5, 9)}, ValueError, r"k must be \[\(L,\) B, H, S, D\]"),
        ({"k": torch.ones(2, 1, 5, 8)}, ValueError, r"k must be \[\(L,\) B, H, S, D\]"),
        ({"k": torch.ones(2, 3, 5, 8).half()}, TypeError, "k must be of type float32, got float16"),
        ({"k": torch.ones(2, 3, 5, 8, device="meta")}, ValueError, "k must be on the device of q"),
        ({"q": torch.ones(2, 3, 4, 0), "k": torch.ones(2, 3, 5, 0)}, ValueError, "q must have D"),
        ({"key_valid": torch.ones(2, 5)}, TypeError, "key_valid must be of type bool"),
        ({"key_valid": torch.ones(5, dtype=torch.bool)}, ValueError, r"key_valid must be \[B, S\]"),
        ({"skip_keys": 6}, ValueError, "skip_keys"),
        ({"scale": "1"}, TypeError, "scale must be a number, got str"),
        ({"scale": float("nan")}, ValueError, "scale must be finite, got nan"),
        ({"scale": 10**400}, ValueError, "scale must be finite, got 1000"),
        ({"scale": torch.tensor(1.0)}, TypeError, "scale must be a number, got Tensor"),
    ],
)
def test_attention_map_bad_input(
    change: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        smk.attention_map(**{"q": torch.ones(2, 3, 4, 8), "k": torch.ones(2, 3, 5, 8), **change})
