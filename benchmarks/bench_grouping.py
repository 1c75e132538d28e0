"""grouped_order against GRIT-VLP's grouping and its matrix product."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import syncmask_kernels as smk
from benchmarks.measure import Check, Function, rotation
from benchmarks.report import Case

DIM, TEMPERATURE = 256, 0.07
ROUNDING = 1e-6  # of similarities of unit features in float32

Inputs = tuple[Tensor, Tensor]


def features(size: int, generator: torch.Generator) -> Inputs:
    image, text = F.normalize(torch.randn(2, size, DIM, generator=generator), dim=2)
    return image, text


def similarities(inputs: Inputs) -> Tensor:
    return inputs[0] @ inputs[1].T


def grit(inputs: Inputs) -> Tensor:
    """Two softmaxed matrices, in which rows and columns of used examples become zero."""
    image, text = inputs
    size = len(image)
    i2t = (image @ text.T / TEMPERATURE).softmax(dim=1)
    t2i = (text @ image.T / TEMPERATURE).softmax(dim=1)
    i2t.fill_diagonal_(0)
    t2i.fill_diagonal_(0)
    order = [0]
    for matrix in [i2t, t2i] * (size // 2):
        if len(order) == size:
            break
        following = int(matrix[order[-1]].topk(1).indices.cpu())
        for other in (i2t, t2i):
            other[order[-1]] = 0
            other[:, order[-1]] = 0
        order.append(following)
    return torch.tensor(order)


def by_matrix(inputs: Inputs) -> Tensor:
    """The plainest form: one matrix, and an argmax of what is unused at each step."""
    sim = similarities(inputs)
    size = len(sim)
    used = sim.new_zeros(size)
    order = torch.zeros(size, dtype=torch.int64)
    used[0] = -torch.inf
    for step in range(1, size):
        last = order[step - 1]
        row = sim[last] if step % 2 == 1 else sim[:, last]
        order[step] = (row + used).argmax()
        used[order[step]] = -torch.inf
    return order


def best(left: Tensor, ceiling: Tensor | float) -> float:
    """What semi-hard takes of the similarities that are left; hardest has no ceiling."""
    easier = left[left < ceiling]
    return float(easier.max() if len(easier) else left.min())


def chained(inputs: Inputs, mode: str) -> Check:
    """Every example once, and each the best that was left, up to rounding."""
    image, text = inputs
    sim = (image.double() @ text.double().T).cpu()

    def check(order: Tensor) -> None:
        order = order.cpu()
        assert torch.equal(order.sort().values, torch.arange(len(sim)))
        for step in range(1, len(sim)):
            last = order[step - 1]
            row = sim[last] if step % 2 == 1 else sim[:, last]
            left = row[order[step:]]
            ceiling = row[last] if mode == "semi_hard" else torch.inf
            bounds = sorted(best(left, ceiling + slack) for slack in (-ROUNDING, ROUNDING))
            assert bounds[0] - ROUNDING <= left[0] <= bounds[1] + ROUNDING

    return check


def ours(inputs: Inputs, mode: str) -> Tensor:
    return smk.grouped_order(*inputs, mode=mode)


def eager(inputs: Inputs, mode: str) -> Tensor:
    with smk.use_backend("eager"):
        return ours(inputs, mode)


@pytest.mark.parametrize(
    ("size", "mode"), [(1920, "hardest"), (1920, "semi_hard"), (7680, "hardest")]
)
def bench_grouped_order(compare: Callable[..., None], size: int, mode: str) -> None:
    inputs = rotation(partial(features, size))
    peers: dict[str, Function] = {"eager": partial(eager, mode=mode)}
    if mode == "hardest":
        peers = {"argmax of the matrix": by_matrix}
    if mode == "hardest" and size < 4096:
        peers["GRIT-VLP"] = grit
    compare(
        Case("grouped_order", (size, DIM), torch.float32, mode),
        {
            "the matrix of similarities": similarities,
            **peers,
            "this library": partial(ours, mode=mode),
        },
        inputs,
        chained(inputs[0], mode),
    )
