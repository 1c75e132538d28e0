"""What mask_patches, gather_masked and scatter_masked keep under every backend.

- one full graph for all sizes under torch.compile, forward and backward;
- first and second gradients that are those of finite differences in float64, whether autograd
  records the operator or the library has its own backward;
- overloads that torch.library.opcheck finds nothing to say against.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import syncmask_kernels as smk
from syncmask_kernels import backends
from syncmask_kernels.backends import cpu, overloads
from tests.compiling import assert_compiles_once
from tests.masking_cases import mask, repeated_ids, rows
from tests.serving import backend_without_autograd

Inputs = tuple[Tensor, ...]  # patches, token, moved rows, mask, ids


def inputs(batch: int, positions: int, width: int, dtype: torch.dtype = torch.float32) -> Inputs:
    leaves = (
        rows(batch, positions, 5, dtype),
        rows(1, 1, 5, dtype)[0, 0],
        rows(batch, width, 5, dtype),
    )
    for leaf in leaves:
        leaf.requires_grad_()
    return *leaves, mask(batch, positions), repeated_ids(batch, positions, width)


def mask_patches(x: Tensor, token: Tensor, moved: Tensor, masked: Tensor, ids: Tensor) -> Tensor:
    return smk.mask_patches(x, masked, token) + moved.sum()


def gather_masked(x: Tensor, token: Tensor, moved: Tensor, masked: Tensor, ids: Tensor) -> Tensor:
    return smk.gather_masked(x, ids, fill=3.0) * moved + token


def scatter_masked(x: Tensor, token: Tensor, moved: Tensor, masked: Tensor, ids: Tensor) -> Tensor:
    return smk.scatter_masked(moved, ids, x.shape[1]) * x + token


OPERATORS: dict[str, Callable[..., Tensor]] = {
    "mask_patches": mask_patches,
    "gather_masked": gather_masked,
    "scatter_masked": scatter_masked,
}


@pytest.mark.parametrize("name", OPERATORS)
def test_compiles(backend: str, name: str) -> None:
    sizes = [(2, 7, 3), (3, 9, 4), (4, 12, 8)]  # no special cases among them
    calls = [inputs(*size) for size in sizes]
    through = "eager" if backend == "eager" else "aot_eager"
    assert_compiles_once(OPERATORS[name], calls, through, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("recorded", [True, False], ids=["autograd", "own backward"])
@pytest.mark.parametrize("name", OPERATORS)
def test_gradients(name: str, recorded: bool) -> None:
    *leaves, masked, ids = inputs(2, 3, 4, torch.float64)

    def call(*leaves: Tensor) -> Tensor:
        return OPERATORS[name](*leaves, masked, ids).sin()

    with smk.use_backend("eager") if recorded else backend_without_autograd():
        assert torch.autograd.gradcheck(call, leaves)
        assert torch.autograd.gradgradcheck(call, leaves)


@pytest.mark.parametrize("name", OPERATORS)
def test_second_gradients(backend: str, name: str) -> None:
    """Of the backend's own kernels, which know no float64."""
    found = []
    for serves in (backend, "eager"):
        with smk.use_backend(serves):
            *leaves, masked, ids = inputs(3, 7, 6)
            out = OPERATORS[name](*leaves, masked, ids).sin().sum()
            first = torch.autograd.grad(out, leaves, create_graph=True, materialize_grads=True)
            slope = sum(grad.square().sum() for grad in first)
            found.append(torch.autograd.grad(slope, leaves, materialize_grads=True))
    torch.testing.assert_close(*found)


X, MASK, IDS = rows(3, 7, 5), mask(3, 7), repeated_ids(3, 7, 4, beyond=2)
OVERLOADS: dict[str, list[tuple[Any, ...]]] = {
    "mask_patches": [(X, MASK, X[0, 0]), (X.mT.half().contiguous().mT, MASK.clone(), None)],
    "masked_sum": [(X, MASK), (X.bfloat16()[:, :0], MASK[:, :0])],
    "gather_masked": [(X.bfloat16(), IDS, 2.0), (X.mT.long().contiguous().mT, IDS, -100.0)],
    "scatter_masked": [(X[:, :4], IDS, 7), (X[:, :0].half(), IDS[:, :0], 2)],
}


def test_the_table_names_every_overload() -> None:
    assert set(OVERLOADS) == set(overloads.masking.SCHEMAS)


@pytest.mark.parametrize("name", OVERLOADS)
def test_opcheck(name: str) -> None:
    if name not in cpu.KERNELS:
        pytest.skip("the CPU library is not built")
    for arguments in OVERLOADS[name]:
        torch.library.opcheck(getattr(torch.ops.syncmask, name).cpu, arguments)


@pytest.mark.parametrize("op", overloads.masking.SCHEMAS)
def test_types_that_only_eager_serves(op: str) -> None:
    wide = rows(1, 1, 1, torch.float64)
    for name in ("cpu", "triton"):
        refuses = backends.BACKENDS[name].KERNELS.get(op)
        if refuses is not None:
            assert "float64" in refuses.refuses(wide)
