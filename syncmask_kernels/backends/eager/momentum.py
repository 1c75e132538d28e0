"""Moving the teacher, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def ema_update_(teacher: list[Tensor], student: list[Tensor], momentum: float) -> None:
    """``teacher = momentum * teacher + (1 - momentum) * student``, in place."""
    moving = [s.to(t.dtype) for t, s in zip(teacher, student, strict=True)]
    torch._foreach_lerp_(teacher, moving, 1.0 - momentum)
