"""The momentum teacher."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from syncmask_kernels import _checks, backends

Parameters = nn.Module | Iterable[Tensor]
BUFFERS = ("keep", "copy", "move")


def _check_pairs(teacher: list[Tensor], student: list[Tensor], kind: str) -> None:
    """Counts, types, shapes and devices; one look at each pair, since a model has hundreds."""
    if len(teacher) != len(student):
        raise ValueError(
            f"student must have the teacher's {len(teacher)} {kind}, got {len(student)}"
        )
    for i, (t, s) in enumerate(zip(teacher, student, strict=True)):
        fits = isinstance(t, Tensor) and isinstance(s, Tensor)
        if not fits or t.shape != s.shape or t.device != s.device:
            _checks.tensor(f"teacher[{i}]", t)
            _checks.shape(f"student[{i}]", s, f"the shape of teacher[{i}]", t.shape)
            _checks.same_device(f"student[{i}]", s, f"teacher[{i}]", t)


def _check_floating(name: str, tensors: list[Tensor]) -> None:
    for i, tensor in enumerate(tensors):
        if tensor.dtype not in _checks.FLOATS:
            _checks.floating(f"{name}[{i}]", tensor)


def _check_momentum(momentum: float | Tensor, teacher: list[Tensor]) -> None:
    if isinstance(momentum, Tensor):
        _checks.floating("momentum", momentum)
        _checks.shape("momentum", momentum, "one value", ())
        if teacher:
            _checks.same_device("momentum", momentum, "teacher[0]", teacher[0])
    else:
        _checks.fraction("momentum", momentum)


def _buffers(teacher: Parameters, student: Parameters) -> tuple[list[Tensor], list[Tensor]]:
    if not isinstance(teacher, nn.Module) or not isinstance(student, nn.Module):
        raise ValueError("buffers are those of modules, got lists of parameters")
    buffers = list(teacher.buffers()), list(student.buffers())
    _check_pairs(*buffers, "buffers")
    return buffers


def ema_update_(
    teacher: Parameters,
    student: Parameters,
    momentum: float | Tensor,
    *,
    buffers: str = "keep",
) -> None:
    """Move the teacher towards the student: ``m * teacher + (1 - m) * student``, in place.

    Args:
        teacher: module or iterable of parameters to move. Their storage is kept, so CUDA graphs and
            flat buffers stay valid.
        student: module or iterable of as many parameters, of the same shapes and devices. Another
            type is cast to the teacher's. In bfloat16 a small step is lost to rounding: keep a
            teacher with momentum near 1 in float32.
        momentum: m in [0, 1], ALBEF uses 0.995; or a floating tensor of one value on the teacher's
            device, which a captured CUDA graph reads anew at every replay (a tensor's value is not
            checked, and costs one launch for each parameter).
        buffers: of modules, such as batch statistics: ``"keep"`` (default, as ALBEF and MoCo, whose
            teachers make their own), ``"copy"`` the student's (as `torch.optim.swa_utils` does for
            a teacher in evaluation mode), or ``"move"`` floating ones as if they were parameters
            and copy the others, such as counts (as timm).

    Raises:
        TypeError: a parameter is no floating tensor, or `momentum` no number.
        ValueError: counts, shapes or devices differ, `momentum` is outside [0, 1], `buffers` is
            unknown, or there are none, because the teacher or the student is no module.

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
    moved, towards = (
        list(source.parameters() if isinstance(source, nn.Module) else source)
        for source in (teacher, student)
    )
    _check_pairs(moved, towards, "parameters")
    _check_floating("teacher", moved)
    _check_floating("student", towards)
    _check_momentum(momentum, moved)
    _checks.choice("buffers", buffers, BUFFERS)
    copied: list[tuple[Tensor, Tensor]] = []
    if buffers != "keep":
        for t, s in zip(*_buffers(teacher, student), strict=True):
            if buffers == "move" and t.is_floating_point() and s.is_floating_point():
                moved.append(t)
                towards.append(s)
            else:
                copied.append((t, s))
    if moved:
        backends.choose("ema_update_", moved[0])(moved, towards, momentum)
    with torch.no_grad():
        for t, s in copied:
            t.copy_(s)
