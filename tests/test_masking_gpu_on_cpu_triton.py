"""The PTX of the kernels that move rows, run on the CPU: what they compute, and what they move."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import syncmask_kernels as smk
from syncmask_kernels import backends
from syncmask_kernels.backends import triton as backend
from tests.accuracy import assert_as_accurate
from tests.gpu_on_cpu import build
from tests.masking_cases import EMPTY, LAYOUTS, mask, repeated_ids, rows, unique_ids

pytest.importorskip("triton")
if backend.INTERPRETED:
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)
if missing := build.missing():
    pytest.skip(missing, allow_module_level=True)

from tests.gpu_on_cpu.triton_launch import triton_on_cpu

Inputs = dict[str, Any]
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


def inputs(
    size: tuple[int, ...], dtype: torch.dtype = FP32, ids: Callable[..., Tensor] = unique_ids
) -> Inputs:
    batch, positions, width, columns = size
    return {
        "x": rows(batch, positions, columns, dtype),
        "moved": rows(batch, width, columns, dtype, seed=7),
        "token": rows(1, 1, columns)[0, 0],
        "mask": mask(batch, positions),
        "ids": ids(batch, positions, width),
    }


def laid_out(made: Inputs, layout: Callable[[Tensor], Tensor]) -> Inputs:
    return {n: layout(x) if x.dim() == 3 else x for n, x in made.items()}


# One row a set of inputs; all operators and their gradients run with each.
CASES: dict[str, Callable[[], Inputs]] = {
    "aligned": lambda: inputs((2, 37, 20, 256)),
    "odd": lambda: inputs((2, 70, 40, 77), ids=repeated_ids),
    "bfloat16": lambda: inputs((3, 130, 66, 32), BF16, ids=repeated_ids),
    "float16": lambda: inputs((1, 9, 5, 770), FP16),
    "labels": lambda: inputs((3, 40, 9, 1)),
    "out of range": lambda: inputs((2, 7, 30, 5), ids=lambda *size: repeated_ids(*size, beyond=9)),
    "views": lambda: laid_out(inputs((2, 20, 9, 24)), LAYOUTS["columns first"]),
    "expanded": lambda: laid_out(inputs((2, 20, 9, 24)), LAYOUTS["one value"]),
} | {f"empty {size}": lambda size=size: inputs(size) for size in EMPTY}


def answers(given: Inputs) -> tuple[Tensor, ...]:
    """Of kernels by themselves, so that ids are not looked at; those that only move come first."""
    x, moved, ids = given["x"], given["moved"], given["ids"]
    run = {
        op: backends.choose(op, x, x)
        for op in ("mask_patches", "masked_sum", "gather_masked", "scatter_masked")
    }
    return (
        run["mask_patches"](x, given["mask"], given["token"]),
        run["mask_patches"](x, given["mask"], None),
        run["gather_masked"](x, ids, -2.5),
        run["scatter_masked"](moved, ids, x.shape[1]),
        run["masked_sum"](x, given["mask"]),
    )


@pytest.mark.parametrize("arch", [80, 90], ids="sm_{}".format)
@pytest.mark.parametrize("name", CASES)
def test_ptx_computes_what_eager_does(name: str, arch: int) -> None:
    given = CASES[name]()
    with triton_on_cpu(arch, seed=arch), smk.use_backend("triton"):
        *moved, summed = answers(given)
    with smk.use_backend("eager"):
        *wanted, plain = answers(given)
    for got, want in zip(moved, wanted, strict=True):
        assert got.dtype == want.dtype
        assert torch.equal(got, want)
    truth = (given["x"].double() * given["mask"][..., None]).sum(dim=(0, 1))
    assert_as_accurate(summed, plain, truth, factor=2)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.uint8, torch.bool])
def test_labels(dtype: torch.dtype) -> None:
    labels, ids = torch.randint(0, 99, (3, 70)).to(dtype), unique_ids(3, 70, 33)
    fill = -100 if dtype.is_signed else 1
    with triton_on_cpu(), smk.use_backend("triton"):
        got = smk.gather_masked(labels, ids, fill=fill)
    assert torch.equal(got, smk.gather_masked(labels, ids, fill=fill))


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_each_number_is_moved_once(dtype: torch.dtype) -> None:
    """Only rows that are asked for are read, and the ids and masks beside them are little."""
    batch, positions, width, columns = 2, 64, 20, 768
    x, moved = rows(batch, positions, columns, dtype), rows(batch, width, columns, dtype)
    masked, ids = mask(batch, positions), unique_ids(batch, positions, width)
    row, kept, picked = columns * x.element_size(), int((~masked).sum()), int((ids >= 0).sum())
    total = batch * positions
    calls: dict[str, tuple[Callable[[], Any], int]] = {
        "mask_patches": (lambda: smk.mask_patches(x, masked, x[0, 0]), kept + total),
        "gather_masked": (lambda: smk.gather_masked(x, ids), picked + batch * width),
        "scatter_masked": (lambda: smk.scatter_masked(moved, ids, positions), picked + total),
        "masked_sum": (
            lambda: backends.choose("masked_sum", x, x)(x, masked),
            total - kept + 4 // x.element_size(),
        ),
    }
    for name, (call, moved_rows) in calls.items():
        with triton_on_cpu() as traffic, smk.use_backend("triton"):
            call()
        assert len(traffic) == 1, name
        size = 32 * (traffic[0].sectors_read + traffic[0].sectors_written)
        assert moved_rows * row <= size <= 1.05 * moved_rows * row, name
