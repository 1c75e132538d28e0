"""Choosing a negative for each row of a similarity matrix, one row after the other."""

from __future__ import annotations

import math
from fractions import Fraction

import torch
from torch import Tensor

from reference.ops.philox import gumbel, philox, seed_key


def candidates(
    sim: Tensor,
    positive: Tensor | None = None,
    exclude: Tensor | None = None,
    row_ids: Tensor | None = None,
    col_ids: Tensor | None = None,
) -> list[list[int]]:
    """The columns that each row of sim [B, N] may choose."""
    rows, columns = sim.shape
    if positive is None and rows == columns:
        positive = torch.arange(rows)
    chosen: list[list[int]] = []
    for b in range(rows):
        chosen.append([])
        for n in range(columns):
            value = float(sim[b, n])
            own = positive is not None and int(positive[b]) == n
            excluded = exclude is not None and bool(exclude[b, n])
            same = row_ids is not None and col_ids is not None and bool(row_ids[b] == col_ids[n])
            if not (own or excluded or same or math.isnan(value) or value == -math.inf):
                chosen[b].append(n)
    return chosen


def probabilities(sim: Tensor, allowed: list[list[int]]) -> Tensor:
    """How likely each column is drawn: the softmax over the candidates, in float64."""
    out = torch.zeros(sim.shape, dtype=torch.float64)
    for b, columns in enumerate(allowed):
        out[b, columns] = sim[b, columns].double().softmax(dim=0)
    return out


def gumbel_noise(seed: list[int], rows: int, columns: int) -> Tensor:
    """The noise [rows, columns] of a seed: cell (b, n) has word n % 4 of the block n // 4."""
    key = seed_key(seed)
    noise = [
        [gumbel(philox(key, (n // 4, b, 0, 0))[n % 4]) for n in range(columns)] for b in range(rows)
    ]
    return torch.tensor(noise, dtype=torch.float64).reshape(rows, columns)


def most_similar(values: Tensor, columns: list[int]) -> int:
    """The column of the highest value, the first of equals."""
    return max(columns, key=lambda n: (float(values[n]), -n))


def semi_hard(
    values: Tensor, columns: list[int], positive: int, margin: float, quantile: float
) -> int:
    """Below the positive by more than the margin, the candidate at the quantile of similarity."""
    easier = [n for n in columns if values[n] < values[positive] - margin]
    if not easier:
        return min(columns, key=lambda n: (float(values[n]), n))
    exact = Fraction(quantile).limit_denominator(10**6)
    rank = max(math.ceil(exact * len(easier)), 1)
    level = sorted(float(values[n]) for n in easier)[rank - 1]
    return min(n for n in easier if values[n] == level)


def sample_negatives(
    sim: Tensor,
    *,
    positive: Tensor | None = None,
    exclude: Tensor | None = None,
    row_ids: Tensor | None = None,
    col_ids: Tensor | None = None,
    mode: str = "multinomial",
    margin: float = 0.0,
    quantile: float | None = None,
    noise: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """sim [B, N] -> ids [B], found [B]; "multinomial" adds `noise` [B, N] to the logits."""
    allowed = candidates(sim, positive, exclude, row_ids, col_ids)
    ids = torch.zeros(sim.shape[0], dtype=torch.int64)
    found = torch.tensor([bool(columns) for columns in allowed], dtype=torch.bool)
    for b, columns in enumerate(allowed):
        if not columns:
            continue
        if mode == "semi_hard":
            own = b if positive is None else int(positive[b])
            ids[b] = semi_hard(sim[b], columns, own, margin, 1.0 if quantile is None else quantile)
        elif mode == "hardest":
            ids[b] = most_similar(sim[b], columns)
        else:
            assert noise is not None
            ids[b] = most_similar(sim[b] + noise[b], columns)
    return ids, found
