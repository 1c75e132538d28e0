"""mask_patches, gather_masked and scatter_masked."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import syncmask_kernels as smk
from reference.ops import masking as oracle
from syncmask_kernels import backends
from tests.accuracy import assert_as_accurate
from tests.masking_cases import (
    EMPTY,
    LAYOUTS,
    SIZES,
    mask,
    repeated_ids,
    rows,
    unique_ids,
)

HALVES_AND_FLOAT = [torch.float16, torch.bfloat16, torch.float32]
ALL_SIZES = pytest.mark.parametrize("size", SIZES + EMPTY, ids=str)
NAN = float("nan")


# ---- values ----


@pytest.mark.parametrize("dtype", HALVES_AND_FLOAT)
@ALL_SIZES
def test_mask_patches(backend: str, size: tuple[int, ...], dtype: torch.dtype) -> None:
    batch, positions, _, columns = size
    x, masked, token = (
        rows(batch, positions, columns, dtype),
        mask(batch, positions),
        rows(1, 1, columns)[0, 0],
    )
    for given_token in (token, token.to(dtype)):
        out = smk.mask_patches(x, masked, given_token)
        assert out.dtype == dtype
        assert torch.equal(out, oracle.mask_patches(x, masked, token.to(dtype)))


@pytest.mark.parametrize("dtype", HALVES_AND_FLOAT)
@ALL_SIZES
def test_gather_and_scatter(backend: str, size: tuple[int, ...], dtype: torch.dtype) -> None:
    batch, positions, width, columns = size
    ids = unique_ids(batch, positions, width)
    x = rows(batch, positions, columns, dtype)
    picked = smk.gather_masked(x, ids, fill=2.5)
    assert picked.dtype == dtype
    assert torch.equal(picked, oracle.gather_masked(x, ids, fill=2.5))
    back = smk.scatter_masked(picked, ids, positions)
    assert back.dtype == dtype
    assert torch.equal(back, oracle.scatter_masked(picked, ids, positions))


SIZE = st.integers(0, 6)


@settings(max_examples=60, deadline=None)
@given(batch=SIZE, positions=SIZE, width=SIZE, columns=SIZE, seed=st.integers(0, 99))
def test_any_size(batch: int, positions: int, width: int, columns: int, seed: int) -> None:
    x, ids = rows(batch, positions, columns, seed=seed), unique_ids(batch, positions, width, seed)
    picked = smk.gather_masked(x, ids, fill=2.5)
    assert torch.equal(picked, oracle.gather_masked(x, ids, fill=2.5))
    back = smk.scatter_masked(picked, ids, positions)
    assert torch.equal(back, oracle.scatter_masked(picked, ids, positions))


@pytest.mark.parametrize(
    "dtype",
    [*HALVES_AND_FLOAT, torch.float64, torch.complex64, torch.int64, torch.uint8, torch.bool],
)
@pytest.mark.parametrize("trailing", [(), (3,), (2, 3)], ids=str)
def test_gather_masked_of_any_type_and_rank(dtype: torch.dtype, trailing: tuple[int, ...]) -> None:
    x = torch.randint(0, 2, (3, 7, *trailing)).to(dtype)
    ids = unique_ids(3, 7, 4)
    out = smk.gather_masked(x, ids, fill=1)
    assert out.dtype == dtype
    assert torch.equal(out, oracle.gather_masked(x, ids, fill=1))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.uint8, torch.bool])
def test_labels(backend: str, dtype: torch.dtype) -> None:
    labels = torch.tensor([[5, 6, 7], [1, 0, 3]]).to(dtype)
    ids, fill = torch.tensor([[2, -1], [0, 1]]), -100 if dtype.is_signed else 0
    got = smk.gather_masked(labels, ids, fill=fill)
    assert got.dtype == dtype
    assert torch.equal(got, torch.tensor([[7, fill], [1, 0]]).to(dtype))


def test_float64_is_moved_in_full() -> None:
    x = 1 + 1e-12 * rows(2, 5, 3, torch.float64)
    ids = torch.tensor([[3, 0], [1, 4]])
    picked = smk.gather_masked(x, ids)
    assert torch.equal(picked, oracle.gather_masked(x, ids))
    assert torch.equal(smk.scatter_masked(picked, ids, 5), oracle.scatter_masked(picked, ids, 5))
    masked = mask(2, 5)
    assert torch.equal(
        smk.mask_patches(x, masked, x[0, 0]), oracle.mask_patches(x, masked, x[0, 0])
    )


def test_integers_are_scattered() -> None:
    x, ids = torch.tensor([[2**60 + 1, 5, 7]]), torch.tensor([[1, 2, 2]])
    assert smk.scatter_masked(x, ids, 4).tolist() == [[0, 2**60 + 1, 12, 0]]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout(backend: str, layout: str) -> None:
    view = LAYOUTS[layout](rows(3, 7, 6))
    ids, masked = unique_ids(3, 7, 7), mask(7, 3).t()
    assert torch.equal(smk.gather_masked(view, ids), oracle.gather_masked(view, ids))
    assert torch.equal(
        smk.gather_masked(view, ids.mT.contiguous().mT), smk.gather_masked(view, ids)
    )
    assert torch.equal(smk.scatter_masked(view, ids, 9), oracle.scatter_masked(view, ids, 9))
    token = torch.arange(12.0)[::2]
    assert torch.equal(
        smk.mask_patches(view, masked, token), oracle.mask_patches(view, masked, token)
    )


@pytest.mark.parametrize("dtype", HALVES_AND_FLOAT)
@pytest.mark.parametrize("layout", [lambda x: x, *LAYOUTS.values()], ids=["as stored", *LAYOUTS])
def test_rows_of_equal_id_are_summed(
    backend: str, layout: Callable[[Tensor], Tensor], dtype: torch.dtype
) -> None:
    """In ascending order, in float32, to the bit."""
    x, ids = layout(rows(2, 50, 19, dtype)), repeated_ids(2, 6, 50)
    wanted = oracle.scatter_masked(x.float(), ids, 6).to(dtype)
    assert torch.equal(smk.scatter_masked(x, ids, 6), wanted)


def test_ids_that_nobody_looked_at(backend: str) -> None:
    """Where they are not checked (on a GPU, in compiled code) what is no position counts as -1."""
    x, ids = rows(3, 7, 5), repeated_ids(3, 7, 20, beyond=4)
    padded = ids.masked_fill((ids < 0) | (ids >= 7), -1)
    gather = backends.choose("gather_masked", x)
    assert torch.equal(gather(x, ids, 2.5), oracle.gather_masked(x, padded, fill=2.5))
    scatter, moved = backends.choose("scatter_masked", x), rows(3, 20, 5)
    assert torch.equal(scatter(moved, ids, 7), oracle.scatter_masked(moved, padded, 7))


# ---- gradients ----


def token_gradient(x: Tensor, masked: Tensor, token: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    leaves = x.detach().requires_grad_(), token.detach().requires_grad_()
    out = smk.mask_patches(leaves[0], masked, leaves[1])
    return torch.autograd.grad(out, leaves, grad)


@pytest.mark.parametrize("dtype", HALVES_AND_FLOAT)
@pytest.mark.parametrize("size", [*SIZES, (9, 300, 1, 40), *EMPTY[:2]], ids=str)
def test_gradients_of_mask_patches(backend: str, size: tuple[int, ...], dtype: torch.dtype) -> None:
    batch, positions, _, columns = size
    x, masked = rows(batch, positions, columns, dtype), mask(batch, positions)
    for grad in (
        rows(batch, positions, columns, dtype, seed=5),
        torch.ones_like(x[:1, :1]).expand_as(x),
    ):
        patches, token = token_gradient(x, masked, x.new_zeros(columns), grad)
        assert torch.equal(patches, grad.masked_fill(masked[..., None], 0))
        with smk.use_backend("eager"):
            _, plain = token_gradient(x, masked, x.new_zeros(columns), grad)
        truth = (grad.double() * masked[..., None]).sum(dim=(0, 1))
        assert_as_accurate(token, plain, truth, factor=2)


@pytest.mark.parametrize("dtype", HALVES_AND_FLOAT)
def test_gradients_of_gather_and_scatter(backend: str, dtype: torch.dtype) -> None:
    ids = repeated_ids(2, 6, 9)
    x, moved = rows(2, 6, 5, dtype).requires_grad_(), rows(2, 9, 5, dtype).requires_grad_()
    (got,) = torch.autograd.grad(smk.gather_masked(x, ids), x, moved)
    assert torch.equal(got, oracle.scatter_masked(moved.float(), ids, 6).to(dtype))
    (got,) = torch.autograd.grad(smk.scatter_masked(moved, ids, 6), moved, x)
    assert torch.equal(got, oracle.gather_masked(x, ids))


def test_gradients_of_any_layout(backend: str) -> None:
    ids, masked = repeated_ids(3, 7, 7), mask(3, 7)
    for layout in LAYOUTS.values():
        grad = layout(rows(3, 7, 6))
        found = []
        for given_grad in (grad, grad.contiguous()):
            x = rows(3, 7, 6).requires_grad_()
            outs = smk.gather_masked(x, ids), smk.scatter_masked(x, ids, 7)
            found.append([torch.autograd.grad(out, x, given_grad)[0] for out in outs])
            found[-1] += token_gradient(x, masked, x[0, 0], given_grad)
        *moved, summed = zip(*found, strict=True)
        assert all(torch.equal(*pair) for pair in moved)
        torch.testing.assert_close(*summed)  # eager sums another layout in another order


def test_masked_patches_may_be_nan(backend: str) -> None:
    x = torch.tensor([[[NAN], [2.0]]], requires_grad=True)
    token = torch.tensor([5.0], requires_grad=True)
    out = smk.mask_patches(x, torch.tensor([[True, False]]), token)
    assert out.tolist() == [[[5.0], [2.0]]]
    grads = torch.autograd.grad(out, (x, token), torch.tensor([[[3.0], [NAN]]]))
    torch.testing.assert_close(grads[0], torch.tensor([[[0.0], [NAN]]]), equal_nan=True)
    assert grads[1].tolist() == [3.0]


def test_only_what_is_asked_for_gets_a_gradient(backend: str) -> None:
    x, masked, token = rows(2, 3, 4), mask(2, 3), torch.zeros(4)
    wanted = [x.masked_fill(masked[..., None], 0), (x * masked[..., None]).sum(dim=(0, 1))]
    for i, leaf in enumerate([x.clone().requires_grad_(), token.clone().requires_grad_()]):
        given_pair = (leaf, token) if i == 0 else (x, leaf)
        out = smk.mask_patches(given_pair[0], masked, given_pair[1])
        (grad,) = torch.autograd.grad(out, leaf, x)
        torch.testing.assert_close(grad, wanted[i])


def test_mask_token_of_another_type(backend: str) -> None:
    """Its gradient is not rounded to the type of the patches."""
    x = torch.randn(2, 3, 4, dtype=torch.bfloat16)
    token = torch.randn(4, requires_grad=True)
    masked = torch.tensor([[True, True, False], [True, False, False]])
    smk.mask_patches(x, masked, token).sum().backward()
    assert token.grad is not None
    assert token.grad.dtype == torch.float32
    assert token.grad.tolist() == [3.0] * 4


def test_padding_reads_nothing(backend: str) -> None:
    """Where the id is -1 neither the value nor the gradient of position 0 shows."""
    x = torch.tensor([[[NAN], [2.0]]], requires_grad=True)
    picked = smk.gather_masked(x, torch.tensor([[1, -1]]))
    assert picked.tolist() == [[[2.0], [0.0]]]
    (grad,) = torch.autograd.grad(picked.square().sum(), x)
    assert grad.tolist() == [[[0.0], [4.0]]]
    y = torch.tensor([[[3.0], [NAN]]], requires_grad=True)
    out = smk.scatter_masked(y, torch.tensor([[1, -1]]), 2)
    assert out.tolist() == [[[0.0], [3.0]]]
    (grad,) = torch.autograd.grad(out.square().sum(), y)
    assert grad.tolist() == [[[6.0], [0.0]]]


# ---- what surrounds them ----


def test_same_bits_with_any_number_of_threads() -> None:
    if (reason := backends.BACKENDS["cpu"].unavailable("cpu")) is not None:
        pytest.skip(reason)
    x, masked, ids = rows(9, 300, 40), mask(9, 300), repeated_ids(9, 50, 300)
    before, found = torch.get_num_threads(), []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        found.append([smk.scatter_masked(x, ids, 50), smk.gather_masked(x, ids)])
        found[-1] += [smk.mask_patches(x, masked, x[0, 0]), *token_gradient(x, masked, x[0, 0], x)]
    torch.set_num_threads(before)
    assert all(map(torch.equal, *found))


def test_rows_under_autocast(backend: str) -> None:
    x, ids = rows(3, 7, 5, torch.bfloat16), unique_ids(3, 7, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        picked = smk.gather_masked(x, ids)
        assert picked.dtype == torch.bfloat16
        assert smk.scatter_masked(picked, ids, 7).dtype == torch.bfloat16
        assert smk.mask_patches(x, mask(3, 7), torch.ones(5)).dtype == torch.bfloat16


def test_rows_never_ask_the_host() -> None:
    x = torch.zeros(3, 7, 5, device="meta")
    ids = torch.zeros(3, 4, dtype=torch.int64, device="meta")
    assert smk.scatter_masked(smk.gather_masked(x, ids), ids, 7).shape == x.shape
    assert smk.mask_patches(x, x[..., 0] > 0, x[0, 0]).shape == x.shape


X, CHOSEN = rows(3, 7, 5), unique_ids(3, 7, 4)
GRID = torch.zeros(3, 7, dtype=torch.bool)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: smk.gather_masked([1], CHOSEN), TypeError, "x must be a torch.Tensor, got list"),
        (lambda: smk.gather_masked(X[0, 0], CHOSEN), ValueError, r"x must be \[B, N, ...\]"),
        (lambda: smk.gather_masked(X, CHOSEN[0]), ValueError, r"ids must be \[B, K\], got"),
        (lambda: smk.gather_masked(X, CHOSEN.int()), TypeError, "ids .* int64, got int32"),
        (lambda: smk.gather_masked(X, CHOSEN[:2]), ValueError, "ids must have the 3 rows of x"),
        (lambda: smk.gather_masked(X, CHOSEN + 9), ValueError, r"ids .* \[-1, N\) = \[-1, 7\)"),
        (lambda: smk.gather_masked(X, CHOSEN - 9), ValueError, r"ids .* got -10"),
        (lambda: smk.gather_masked(X, CHOSEN.to("meta")), ValueError, "ids .* device of x"),
        (lambda: smk.gather_masked(X, CHOSEN, fill="0"), TypeError, "fill must be a number"),
        (lambda: smk.gather_masked(X.half(), CHOSEN, fill=1e9), ValueError, "fill .* float16"),
        (
            lambda: smk.gather_masked(CHOSEN, CHOSEN[:, :0], fill=0.5),
            ValueError,
            "fill .* int64, got 0.5",
        ),
        (
            lambda: smk.gather_masked(CHOSEN, CHOSEN[:, :0], fill=2**53 + 1),
            ValueError,
            "fill .* int64",
        ),
        (lambda: smk.gather_masked(GRID, CHOSEN, fill=2), ValueError, "fill .* bool, got 2"),
        (lambda: smk.scatter_masked(X, CHOSEN, 7), ValueError, r"ids must be \[B, K\] = \(3, 7\)"),
        (lambda: smk.scatter_masked(X[:, :4] > 0, CHOSEN, 7), ValueError, "not bool"),
        (lambda: smk.scatter_masked(X[:, :4], CHOSEN, -1), ValueError, "N must be at least 0"),
        (lambda: smk.scatter_masked(X[:, :4], CHOSEN + 1, 6), ValueError, "ids must be in"),
        (lambda: smk.mask_patches(X[0], GRID, X[0, 0]), ValueError, r"patches must be \[B, P, D\]"),
        (lambda: smk.mask_patches(X.long(), GRID, X[0, 0]), TypeError, "patches .* got int64"),
        (lambda: smk.mask_patches(X, GRID[:2], X[0, 0]), ValueError, "patch_mask must be"),
        (lambda: smk.mask_patches(X, GRID.int(), X[0, 0]), TypeError, "patch_mask .* bool"),
        (lambda: smk.mask_patches(X, GRID, X[0]), ValueError, r"mask_token must be \[D\] = \(5,\)"),
        (lambda: smk.mask_patches(X, GRID, X[0, 0].long()), TypeError, "mask_token .* int64"),
    ],
)
def test_rows_bad_input(call: Callable[[], Tensor], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        call()
