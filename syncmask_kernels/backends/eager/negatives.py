"""Choosing a negative for each row of a similarity matrix, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from syncmask_kernels.backends.eager.philox import gumbel, philox_cells
from syncmask_kernels.backends.eager.selection import order_keys
from syncmask_kernels.backends.overloads.negatives import MODES


def _candidates(
    sim: Tensor,
    positive: Tensor | None,
    exclude: Tensor | None,
    row_ids: Tensor | None,
    col_ids: Tensor | None,
) -> Tensor:
    candidate = sim > float("-inf")  # False for NaN
    if positive is not None:
        columns = torch.arange(sim.shape[1], device=sim.device)
        candidate = candidate & (columns != positive.unsqueeze(1))
    if exclude is not None:
        candidate = candidate & ~exclude
    if row_ids is not None and col_ids is not None:
        candidate = candidate & (row_ids.unsqueeze(1) != col_ids)
    return candidate


def _first(scores: Tensor, candidate: Tensor) -> Tensor:
    """The candidate with the largest score, the lowest index of equals."""
    return order_keys(scores, candidate, largest=True).argmax(dim=1)


def _semi_hard(
    sim: Tensor,
    candidate: Tensor,
    positive: Tensor,
    margin: float,
    num: int,
    den: int,
) -> Tensor:
    """The candidate at the ascending rank ceil(count * num / den) of those below the ceiling.

    They rank before all others, so that it is a rank among all candidates; it is the first where
    nothing is below.
    """
    ceiling = sim.gather(1, positive.unsqueeze(1)) - margin
    count = (candidate & (sim < ceiling)).sum(dim=1, keepdim=True)
    rank = ((count * num + (den - 1)) // den - 1).clamp(min=0)
    ascending = sim.masked_fill(~candidate, float("inf")).sort(dim=1).values
    return _first(sim, candidate & (sim == ascending.gather(1, rank)))


def sample_negatives(
    sim: Tensor,
    positive: Tensor | None,
    exclude: Tensor | None,
    row_ids: Tensor | None,
    col_ids: Tensor | None,
    mode: int,
    margin: float,
    num: int,
    den: int,
    seed: Tensor | None,
    noise: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """sim [B, N] -> ids [B] int64, found [B] bool."""
    batch, columns = sim.shape
    if columns == 0:
        ids = torch.zeros(batch, dtype=torch.int64, device=sim.device)
        return ids, torch.zeros_like(ids, dtype=torch.bool)
    sim = sim.to(torch.promote_types(sim.dtype, torch.float32))
    if positive is None and batch == columns:
        positive = torch.arange(batch, device=sim.device)
    candidate = _candidates(sim, positive, exclude, row_ids, col_ids)
    found = candidate.any(dim=1)
    if MODES[mode] == "semi_hard":
        assert positive is not None
        ids = _semi_hard(sim, candidate, positive, margin, num, den)
    elif MODES[mode] == "hardest":
        ids = _first(sim, candidate)
    else:
        if noise is None:
            assert seed is not None
            noise = gumbel(philox_cells(seed, batch, columns))
        ids = _first(sim + noise.to(sim.dtype), candidate)
    return ids.masked_fill(~found, 0), found
