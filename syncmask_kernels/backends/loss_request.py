"""What the public loss functions hand to a backend, validated."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

REDUCTIONS = ("mean", "sum", "none")


class Head(NamedTuple):
    """A linear layer over the vocabulary and the rows that it is applied to."""

    hidden: Tensor  # [R, D]
    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V]


class Targets(NamedTuple):
    """What the rows are compared with; at most one of `soft` and `teacher` is given."""

    labels: Tensor  # [R] int64
    soft: Tensor | None  # [R, V]
    teacher: Head | None
    alpha: float | Tensor
    ignore_index: int
    label_smoothing: float
