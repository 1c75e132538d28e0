"""Linear cross entropy on a GPU, which never waits for what the labels are."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from syncmask_kernels.backends.eager.losses import labelled_rows
from syncmask_kernels.backends.eager.selection import ids_of
from syncmask_kernels.backends.loss_request import Head, Targets
from syncmask_kernels.backends.triton.losses_rows import rows_overload, scale_
from syncmask_kernels.backends.triton.losses_streamed import backward_overload, stream_overload


class _Streamed(torch.autograd.Function):
    """The losses [K] of the rows."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        rest: tuple[Any, ...],
        wanted: list[bool],
    ) -> Tensor:
        losses, sums = stream_overload(hidden, weight, bias, *rest)
        ctx.save_for_backward(hidden, weight, bias, sums)
        ctx.rest, ctx.wanted = rest, wanted
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slopes: Tensor) -> tuple[Tensor | None, ...]:
        *head, sums = ctx.saved_tensors
        found = backward_overload(*head, *ctx.rest, sums, slopes.contiguous(), ctx.wanted)
        return (*_placed(found, ctx.wanted), None, None)


class _Gathered(torch.autograd.Function):
    """The losses [K] of the rows, or with `scales` [K] their sum by these weights."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        rest: tuple[Any, ...],
        wanted: list[bool],
        scales: Tensor | None,
    ) -> Tensor:
        # Half a step's gradients would vanish in float16 before a gradient scaler can save them.
        ahead = scales is not None and any(wanted) and hidden.dtype != torch.float16
        ahead = ahead and not torch.compiler.is_compiling()
        losses, found = rows_overload(
            hidden, weight, bias, *rest, scales if ahead else None, wanted
        )
        ctx.save_for_backward(hidden, weight, bias, scales)
        ctx.rest, ctx.wanted = rest, wanted
        if not torch.compiler.is_compiling():
            ctx.ahead = found if ahead else None
        return losses if scales is None else (losses * scales).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        *head, scales = ctx.saved_tensors
        found = None
        if not torch.compiler.is_compiling():
            found, ctx.ahead = ctx.ahead, None
        if found is None:
            slopes = slope.contiguous() if scales is None else slope * scales
            _, found = rows_overload(*head, *ctx.rest, slopes, ctx.wanted)
        else:
            scale_(found, slope)
        return (*_placed(found, ctx.wanted), None, None, None)


def _placed(found: list[Tensor], wanted: list[bool]) -> list[Tensor | None]:
    gradients = iter(found)
    return [next(gradients) if wants else None for wants in wanted]


def _product_type(head: Head) -> torch.dtype:
    device = head.hidden.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return head.hidden.dtype


def _in_one_type(head: Head) -> list[Tensor | None]:
    dtype = _product_type(head)
    return [None if x is None else x.to(dtype).contiguous() for x in head]


def _scales(targets: Targets, rows: Tensor, vocabulary: int) -> Tensor:
    """Factors of the losses of rows [K]: NaN where the label is none of the vocabulary, else 1."""
    labels = targets.labels.index_select(0, rows.clamp(min=0))
    wrong = (rows >= 0) & ((labels < 0) | (labels >= vocabulary))
    return torch.where(wrong, float("nan"), 1.0)


def _rest(targets: Targets, rows: Tensor) -> tuple[Any, ...]:
    """The arguments of the overloads after the student's head."""
    alpha, device = targets.alpha, rows.device
    if isinstance(alpha, Tensor):
        alpha = alpha.detach().to(device, torch.float32)
    else:
        alpha = torch.full((), alpha, device=device)
    return (
        targets.labels.index_select(0, rows.clamp(min=0)),
        rows,
        None if targets.soft is None else targets.soft.contiguous(),
        *((None, None, None) if targets.teacher is None else _in_one_type(targets.teacher)),
        alpha,
        targets.label_smoothing,
    )


def masked_linear_cross_entropy(
    student: Head, targets: Targets, ids: Tensor | None, capacity: int | None, reduction: str
) -> Tensor:
    """As in eager, with gradients of its own; without ids and capacity it streams."""
    labels = targets.labels
    labelled = labels != targets.ignore_index
    known = labelled_rows(targets, ids, capacity)
    rows = ids_of(labelled, labels.shape[0]) if known is None else known
    scales = _scales(targets, rows, student.weight.shape[0])
    fits = None
    if capacity is not None:
        fits = torch.where(labelled.sum() > capacity, float("nan"), 1.0)
        scales = scales * fits
    if reduction == "mean":
        scales = scales / (rows >= 0).sum().clamp(min=1)
    rest = _rest(targets, rows)
    head = _in_one_type(student)
    recorded = torch.is_grad_enabled()
    wanted = [recorded and x is not None and x.requires_grad for x in head]
    if known is None:
        losses = _Streamed.apply(*head, rest, wanted)
    elif reduction == "none":
        losses = _Gathered.apply(*head, rest, wanted, None)
    else:
        loss: Tensor = _Gathered.apply(*head, rest, wanted, scales)
        return loss
    losses = losses * scales
    if reduction != "none":
        return losses.sum()
    placed = losses.new_zeros(labels.shape[0]).index_add(0, rows.clamp(min=0), losses)
    return placed if fits is None else placed * fits
