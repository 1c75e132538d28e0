"""Recall of rankings, and what a random ranking would reach."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def recalls(hits: Tensor, ks: Sequence[int]) -> dict[str, float]:
    """Share of queries with a hit among the first k.

    Args:
        hits: bool ``[Q, K]``: whether the answer at each rank, best first, is right.
        ks: the ks.

    >>> recalls(torch.tensor([[False, True, False], [False, False, False]]), ks=(1, 2))
    {'r1': 0.0, 'r2': 0.5}
    """
    return {f"r{k}": hits[:, :k].any(dim=1).double().mean().item() for k in ks}


def chance(positives: Tensor, candidates: int, ks: Sequence[int]) -> dict[str, float]:
    """Expected recall of a random ranking: one minus the chance that k draws miss all positives.

    Args:
        positives: ``[Q]``: how many candidates are right for each query.
        candidates: how many there are.
        ks: the ks.

    >>> chance(torch.tensor([1, 2]), candidates=4, ks=(1, 3))
    {'r1': 0.375, 'r3': 0.875}
    """
    found = {}
    for k in ks:
        drawn = torch.arange(min(k, candidates))
        wrong = candidates - positives[:, None] - drawn
        missed = (wrong.clamp(min=0) / (candidates - drawn).double()).prod(dim=1)
        found[f"r{k}"] = (1 - missed).mean().item()
    return found


def nearest(queries: Tensor, candidates: Tensor, k: int) -> Tensor:
    """Ids ``[Q, k]`` of the most similar candidates, best first."""
    k = min(k, len(candidates))
    parts = queries.split(1024)
    return torch.cat([(part @ candidates.T).topk(k, dim=1).indices for part in parts])
