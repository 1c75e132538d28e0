"""head_average and attention_map against their definitions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import syncmask_kernels as smk
from reference.ops import attention as oracle
from tests.accuracy import assert_as_accurate
from tests.compiling import assert_compiles_once

HALVES_AND_FLOAT = [torch.float16, torch.bfloat16, torch.float32]


def probabilities(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).softmax(dim=-1)


@pytest.mark.parametrize("dtype", HALVES_AND_FLOAT)
@pytest.mark.parametrize("shape", [(2, 12, 5, 50), (3, 7, 23, 198), (1, 1, 1, 1), (0, 2, 3, 4)])
def test_head_average(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    attn = probabilities(*shape).to(dtype)
    got = smk.head_average(attn)
    assert got.dtype == torch.float32
    truth = oracle.head_average([attn.double()])
    assert_as_accurate(got, attn.float().mean(dim=1)[..., 1:], truth)


def test_layers_are_averaged_whether_stacked_or_listed() -> None:
    layers = [probabilities(2, 3, 4, 9, seed=i) for i in range(3)]
    truth = oracle.head_average([layer.double() for layer in layers], skip_keys=2)
    plain = torch.stack(layers).mean(dim=(0, 2))[..., 2:]
    assert_as_accurate(smk.head_average(torch.stack(layers), skip_keys=2), plain, truth)
    assert_as_accurate(smk.head_average(layers, skip_keys=2), plain, truth)


def test_head_average_of_float64_is_float64() -> None:
    attn = probabilities(2, 3, 4, 9).double()
    torch.testing.assert_close(smk.head_average(attn), oracle.head_average([attn]))


def test_head_average_of_a_view() -> None:
    attn = probabilities(2, 9, 4, 3).transpose(1, 3)
    assert not attn.is_contiguous()
    torch.testing.assert_close(smk.head_average(attn), smk.head_average(attn.contiguous()))


def test_head_average_gradient() -> None:
    attn = probabilities(2, 3, 4, 5).double().requires_grad_()
    assert torch.autograd.gradcheck(smk.head_average, attn)


def inputs(dtype: torch.dtype = torch.float32, layers: int | None = None) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    lead = () if layers is None else (layers,)
    q = torch.randn((*lead, 3, 7, 23, 40), generator=generator) * 3
    k = torch.randn((*lead, 3, 7, 66, 40), generator=generator)
    return q.to(dtype), k.to(dtype)


@pytest.mark.parametrize("dtype", HALVES_AND_FLOAT)
def test_attention_map(dtype: torch.dtype) -> None:
    q, k = inputs(dtype)
    valid = torch.rand(3, 66, generator=torch.Generator().manual_seed(1)) < 0.7
    got = smk.attention_map(q, k, key_valid=valid, scale=0.2)
    assert got.dtype == torch.float32
    truth = oracle.attention_map(q.double(), k.double(), valid, 0.2)
    logits = (q.float() @ k.float().mT * 0.2).masked_fill(~valid[:, None, None], float("-inf"))
    plain = logits.softmax(dim=-1).mean(dim=1)[..., 1:]
    assert_as_accurate(got, plain, truth, factor=4.0)


def test_attention_map_of_layers_and_views() -> None:
    q, k = inputs(layers=2)
    plain = torch.stack([smk.attention_map(q[i], k[i]) for i in range(2)]).mean(dim=0)
    torch.testing.assert_close(smk.attention_map(q, k), plain)
    as_views = [t.transpose(2, 3).contiguous().transpose(2, 3) for t in (q, k)]
    torch.testing.assert_close(smk.attention_map(*as_views), plain)
    torch.testing.assert_close(smk.attention_map(list(q), list(k)), plain)


def test_row_without_a_valid_key_is_zero() -> None:
    q, k = inputs()
    valid = torch.ones(3, 66, dtype=torch.bool)
    valid[1] = False
    q.requires_grad_()
    result = smk.attention_map(q, k, key_valid=valid)
    assert (result[1] == 0).all()
    assert (result[0] > 0).all()
    result.sum().backward()
    assert q.grad is not None
    assert q.grad.isfinite().all()


def test_attention_map_gradient() -> None:
    q, k = (t[:1, :2, :3, :4].double().requires_grad_() for t in inputs())
    valid = torch.tensor([[True, True, False]])
    assert torch.autograd.gradcheck(
        lambda q, k: smk.attention_map(q, k[:, :, :3], key_valid=valid), (q, k)
    )


def test_compiles() -> None:
    def both(q: Tensor, k: Tensor, valid: Tensor) -> Tensor:
        attn = (q @ k.mT).softmax(dim=-1)
        return smk.head_average(attn) + smk.attention_map(q, k, key_valid=valid)

    calls = []
    for b, t, s in [(2, 5, 9), (3, 6, 12), (4, 9, 20)]:
        valid = torch.rand(b, s) < 0.9
        calls.append((torch.randn(b, 3, t, 8), torch.randn(b, 3, s, 8), valid))
    assert_compiles_once(both, calls, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("attn", "options", "error", "message"),
    [
        ([], {}, ValueError, "attn must hold at least one layer"),
        (None, {}, TypeError, "attn must be a torch.Tensor, got NoneType"),
        (torch.ones(2, 3), {}, ValueError, r"attn must be \[B, H, T, S\] or \[L, B, H, T, S\]"),
        (torch.ones(1, 0, 2, 3), {}, ValueError, "attn must have at least one head"),
        (torch.ones(1, 1, 2, 3, dtype=torch.int32), {}, TypeError, "attn must be of type float16"),
        (torch.ones(1, 1, 2, 3), {"skip_keys": 4}, ValueError, r"skip_keys must be in .* got 4"),
        ([torch.ones(1, 1, 2, 3), torch.ones(1, 1, 2, 4)], {}, ValueError, r"attn\[1\] must be"),
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
        ({"k": torch.ones(2, 3, 5, 8).half()}, TypeError, "k must be of type float32, got float16"),
        ({"key_valid": torch.ones(2, 5)}, TypeError, "key_valid must be of type bool"),
        ({"key_valid": torch.ones(5, dtype=torch.bool)}, ValueError, r"key_valid must be \[B, S\]"),
        ({"skip_keys": 6}, ValueError, "skip_keys"),
    ],
)
def test_attention_map_bad_input(
    change: dict[str, object], error: type[Exception], message: str
) -> None:
    arguments = {"q": torch.ones(2, 3, 4, 8), "k": torch.ones(2, 3, 5, 8), **change}
    with pytest.raises(error, match=message):
        smk.attention_map(**arguments)  # type: ignore[arg-type]
