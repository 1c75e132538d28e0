"""The momentum teacher, one parameter after the other."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def ema(teacher: Sequence[Tensor], student: Sequence[Tensor], momentum: float) -> list[Tensor]:
    """The teacher's next parameters."""
    return [momentum * t + (1 - momentum) * s for t, s in zip(teacher, student, strict=True)]
