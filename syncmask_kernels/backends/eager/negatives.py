"""Choosing a negative for each row of a similarity matrix, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from syncmask_kernels.backends.eager.philox import gumbel, philox_cells
from syncmask_kernels.backends.eager.selection import order_keys


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


def _first(scores: Tensor, candidate: Tensor, largest: bool = True) -> Tensor:
    """The candidate with the largest (smallest) score, the lowest index of equals."""
    return order_keys(scores, candidate, largest).argmax(dim=1)


def _semi_hard(
    sim: Tensor,
    candidate: Tensor,
    positive: Tensor,
    margin: float,
    quantile: tuple[int, int],
) -> Tensor:
    ceiling = sim.gather(1, positive.unsqueeze(1)) - margin
    easier = candidate & (sim < ceiling)
    # The ascending rank ceil(quantile * count) of what is easier; position 0 where nothing is.
    num, den = quantile
    count = easier.sum(dim=1, keepdim=True)
    rank = ((count * num + (den - 1)) // den - 1).clamp(min=0)
    ascending = sim.masked_fill(~easier, float("inf")).sort(dim=1).values
    level = ascending.gather(1, rank)
    chosen = _first(sim, easier & (sim == level))
    easiest = _first(sim, candidate, largest=False)
    return torch.where(easier.any(dim=1), chosen, easiest)


def sample_negatives(
    sim: Tensor,
    positive: Tensor | None,
    exclude: Tensor | None,
    row_ids: Tensor | None,
    col_ids: Tensor | None,
    mode: str,
    margin: float,
    quantile: tuple[int, int],
    seed: Tensor | None,
    noise: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """sim [B, N] -> ids [B] int64, found [B] bool."""
    batch, columns = sim.shape
    if columns == 0:
        ids = torch.zeros(batch, dtype=torch.int64, device=sim.device)
        return ids, torch.zeros_like(ids, dtype=torch.bool)
    sim = sim.to(torch.promote_types(sim.dtype, torch.float32))
    candidate = _candidates(sim, positive, exclude, row_ids, col_ids)
    found = candidate.any(dim=1)
    if mode == "semi_hard":
        assert positive is not None
        ids = _semi_hard(sim, candidate, positive, margin, quantile)
    elif mode == "hardest":
        ids = _first(sim, candidate)
    else:
        if noise is None:
            assert seed is not None
            noise = gumbel(philox_cells(seed, batch, columns))
        ids = _first(sim + noise.to(sim.dtype), candidate)
    return ids.masked_fill(~found, 0), found
