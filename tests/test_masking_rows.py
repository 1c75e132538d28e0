"""mask_patches, gather_masked and scatter_masked."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import syncmask_kernels as smk
from reference.ops import masking as oracle
from tests.compiling import assert_compiles_once

FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
NAN = float("nan")


def random_ids(batch, positions, width, generator):
    """Unique ascending ids with -1 at the end, some rows empty."""
    ids = torch.full((batch, width), -1)
    for row in ids:
        count = int(torch.randint(min(positions, width) + 1, (), generator=generator))
        chosen = torch.randperm(positions, generator=generator)[:count].sort().values
        row[:count] = chosen
    return ids


def case(batch=3, positions=7, width=4, dim=5, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, positions, dim, generator=generator).to(dtype)
    return x, random_ids(batch, positions, width, generator)


@pytest.mark.parametrize("dtype", FLOATS)
def test_mask_patches_equals_oracle(dtype):
    x, _ = case(dtype=dtype)
    mask, token = torch.rand(3, 7) < 0.5, torch.randn(5)
    out = smk.mask_patches(x, mask, token)
    assert out.dtype == dtype
    assert torch.equal(out, oracle.mask_patches(x, mask, token.to(dtype)))


SIZE = st.integers(0, 6)


@settings(max_examples=80, deadline=None)
@given(batch=SIZE, positions=SIZE, width=SIZE, dim=SIZE, seed=st.integers(0, 99))
def test_gather_and_scatter_equal_oracle(batch, positions, width, dim, seed):
    x, ids = case(batch, positions, width, dim, seed=seed)
    rows = smk.gather_masked(x, ids, fill=2.5)
    assert torch.equal(rows, oracle.gather_masked(x, ids, fill=2.5))
    back = smk.scatter_masked(rows, ids, positions)
    assert torch.equal(back, oracle.scatter_masked(rows, ids, positions))


@pytest.mark.parametrize("dtype", [*FLOATS, torch.int64, torch.bool])
@pytest.mark.parametrize("trailing", [(), (3,), (2, 3)])
def test_gather_masked_types_and_ranks(dtype, trailing):
    x = torch.randint(0, 2, (3, 7, *trailing)).to(dtype)
    _, ids = case()
    out = smk.gather_masked(x, ids, fill=1)
    assert out.dtype == dtype
    assert torch.equal(out, oracle.gather_masked(x, ids, fill=1))


def test_gather_masked_labels():
    labels = torch.tensor([[5, 6, 7], [1, 2, 3]])
    ids = torch.tensor([[2, -1], [0, 1]])
    assert smk.gather_masked(labels, ids, fill=-100).tolist() == [[7, -100], [1, 2]]


def test_rows_of_views():
    wide = torch.randn(3, 10, 8)
    _, ids = case()
    x = wide[:, 1:8, ::2]
    assert torch.equal(smk.gather_masked(x, ids), smk.gather_masked(x.clone(), ids))
    turned = wide.permute(0, 2, 1)[:, :4]
    assert torch.equal(smk.scatter_masked(turned, ids, 7), oracle.scatter_masked(turned, ids, 7))
    mask = torch.rand(7, 3).t() < 0.5
    assert torch.equal(
        smk.mask_patches(x, mask, torch.ones(4)), oracle.mask_patches(x, mask, torch.ones(4))
    )


def test_scatter_masked_sums_equal_ids():
    x = torch.tensor([[[1.0], [2.0], [4.0]]])
    assert smk.scatter_masked(x, torch.tensor([[1, 1, 0]]), 2).tolist() == [[[4.0], [3.0]]]


def test_scatter_masked_is_the_adjoint_of_gather_masked():
    x, ids = case(dtype=torch.float64)
    y = torch.randn(3, 4, 5, dtype=torch.float64)
    left = (smk.gather_masked(x, ids) * y).sum()
    right = (x * smk.scatter_masked(y, ids, 7)).sum()
    torch.testing.assert_close(left, right, rtol=1e-14, atol=1e-14)


def test_rows_gradcheck():
    x, ids = case(dtype=torch.float64)
    x.requires_grad_()
    rows = torch.randn(3, 4, 5, dtype=torch.float64, requires_grad=True)
    token = torch.randn(5, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(3, 7) < 0.5
    assert torch.autograd.gradcheck(lambda x: smk.gather_masked(x, ids, fill=3.0), (x,))
    assert torch.autograd.gradcheck(lambda r: smk.scatter_masked(r, ids, 7), (rows,))
    assert torch.autograd.gradcheck(lambda x, t: smk.mask_patches(x, mask, t), (x, token))


def test_masked_patches_may_be_nan():
    x = torch.tensor([[[NAN], [2.0]]], requires_grad=True)
    token = torch.tensor([5.0], requires_grad=True)
    out = smk.mask_patches(x, torch.tensor([[True, False]]), token)
    assert out.tolist() == [[[5.0], [2.0]]]
    out.sum().backward()
    assert x.grad.tolist() == [[[0.0], [1.0]]]
    assert token.grad.tolist() == [1.0]


def test_mask_token_of_another_type():
    x = torch.randn(2, 3, 4, dtype=torch.bfloat16)
    token = torch.randn(4, requires_grad=True)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    smk.mask_patches(x, mask, token).sum().backward()
    assert token.grad.dtype == torch.float32
    assert token.grad.tolist() == [3.0] * 4


def test_padding_reads_nothing():
    """Where the id is -1 neither the value nor the gradient of position 0 shows."""
    x = torch.tensor([[[NAN], [2.0]]], requires_grad=True)
    rows = smk.gather_masked(x, torch.tensor([[1, -1]]))
    assert rows.tolist() == [[[2.0], [0.0]]]
    rows.square().sum().backward()
    assert x.grad.tolist() == [[[0.0], [4.0]]]
    y = torch.tensor([[[3.0], [NAN]]], requires_grad=True)
    out = smk.scatter_masked(y, torch.tensor([[1, -1]]), 2)
    assert out.tolist() == [[[0.0], [3.0]]]
    out.square().sum().backward()
    assert y.grad.tolist() == [[[6.0], [0.0]]]


def test_rows_under_autocast():
    x, ids = case(dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rows = smk.gather_masked(x, ids)
        assert rows.dtype == torch.bfloat16
        assert smk.scatter_masked(rows, ids, 7).dtype == torch.bfloat16
        mask = torch.ones(3, 7, dtype=torch.bool)
        assert smk.mask_patches(x, mask, torch.ones(5)).dtype == torch.bfloat16


def test_rows_compile():
    def together(x, ids, token):
        mask = torch.zeros(x.shape[:2], dtype=torch.bool)
        rows = smk.gather_masked(smk.mask_patches(x, mask, token), ids)
        return rows, smk.scatter_masked(rows, ids, x.shape[1])

    token = torch.ones(5)
    assert_compiles_once(together, [(*case(3, 7, 4), token), (*case(4, 9, 6), token)])


def test_rows_never_ask_the_host():
    x = torch.zeros(3, 7, 5, device="meta")
    ids = torch.zeros(3, 4, dtype=torch.int64, device="meta")
    assert smk.scatter_masked(smk.gather_masked(x, ids), ids, 7).shape == x.shape
    assert smk.mask_patches(x, x[..., 0] > 0, x[0, 0]).shape == x.shape


X, CHOSEN = case()
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
def test_rows_bad_input(call, error, text):
    with pytest.raises(error, match=text):
        call()
