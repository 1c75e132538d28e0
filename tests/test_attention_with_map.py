"""attention_with_map: the output of attention and its map, from one pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import syncmask_kernels as smk
from reference.ops import attention as oracle
from tests.accuracy import assert_as_accurate
from tests.attention_cases import EMPTY, LAYOUTS, SHAPES, broken, qkv, some_keys
from tests.serving import backend_without_autograd

pytestmark = pytest.mark.usefixtures("backend")


def plain(q: Tensor, k: Tensor, v: Tensor, valid: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    logits = (q.float() @ k.float().mT * scale).masked_fill(~valid[:, None, None], float("-inf"))
    weights = logits.softmax(dim=-1).nan_to_num()
    return (weights @ v.float()).to(q.dtype), weights.mean(dim=1)


def check(q: Tensor, k: Tensor, v: Tensor, valid: Tensor, scale: float, skip_keys: int) -> None:
    got = smk.attention_with_map(q, k, v, key_valid=valid, scale=scale, skip_keys=skip_keys)
    assert got.output.dtype == q.dtype
    assert got.map.dtype == torch.float32
    wide = (x.double() for x in (q, k, v))
    output, attn = oracle.attention_with_map(*wide, valid, scale, skip_keys)
    own_output, own_attn = plain(q, k, v, valid, scale)
    assert_as_accurate(got.output, own_output, output)
    assert_as_accurate(got.map, own_attn[..., skip_keys:], attn)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", SHAPES + EMPTY, ids=str)
def test_output_and_map(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    valid = some_keys(shape[0], shape[3])
    for skip_keys, values in [(1, 24), (0, 1), (shape[3], shape[4])]:
        check(*qkv(shape, dtype, values), valid, 0.2, skip_keys)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_views(layout: str) -> None:
    q, k, v = (LAYOUTS[layout](x) for x in qkv((2, 3, 6, 70, 40)))
    assert not v.is_contiguous()
    check(q, k, v, some_keys(2, 140)[:, ::2], 40**-0.5, 1)


def test_it_is_attention_and_attention_map() -> None:
    q, k, v = qkv((2, 3, 6, 70, 40))
    output, attn = smk.attention_with_map(q, k, v)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(output, expected)
    with smk.use_backend("eager"):
        torch.testing.assert_close(attn, smk.attention_map(q, k))


def test_float64_stays_float64(backend: str) -> None:
    if backend != "eager":
        pytest.skip("float64 is served by eager")
    q, k, v = (x.double() for x in qkv((2, 3, 6, 20, 8)))
    found = smk.attention_with_map(q, k, v, key_valid=some_keys(2, 20))
    for got, wanted in zip(
        found, oracle.attention_with_map(q, k, v, some_keys(2, 20)), strict=True
    ):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_broken_numbers_are_those_of_eager(dtype: torch.dtype) -> None:
    q, k, v = qkv((3, 2, 5, 21, 8), dtype)
    for inputs in [(broken(q), k, v), (q, broken(k), v), (q, k, broken(v))]:
        got = smk.attention_with_map(*inputs)
        with smk.use_backend("eager"):
            wanted = smk.attention_with_map(*inputs)
        assert not wanted.output.isfinite().all()
        for mine, eager in zip(got, wanted, strict=True):
            torch.testing.assert_close(mine, eager, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_output_is_rounded_to_nearest_even(dtype: torch.dtype) -> None:
    """Half of the means of two neighbours lie halfway between two numbers of the type."""
    bits = torch.arange(480)[:, None] * 61 + torch.arange(2)
    positive = bits.to(torch.int16).view(dtype).mT[None, None]
    v = torch.cat([positive, -positive], dim=-1)
    q, k = torch.zeros(1, 1, 1, 4, dtype=dtype), torch.ones(1, 1, 2, 4, dtype=dtype)
    output, _ = smk.attention_with_map(q, k, v)
    assert torch.equal(output, v.double().mean(dim=-2, keepdim=True).to(dtype))


def test_a_row_without_a_valid_key_is_zero() -> None:
    q, k, v = (x.requires_grad_() for x in qkv((2, 3, 6, 20, 8)))
    found = smk.attention_with_map(q, k, v, key_valid=some_keys(2, 20))
    for part in found:
        assert (part[1] == 0).all()
        assert (part[0] != 0).any()
    loss = (found.map * torch.arange(19)).sum() + found.output.square().sum()
    for grad in torch.autograd.grad(loss, (q, k, v)):
        assert (grad[1] == 0).all()
        assert (grad[0] != 0).any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("parts", ["output", "map", "both"])
def test_gradients_are_as_accurate_as_plain_ones(parts: str, dtype: torch.dtype) -> None:
    inputs = qkv((2, 3, 6, 33, 16), dtype)
    valid = some_keys(2, 33)
    generator = torch.Generator().manual_seed(3)
    of_output = torch.randn(2, 3, 6, 24, generator=generator)
    of_map = torch.randn(2, 6, 32, generator=generator)

    def plain(*qkv: Tensor) -> tuple[Tensor, Tensor]:
        wide = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in qkv)
        output, attn = oracle.attention_with_map(*wide, valid)
        return output.to(qkv[0].dtype), attn

    def grads(call: Callable[..., tuple[Tensor, Tensor]], of: torch.dtype) -> tuple[Tensor, ...]:
        leaves = [x.to(of).requires_grad_() for x in inputs]
        output, attn = call(*leaves)
        losses = {"output": (output * of_output).sum(), "map": (attn * of_map).sum()}
        losses["both"] = losses["output"] + losses["map"]
        return torch.autograd.grad(losses[parts], leaves, materialize_grads=True)

    def mine(*qkv: Tensor) -> tuple[Tensor, Tensor]:
        return smk.attention_with_map(*qkv, key_valid=valid)

    for got, own, truth in zip(
        grads(mine, dtype), grads(plain, dtype), grads(plain, torch.float64), strict=True
    ):
        assert got.dtype == dtype
        assert_as_accurate(got, own, truth)


@pytest.mark.parametrize("wanted", ["q", "k", "v"])
def test_gradient_only_of_what_asks_for_it(wanted: str) -> None:
    inputs = dict(zip("qkv", (x.double() for x in qkv((2, 3, 4, 9, 8))), strict=True))
    inputs[wanted].requires_grad_()
    results = []
    for served in (backend_without_autograd(), smk.use_backend("eager")):
        with served:
            found = smk.attention_with_map(**inputs)
        loss = (found.map * torch.arange(8)).sum() + found.output.square().sum()
        results.append(torch.autograd.grad(loss, inputs[wanted])[0])
    torch.testing.assert_close(*results)


def test_autocast_changes_nothing() -> None:
    inputs = [x.requires_grad_() for x in qkv((2, 3, 6, 33, 16))]
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            found = smk.attention_with_map(*inputs)
        loss = (found.map * torch.arange(32)).sum() + found.output.square().sum()
        results.append((*found, *torch.autograd.grad(loss, inputs)))
    for once, cast in zip(*results, strict=True):
        assert torch.equal(once, cast)


def test_a_row_is_alike_in_any_batch(backend: str) -> None:
    if backend == "eager":
        pytest.skip("PyTorch's own products may depend on the batch")
    q, k, v = qkv((5, 3, 7, 70, 40))
    valid = some_keys(5, 70)
    whole = smk.attention_with_map(q, k, v, key_valid=valid)
    for b in range(5):
        row = slice(b, b + 1)
        alone = smk.attention_with_map(q[row], k[row], v[row], key_valid=valid[row])
        assert all(torch.equal(a[row], c) for a, c in zip(whole, alone, strict=True))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": [torch.ones(2, 3, 4, 8)]}, TypeError, "q must be a torch.Tensor, got list"),
        ({"q": torch.ones(1, 2, 3, 4, 8)}, ValueError, r"q must be \[B, H, T, D\], got shape"),
        ({"k": torch.ones(3, 5, 8)}, ValueError, r"k must be \[B, H, S, D\], got shape"),
        ({"v": torch.ones(2, 3, 6, 7)}, ValueError, r"v must be \[B, H, S, E\] = \(2, 3, 5, 7\)"),
        ({"v": torch.ones(2, 3, 5, 7).half()}, TypeError, "v must be of type float32, got float16"),
        ({"v": torch.ones(2, 3, 5, 7, device="meta")}, ValueError, "v must be on the device of q"),
        ({"key_valid": torch.ones(2, 5)}, TypeError, "key_valid must be of type bool"),
        ({"skip_keys": 6}, ValueError, "skip_keys must be in"),
    ],
)
def test_bad_input(change: dict[str, Any], error: type[Exception], message: str) -> None:
    inputs = {
        "q": torch.ones(2, 3, 4, 8),
        "k": torch.ones(2, 3, 5, 8),
        "v": torch.ones(2, 3, 5, 7),
    }
    with pytest.raises(error, match=message):
        smk.attention_with_map(**{**inputs, **change})
