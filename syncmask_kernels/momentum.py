"""The momentum teacher."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from syncmask_kernels import _checks, backends

Parameters = nn.Module | Iterable[Tensor]


def _parameters(name: str, source: Parameters) -> list[Tensor]:
    tensors = list(source.parameters() if isinstance(source, nn.Module) else source)
    for i, tensor in enumerate(tensors):
        _checks.floating(f"{name}[{i}]", tensor)
    return tensors


def ema_update_(teacher: Parameters, student: Parameters, momentum: float) -> None:
    """Move the teacher towards the student: ``m * teacher + (1 - m) * student``, in place.

    Args:
        teacher: module or iterable of parameters to move. Their storage is kept, so CUDA graphs and
            flat buffers stay valid. Buffers of modules (such as batch statistics) are not moved.
        student: module or iterable of as many parameters, of the same shapes and devices. Another
            type is cast to the teacher's. In bfloat16 a small step is lost to rounding: keep a
            teacher with momentum near 1 in float32.
        momentum: m in [0, 1], ALBEF uses 0.995.

    Raises:
        TypeError: a parameter is no floating tensor.
        ValueError: counts, shapes or devices differ, or `momentum` is outside [0, 1].

    Batched over all parameters (`torch._foreach_lerp_`), deterministic, without gradient, no host
    sync.

    Source: ALBEF `_momentum_update`.

    Example:
        >>> import torch, syncmask_kernels as smk
        >>> teacher, student = torch.tensor([1.0]), torch.tensor([2.0])
        >>> smk.ema_update_([teacher], [student], momentum=0.75)
        >>> teacher
        tensor([1.2500])
    """
    moved, towards = _parameters("teacher", teacher), _parameters("student", student)
    if len(moved) != len(towards):
        raise ValueError(
            f"student must have the teacher's {len(moved)} parameters, got {len(towards)}"
        )
    for i, (t, s) in enumerate(zip(moved, towards, strict=True)):
        _checks.shape(f"student[{i}]", s, f"the shape of teacher[{i}]", t.shape)
        _checks.same_device(f"student[{i}]", s, f"teacher[{i}]", t)
    _checks.fraction("momentum", momentum)
    if moved:
        backends.choose("ema_update_", moved[0])(moved, towards, momentum)
