"""Moving the teacher, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


@torch.no_grad()
def ema_update_(teacher: Sequence[Tensor], student: Sequence[Tensor], momentum: float) -> None:
    """``teacher = momentum * teacher + (1 - momentum) * student``, in place."""
    if teacher:
        moving = [s.to(t.dtype) for t, s in zip(teacher, student, strict=True)]
        torch._foreach_lerp_(list(teacher), moving, 1.0 - momentum)
