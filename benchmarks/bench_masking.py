"""mask_patches, gather_masked and scatter_masked, forward and backward, against plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import syncmask_kernels as smk
from benchmarks.checks import as_accurate
from benchmarks.inputs import DTYPES, dtype_name
from benchmarks.measure import Function, rotation
from benchmarks.report import Case

# Batch, patches, width and patches to mask or to gather: a quarter, and of odd sizes.
SHAPES = [(64, 256, 768, 64), (37, 197, 770, 50)]

Inputs = tuple[Tensor, ...]
BOTH = pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
TYPES = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
SIZES = pytest.mark.parametrize("shape", SHAPES, ids=str)


def chosen(generator: torch.Generator, shape: tuple[int, ...]) -> Tensor:
    """[B, K] different patches, ascending."""
    batch, patches, _, count = shape
    order = torch.rand(batch, patches, generator=generator).argsort(dim=1)
    return order[:, :count].sort(dim=1).values


def drawn(generator: torch.Generator, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator).to(dtype)


def trained(function: Callable[..., Tensor], leaves: int) -> Function:
    """Forward, and the gradients of the first inputs for a gradient that is the last one."""

    def call(inputs: Inputs) -> Inputs:
        with torch.enable_grad():
            given = [x.detach() for x in inputs[:-1]]
            wanted = [x.requires_grad_() for x in given[:leaves]]
            out = function(*given)
            return out.detach(), *torch.autograd.grad(out, wanted, inputs[-1])

    return call


def forward(function: Callable[..., Tensor]) -> Function:
    return lambda inputs: function(*inputs[:-1])


def copy_result(inputs: Inputs) -> Tensor:
    """As many numbers as the result has: those of its gradient."""
    return inputs[-1].clone()


def copy_result_and_input(inputs: Inputs) -> Inputs:
    return inputs[-1].clone(), inputs[0].clone()


def where(patches: Tensor, token: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask.unsqueeze(-1), token.to(patches.dtype), patches)


def expanded_gather(x: Tensor, ids: Tensor) -> Tensor:
    """As MAE does."""
    return torch.gather(x, 1, ids.unsqueeze(-1).expand(-1, -1, x.shape[2]))


def index_select(x: Tensor, ids: Tensor) -> Tensor:
    starts = torch.arange(0, x.shape[0] * x.shape[1], x.shape[1], device=x.device)
    return x.flatten(0, 1).index_select(0, (starts[:, None] + ids).flatten()).view(*ids.shape, -1)


def expanded_scatter(x: Tensor, ids: Tensor, positions: int) -> Tensor:
    out = x.new_zeros(x.shape[0], positions, x.shape[2])
    return out.scatter_add(1, ids.unsqueeze(-1).expand_as(x), x)


def index_add(x: Tensor, ids: Tensor, positions: int) -> Tensor:
    starts = torch.arange(0, x.shape[0] * positions, positions, device=x.device)
    out = x.new_zeros(x.shape[0] * positions, x.shape[2])
    rows = (starts[:, None] + ids).flatten()
    return out.index_add(0, rows, x.flatten(0, 1)).view(x.shape[0], positions, -1)


def contest(
    compare: Callable[..., None],
    compiled: Callable[..., Any],
    case: Case,
    inputs: list[Inputs],
    peers: dict[str, Callable[..., Tensor]],
    ours: Callable[..., Tensor],
    leaves: int,
    backward: bool,
    peers_factor: float = 4.0,
) -> None:
    """`peers` and our operator, with gradients of the first `leaves` inputs or without.

    Peers may be `peers_factor` times as wrong as the first of them.
    """

    def kind(function: Callable[..., Tensor]) -> Function:
        return trained(function, leaves) if backward else forward(function)

    plain = kind(next(iter(peers.values())))
    wide = [x.double() if x.is_floating_point() else x for x in inputs[0]]
    own, truth = (
        [made] if isinstance(made, Tensor) else made for made in (plain(inputs[0]), plain(wide))
    )
    contenders = {
        "copy": copy_result_and_input if backward else copy_result,
        **{name: kind(peer) for name, peer in peers.items()},
        **{name: kind(f) for name, f in compiled(next(iter(peers.values()))).items()},
        "this library": kind(ours),
    }
    as_accurate(own, truth)(contenders["this library"](inputs[0]))
    compare(case, contenders, inputs, as_accurate(own, truth, peers_factor))


def noted(op: str, shape: tuple[int, ...], dtype: torch.dtype, backward: bool) -> Case:
    return Case(op, shape, dtype, "forward and backward" if backward else "forward")


@BOTH
@TYPES
@SIZES
def bench_mask_patches(
    compare: Callable[..., None],
    compiled: Callable[..., Any],
    shape: tuple[int, ...],
    dtype: torch.dtype,
    backward: bool,
) -> None:
    batch, patches, width, _ = shape

    def make(generator: torch.Generator) -> Inputs:
        mask = torch.zeros(batch, patches, dtype=torch.bool)
        mask.scatter_(1, chosen(generator, shape), True)
        x, grad = (drawn(generator, dtype, batch, patches, width) for _ in range(2))
        return x, drawn(generator, dtype, width), mask, grad

    contest(
        compare,
        compiled,
        noted("mask_patches", shape, dtype, backward),
        rotation(make),
        {"torch.where": where},
        lambda x, token, mask: smk.mask_patches(x, mask, token),
        2,
        backward,
        # Inductor sums up the gradient of the token row by row: 12 times the error of PyTorch.
        16.0 if backward and dtype == torch.float32 else 4.0,
    )


@BOTH
@TYPES
@SIZES
def bench_gather_masked(
    compare: Callable[..., None],
    compiled: Callable[..., Any],
    shape: tuple[int, ...],
    dtype: torch.dtype,
    backward: bool,
) -> None:
    batch, patches, width, count = shape

    def make(generator: torch.Generator) -> Inputs:
        x, grad = (drawn(generator, dtype, batch, n, width) for n in (patches, count))
        return x, chosen(generator, shape), grad

    contest(
        compare,
        compiled,
        noted("gather_masked", shape, dtype, backward),
        rotation(make),
        {"index_select": index_select, "gather, as MAE": expanded_gather},
        smk.gather_masked,
        1,
        backward,
    )


@BOTH
@TYPES
@SIZES
def bench_scatter_masked(
    compare: Callable[..., None],
    compiled: Callable[..., Any],
    shape: tuple[int, ...],
    dtype: torch.dtype,
    backward: bool,
) -> None:
    batch, patches, width, count = shape

    def make(generator: torch.Generator) -> Inputs:
        x, grad = (drawn(generator, dtype, batch, n, width) for n in (count, patches))
        return x, chosen(generator, shape), grad

    contest(
        compare,
        compiled,
        noted("scatter_masked", shape, dtype, backward),
        rotation(make),
        {
            "index_add": lambda x, ids: index_add(x, ids, patches),
            "scatter_add": lambda x, ids: expanded_scatter(x, ids, patches),
        },
        lambda x, ids: smk.scatter_masked(x, ids, patches),
        1,
        backward,
    )
