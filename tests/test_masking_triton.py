"""The Triton kernels that move rows, on a GPU or in Triton's interpreter.

As for tests/test_selection_triton.py: ``TRITON_INTERPRET=1 pytest <this file>``. The interpreter
rounds to bfloat16 in a way of its own; what the PTX makes of it is in the tests that run that.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import syncmask_kernels as smk
from reference.ops import masking as oracle
from syncmask_kernels import backends
from syncmask_kernels.backends import BackendError
from tests.accuracy import assert_as_accurate
from tests.compiling import assert_compiles_once
from tests.masking_cases import EMPTY, LAYOUTS, mask, repeated_ids, rows, unique_ids
from tests.on_triton import DEVICE, guarded_outputs, serve

TYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
# Around the tiles: one row, several blocks of rows, of columns and of ids.
SIZES = pytest.mark.parametrize(
    "size", [(3, 7, 4, 5), (1, 70, 66, 40), (1, 9, 5, 300), (2, 5, 4, 1), *EMPTY], ids=str
)


def run(op: str, *call: Any) -> Tensor:
    """A kernel by itself, on the device, with an output that is guarded."""
    moved = [x.to(DEVICE) if isinstance(x, Tensor) else x for x in call]
    with smk.use_backend("triton"), guarded_outputs():
        answer: Tensor = backends.choose(op, moved[0], moved[0])(*moved)
    return answer.cpu()


@TYPES
@SIZES
def test_mask_patches(size: tuple[int, ...], dtype: torch.dtype) -> None:
    batch, positions, _, columns = size
    x, masked = rows(batch, positions, columns, dtype), mask(batch, positions)
    token = rows(1, 2, columns)[0, ::2][0]
    got = serve(
        smk.mask_patches, "triton", {"patches": x, "patch_mask": masked, "mask_token": token}
    )
    assert torch.equal(got, oracle.mask_patches(x, masked, token.to(dtype)))
    assert torch.equal(run("mask_patches", x, masked, None), x.masked_fill(masked[..., None], 0))


@TYPES
@SIZES
def test_masked_sum(size: tuple[int, ...], dtype: torch.dtype) -> None:
    batch, positions, _, columns = size
    x, masked = rows(batch, positions, columns, dtype), mask(batch, positions)
    kept = x.masked_fill(~masked[..., None], 0)
    got = run("masked_sum", x.masked_fill(~masked[..., None], float("nan")), masked)
    assert got.dtype == torch.float32
    assert_as_accurate(got, kept.sum(dim=(0, 1)).float(), kept.double().sum(dim=(0, 1)), factor=2)


def test_masked_sum_of_many_rows() -> None:
    """More than one program sums, and another one what they found."""
    x, masked = rows(3, 100, 3), mask(3, 100)
    kept = x.masked_fill(~masked[..., None], 0)
    got = run("masked_sum", x, masked)
    assert_as_accurate(got, kept.sum(dim=(0, 1)), kept.double().sum(dim=(0, 1)), factor=2)


@TYPES
@SIZES
def test_gather_and_scatter(size: tuple[int, ...], dtype: torch.dtype) -> None:
    batch, positions, width, columns = size
    ids = unique_ids(batch, positions, width)
    x = rows(batch, positions, columns, dtype)
    picked = serve(smk.gather_masked, "triton", {"x": x, "ids": ids, "fill": 2.5})
    assert torch.equal(picked, oracle.gather_masked(x, ids, fill=2.5))
    back = serve(smk.scatter_masked, "triton", {"x": picked, "ids": ids, "N": positions})
    assert torch.equal(back, oracle.scatter_masked(picked, ids, positions))


@TYPES
def test_rows_of_equal_id_are_summed(dtype: torch.dtype) -> None:
    """In ascending order, in float32, to the bit."""
    x, ids = rows(2, 70, 3, dtype), repeated_ids(2, 40, 70)
    got = serve(smk.scatter_masked, "triton", {"x": x, "ids": ids, "N": 40})
    assert torch.equal(got, oracle.scatter_masked(x.float(), ids, 40).to(dtype))


@pytest.mark.parametrize(
    "dtype", [torch.int64, torch.int32, torch.int16, torch.uint8, torch.bool, torch.bfloat16]
)
def test_labels(dtype: torch.dtype) -> None:
    labels = torch.randint(0, 99, (3, 7)).to(dtype)
    ids, fill = unique_ids(3, 7, 4), -100 if dtype.is_signed else 1
    got = serve(smk.gather_masked, "triton", {"x": labels, "ids": ids, "fill": fill})
    assert got.dtype == dtype
    assert torch.equal(got, oracle.gather_masked(labels, ids, fill=fill))


def test_ids_that_nobody_looked_at() -> None:
    """What is no position counts as -1."""
    x, ids = rows(3, 7, 5), repeated_ids(3, 7, 12, beyond=4)
    padded = ids.masked_fill((ids < 0) | (ids >= 7), -1)
    assert torch.equal(run("gather_masked", x, ids, 2.5), oracle.gather_masked(x, padded, fill=2.5))
    moved = rows(3, 12, 5)
    assert torch.equal(
        run("scatter_masked", moved, ids, 7), oracle.scatter_masked(moved, padded, 7)
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout(layout: str) -> None:
    view = LAYOUTS[layout](rows(3, 7, 6))
    ids, masked, token = unique_ids(3, 7, 7), mask(7, 3).t(), torch.arange(12.0)[::2]
    assert torch.equal(run("gather_masked", view, ids, 0.0), oracle.gather_masked(view, ids))
    assert torch.equal(run("scatter_masked", view, ids, 9), oracle.scatter_masked(view, ids, 9))
    wanted = oracle.mask_patches(view, masked, token)
    assert torch.equal(run("mask_patches", view, masked, token), wanted)
    assert torch.equal(
        run("masked_sum", view, masked), run("masked_sum", view.contiguous(), masked.contiguous())
    )


def test_gradients_are_those_of_eager() -> None:
    found = []
    for backend in ("eager", "triton"):
        x, token = rows(2, 6, 5).requires_grad_(), rows(1, 1, 5)[0, 0].requires_grad_()
        arguments = {"patches": x, "patch_mask": mask(2, 6), "mask_token": token}
        ids = repeated_ids(2, 6, 9)
        out = serve(smk.mask_patches, backend, arguments)
        picked = serve(smk.gather_masked, backend, {"x": out, "ids": ids})
        back = serve(smk.scatter_masked, backend, {"x": picked, "ids": ids, "N": 6})
        found.append(torch.autograd.grad(back.square().sum(), (x, token)))
    torch.testing.assert_close(*found)


def test_opcheck() -> None:
    from syncmask_kernels.backends.triton import masking

    x, masked = rows(2, 5, 3).to(DEVICE), mask(2, 5).to(DEVICE)
    ids = repeated_ids(2, 5, 4).to(DEVICE)
    torch.library.opcheck(masking.mask_patches, (x.half(), masked, x[0, 0]))
    torch.library.opcheck(masking.masked_sum, (x.mT.contiguous().mT, masked))
    torch.library.opcheck(masking.gather_masked, (x.long(), ids, -1.0))
    torch.library.opcheck(masking.scatter_masked, (x[:, :4], ids, 7))


def test_compiles() -> None:
    def together(x: Tensor, token: Tensor, masked: Tensor, ids: Tensor) -> tuple[Tensor, ...]:
        picked = smk.gather_masked(smk.mask_patches(x, masked, token), ids)
        return picked, smk.scatter_masked(picked, ids, x.shape[1])

    calls = []
    for batch, positions, width in [(2, 7, 4), (3, 9, 5)]:
        leaves = [rows(batch, positions, 5).to(DEVICE), rows(1, 1, 5)[0, 0].to(DEVICE)]
        others = mask(batch, positions), unique_ids(batch, positions, width)
        calls.append(
            (*(x.requires_grad_() for x in leaves), *(other.to(DEVICE) for other in others))
        )
    with smk.use_backend("triton"):
        assert_compiles_once(together, calls)


def test_refusals() -> None:
    x, ids = rows(1, 2, 3, torch.float64).to(DEVICE), torch.zeros(1, 1).long().to(DEVICE)
    calls = [
        lambda: smk.mask_patches(x, x[..., 0] > 0, x[0, 0]),
        lambda: smk.gather_masked(x, ids),
        lambda: smk.scatter_masked(x[:, :1], ids, 4),
        lambda: smk.scatter_masked(ids[..., None], ids, 4),
    ]
    for call, reason in zip(calls, ["float64"] * 3 + ["int64"], strict=True):
        with smk.use_backend("triton"), pytest.raises(BackendError, match=reason):
            call()
