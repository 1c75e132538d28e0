"""Schema and fake of the negatives room, and calls in the order of the schema."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

MODES = ("multinomial", "hardest", "semi_hard")

SCHEMAS = {
    "sample_negatives": (
        "(Tensor sim, Tensor? positive, Tensor? exclude, Tensor? row_ids, Tensor? col_ids,"
        " int mode, float margin, int num, int den, Tensor? seed, Tensor? noise)"
        " -> (Tensor ids, Tensor found)"
    ),
}


def arguments(
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
) -> tuple[Any, ...]:
    """The arguments of a backend in the order of the schema."""
    columns = (positive, exclude, row_ids, col_ids)
    return sim, *columns, MODES.index(mode), margin, *quantile, seed, noise


def _fake_sample_negatives(sim: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    rows = sim.shape[:1]
    return sim.new_empty(rows, dtype=torch.int64), sim.new_empty(rows, dtype=torch.bool)


FAKES = {"sample_negatives": _fake_sample_negatives}
