"""Moving the teacher, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def ema_update_(teacher: list[Tensor], student: list[Tensor], momentum: float | Tensor) -> None:
    """``teacher = momentum * teacher + (1 - momentum) * student``, in place."""
    moving = [
        s if s.dtype == t.dtype else s.to(t.dtype) for t, s in zip(teacher, student, strict=True)
    ]
    if isinstance(momentum, Tensor):
        share = 1.0 - momentum.double()
        shares = {dtype: share.to(dtype) for dtype in {t.dtype for t in teacher}}
        torch._foreach_lerp_(teacher, moving, [shares[t.dtype] for t in teacher])
    else:
        torch._foreach_lerp_(teacher, moving, 1.0 - momentum)
