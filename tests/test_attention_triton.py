"""The Triton kernels of attention, on a GPU or in Triton's interpreter.

As for tests/test_selection_triton.py: ``TRITON_INTERPRET=1 pytest <this file>``.
"""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

import syncmask_kernels as smk
from reference.ops import attention as oracle
from syncmask_kernels.backends import BackendError, triton
from tests.accuracy import assert_as_accurate
from tests.compiling import assert_compiles_once
from tests.on_triton import DEVICE, inside_nan, serve
from tests.sync_cases import seeded

NAN, INF = float("nan"), float("inf")
TYPES = [torch.float32, torch.float16]
NOT_FINITE = pytest.mark.filterwarnings("ignore:(invalid value|All-NaN):RuntimeWarning")


def probabilities(*shape: int) -> Tensor:
    return torch.randn(shape, generator=seeded()).mul(2).softmax(dim=-1)


def inputs(
    batch: int,
    heads: int,
    words: int,
    keys: int,
    dim: int,
    values: int | None = None,
    layers: int | None = None,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> dict[str, Any]:
    """Arguments of attention_map, and with columns of values those of attention_with_map."""
    lead = (batch, heads) if layers is None else (layers, batch, heads)
    given = {
        "q": 2 * torch.randn(*lead, words, dim, generator=seeded(1)).to(dtype),
        "k": torch.randn(*lead, keys, dim, generator=seeded(2)).to(dtype),
    }
    if values is not None:
        given["v"] = torch.randn(*lead, keys, values, generator=seeded(3)).to(dtype)
    return given | options


def some_keys(batch: int, keys: int) -> Tensor:
    """Valid keys, and none in the last row of the batch."""
    valid = torch.rand(batch, keys, generator=seeded(4)) < 0.7
    valid[-1] = False
    return valid


def truth_of(arguments: dict[str, Any]) -> tuple[Tensor, ...]:
    """The output, where there are values, and the map."""
    wide = {n: t.double() for n, t in arguments.items() if n in ("q", "k", "v")}
    layers = [wide["q"][None], wide["k"][None]] if wide["q"].dim() == 4 else [wide["q"], wide["k"]]
    weights = [
        oracle.attention(q, k, arguments.get("key_valid"), arguments.get("scale"))[0]
        for q, k in zip(*layers, strict=True)
    ]
    average = oracle.head_average(weights, arguments.get("skip_keys", 1))
    return (weights[0] @ wide["v"], average) if "v" in wide else (average,)


def check(arguments: dict[str, Any]) -> Any:
    op = smk.attention_with_map if "v" in arguments else smk.attention_map
    got, plain = (serve(op, backend, arguments) for backend in ("triton", "eager"))
    listed = [(got,), (plain,)] if isinstance(got, Tensor) else [got, plain]
    for ours, theirs, truth in zip(*listed, truth_of(arguments), strict=True):
        assert ours.dtype == theirs.dtype
        assert_as_accurate(ours, theirs, truth, factor=4.0)
    return got


# ---- head_average ----


@pytest.mark.parametrize("dtype", [*TYPES, torch.bfloat16])
@pytest.mark.parametrize(
    "shape", [(2, 3, 5, 50), (1, 7, 3, 300), (1, 1, 1, 1), (3, 2, 4, 40, 19), (1, 2, 3, 1)]
)
def test_head_average(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    attn = probabilities(*shape).to(dtype)
    got = serve(smk.head_average, "triton", {"attn": attn})
    layers = list(attn.double()) if attn.dim() == 5 else [attn.double()]
    plain = serve(smk.head_average, "eager", {"attn": attn})
    assert_as_accurate(got, plain, oracle.head_average(layers), factor=4.0)


def test_head_average_of_any_layout() -> None:
    attn = probabilities(2, 2, 3, 5, 20)
    wanted = serve(smk.head_average, "triton", {"attn": attn, "skip_keys": 3})
    turned = attn.permute(4, 1, 3, 0, 2).contiguous().permute(3, 1, 4, 2, 0)
    for view in (inside_nan(attn), turned):
        got = serve(smk.head_average, "triton", {"attn": view, "skip_keys": 3})
        assert torch.equal(got, wanted)


@NOT_FINITE
def test_head_average_of_what_is_not_finite() -> None:
    attn = probabilities(1, 3, 4, 9)
    attn[0, 0, 0, 1] = attn[0, 1, 0, 2] = attn[0, 2, 0, 4] = INF
    attn[0, 1, 0, 1], attn[0, 1, 0, 4] = NAN, -INF
    got, plain = (serve(smk.head_average, b, {"attn": attn}) for b in ("triton", "eager"))
    torch.testing.assert_close(got, plain, rtol=1e-6, atol=0, equal_nan=True)


# ---- attention_map and attention_with_map ----


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("values", [None, 16], ids=["map", "output"])
@pytest.mark.parametrize("sizes", [(1, 1, 1), (33, 65, 40), (5, 129, 16), (17, 64, 72)])
def test_sizes(sizes: tuple[int, int, int], values: int | None, dtype: torch.dtype) -> None:
    """Sizes around those of the tiles."""
    check(inputs(1, 2, *sizes, values=values, dtype=dtype))


@pytest.mark.parametrize("values", [None, 70], ids=["map", "output"])
def test_options(values: int | None) -> None:
    """All of them, and a row without a valid key."""
    options = {"key_valid": some_keys(2, 70), "scale": 0.3, "skip_keys": 5}
    got = check(inputs(2, 3, 6, 70, 24, values, **options))
    for answer in (got,) if values is None else got:
        assert (answer[1] == 0).all()


def test_layers_are_averaged() -> None:
    check(inputs(2, 2, 5, 20, 8, layers=3, key_valid=some_keys(2, 20)))


@pytest.mark.parametrize("values", [None, 20], ids=["map", "output"])
def test_any_layout(values: int | None) -> None:
    arguments = inputs(2, 2, 5, 20, 8, values)
    op = smk.attention_map if values is None else smk.attention_with_map
    wanted = serve(op, "triton", arguments)
    views = {name: inside_nan(tensor) for name, tensor in arguments.items()}
    # As a linear layer leaves them: [B, T, H, D].
    turned = {name: t.transpose(1, 2).contiguous().transpose(1, 2) for name, t in arguments.items()}
    for same in (views, turned):
        got = serve(op, "triton", same)
        assert all(map(torch.equal, got, wanted))


def test_invalid_keys_are_not_read() -> None:
    arguments = inputs(2, 2, 5, 80, 8, key_valid=some_keys(2, 80))
    wanted = serve(smk.attention_map, "triton", arguments)
    arguments["k"][~arguments["key_valid"][:, None].expand(2, 2, 80)] = NAN
    assert torch.equal(serve(smk.attention_map, "triton", arguments), wanted)


def test_large_logits() -> None:
    """The maximum of a row rises from tile to tile, far beyond what exp can hold."""
    arguments = inputs(1, 2, 3, 200, 8, 8)
    arguments["k"] *= torch.linspace(1, 60, 200)[:, None]
    check(arguments)


@NOT_FINITE
@pytest.mark.parametrize("far", [INF, -INF])
def test_not_finite(far: float) -> None:
    arguments = inputs(1, 1, 7, 140, 8, 8)
    q, k, v = (arguments[name][0, 0] for name in "qkv")
    k[70, 0], v[3, 0] = far, INF
    q[:, 0] = torch.tensor([0.0, 1, 2, -1, -2, 3, 4])  # times `far`: NaN and both infinities
    q[5, 1] = NAN
    got, plain = (serve(smk.attention_with_map, b, arguments) for b in ("triton", "eager"))
    for ours, theirs in zip(got, plain, strict=True):
        assert theirs.isnan().any()
        assert theirs.isfinite().any()
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize(
    "sizes", [(0, 2, 3, 4, 5), (2, 2, 0, 4, 5), (2, 2, 3, 1, 5), (1, 1, 2, 0, 3)]
)
@pytest.mark.parametrize("values", [None, 3, 0], ids=["map", "output", "no-columns"])
def test_empty(sizes: tuple[int, ...], values: int | None) -> None:
    check(inputs(*sizes, values=values, skip_keys=min(1, sizes[3])))


def test_same_bits_in_any_batch_run_after_run() -> None:
    arguments = inputs(2, 2, 5, 70, 16, 16, key_valid=some_keys(2, 70))
    whole = serve(smk.attention_with_map, "triton", arguments)
    again = serve(smk.attention_with_map, "triton", arguments)
    one = {name: tensor[:1] for name, tensor in arguments.items()}
    alone = serve(smk.attention_with_map, "triton", one)
    for first, second, row in zip(whole, again, alone, strict=True):
        assert torch.equal(first, second)
        assert torch.equal(first[:1], row)


def test_probabilities_are_never_in_memory() -> None:
    arguments = inputs(2, 8, 4, 40, 8)
    sizes = []
    empty = torch.empty

    def watched(size: Any, **options: Any) -> Tensor:
        sizes.append(torch.Size(size).numel())
        return empty(size, **options)

    with mock.patch.object(torch, "empty", watched), smk.use_backend("triton"):
        smk.attention_map(**{name: tensor.to(DEVICE) for name, tensor in arguments.items()})
    assert sum(sizes) < 2 * (2 * 4 * 40)  # two maps; the probabilities are eight


# ---- registration ----


def test_gradients_are_those_of_eager() -> None:
    grads = []
    for backend in ("eager", "triton"):
        arguments = inputs(1, 2, 3, 9, 4, 5)
        tensors = [tensor.requires_grad_() for tensor in arguments.values()]
        got = serve(smk.attention_with_map, backend, arguments)
        average = serve(smk.head_average, backend, {"attn": tensors[2]})
        loss = got.output.square().sum() + got.map.square().sum() + average.square().sum()
        grads.append(torch.autograd.grad(loss, tensors))
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_opcheck() -> None:
    from syncmask_kernels.backends.triton import attention

    given = {name: tensor.to(DEVICE) for name, tensor in inputs(2, 2, 3, 6, 4, 5).items()}
    q, k, v = given.values()
    valid = some_keys(2, 6).to(DEVICE)
    strided = [tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in (q, k, v)]
    torch.library.opcheck(attention._head_average, (v.unsqueeze(0).half(), 1))
    torch.library.opcheck(attention._attention_map, (q[None], k[None], valid, 0.5, 2))
    torch.library.opcheck(attention._attention_with_map, (*strided, None, 0.5, 1))


def test_compiles() -> None:
    def maps(q: Tensor, k: Tensor, v: Tensor, valid: Tensor) -> tuple[Tensor, ...]:
        both = smk.attention_with_map(q, k, v, key_valid=valid)
        return (*both, smk.attention_map(q, k), smk.head_average(v))

    calls = []
    for b, t, s in [(2, 5, 6), (4, 6, 9)]:
        tensors = [*inputs(b, 3, t, s, 8, 7).values(), some_keys(b, s)]
        calls.append(tuple(tensor.to(DEVICE) for tensor in tensors))
    with smk.use_backend("triton"):
        assert_compiles_once(maps, calls)


def test_refusals() -> None:
    wide = torch.zeros(1, 1, 2, triton.MAX_HEAD_DIM + 1, device=DEVICE)
    calls = [
        (lambda: smk.head_average(wide.double()), "float64"),
        (lambda: smk.attention_map(wide, wide), "heads of 129 columns"),
        (lambda: smk.attention_with_map(*[wide[..., :9].double()] * 3), "float64"),
    ]
    if triton.INTERPRETED:
        half = wide[..., :9].bfloat16()
        calls.append((lambda: smk.attention_map(half, half), "interpreter"))
    for call, reason in calls:
        with smk.use_backend("triton"), pytest.raises(BackendError, match=reason):
            call()
