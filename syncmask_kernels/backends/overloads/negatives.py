"""Schema and fake of the negatives room."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

MODES = ("multinomial", "hardest", "semi_hard")  # by the schema's `mode`

SCHEMAS = {
    "sample_negatives": (
        "(Tensor sim, Tensor? positive, Tensor? exclude, Tensor? row_ids, Tensor? col_ids,"
        " int mode, float margin, int num, int den, Tensor? seed, Tensor? noise)"
        " -> (Tensor ids, Tensor found)"
    ),
}


def _fake_sample_negatives(sim: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    rows = sim.shape[:1]
    return sim.new_empty(rows, dtype=torch.int64), sim.new_empty(rows, dtype=torch.bool)


FAKES = {"sample_negatives": _fake_sample_negatives}
