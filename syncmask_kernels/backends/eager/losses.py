"""Losses over masked positions only, in plain PyTorch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from syncmask_kernels.backends.eager import losses_known_rows
from syncmask_kernels.backends.eager.losses_softmax import PLAIN_SOFTMAX, Softmax
from syncmask_kernels.backends.eager.selection import ids_of
from syncmask_kernels.backends.loss_request import Head, Targets

STREAM_LOGITS = 2**24  # logits alive at a time where the number of labelled rows is unknown


def _host_counts(labels: Tensor) -> bool:
    """Whether the host may look at the labels: on a GPU it would wait, compiled it cannot."""
    return labels.device.type == "cpu" and not torch.compiler.is_compiling()


def _wide(*tensors: Tensor) -> torch.dtype:
    wide = torch.float32
    for tensor in tensors:
        wide = torch.promote_types(wide, tensor.dtype)
    return wide


def _logits(head: Head, rows: Tensor, keep: Tensor) -> Tensor:
    """[K, V] of rows [K]: the product in the type of `hidden` or of autocast, at least float32.

    Rows that are not kept may be NaN, in `hidden` and thus in the gradient of `weight`: zero.
    """
    hidden = head.hidden.index_select(0, rows).masked_fill(~keep.unsqueeze(1), 0)
    bias = None if head.bias is None else head.bias.to(hidden.dtype)
    product = F.linear(hidden, head.weight.to(hidden.dtype), bias)
    return product.to(_wide(product))


def _losses_at(ids: Tensor, student: Head, targets: Targets) -> Tensor:
    """The loss of each of the rows `ids` [K], 0 where the id is -1 or the row has no label."""
    rows = ids.clamp(min=0)
    labels = targets.labels.index_select(0, rows).masked_fill(ids < 0, targets.ignore_index)
    keep = labels != targets.ignore_index
    log_p = _logits(student, rows, keep).log_softmax(dim=-1)
    losses = F.nll_loss(log_p, labels, reduction="none", ignore_index=targets.ignore_index)
    if targets.label_smoothing > 0:
        uniform = -log_p.mean(dim=-1)
        losses = (1 - targets.label_smoothing) * losses + targets.label_smoothing * uniform
    soft = None
    if targets.soft is not None:
        soft = targets.soft.index_select(0, rows).to(log_p.dtype)
    if targets.teacher is not None:
        soft = _logits(targets.teacher, rows, keep).softmax(dim=-1)
    if soft is not None:
        soft = soft.masked_fill(~keep.unsqueeze(1), 0)
        losses = (1 - targets.alpha) * losses - targets.alpha * (soft * log_p).sum(dim=-1)
    return losses.masked_fill(~keep, 0)


def _streamed(student: Head, targets: Targets) -> Tensor:
    """All rows, a part at a time; the backward pass computes the logits of a part again."""
    ids = torch.arange(targets.labels.shape[0], device=targets.labels.device)
    size = max(1, STREAM_LOGITS // student.weight.shape[0])
    if torch.compiler.is_compiling() or ids.shape[0] <= size:
        return _losses_at(ids, student, targets)
    parts = [
        checkpoint(
            _losses_at, part, student, targets, use_reentrant=False, preserve_rng_state=False
        )
        for part in ids.split(size)
    ]
    return torch.cat(parts)


def _host_knows(ids: Tensor, student: Head, targets: Targets, reduction: str) -> bool:
    """Whether `ids` are labelled rows, one or more, whose losses may be summed at once."""
    summed = reduction != "none" and ids.shape[0] > 0
    return summed and _host_counts(ids) and losses_known_rows.serves(student, targets)


def _known_rows_loss(
    rows: Tensor, student: Head, targets: Targets, reduction: str, softmax: Softmax
) -> Tensor:
    scale = 1 / rows.shape[0] if reduction == "mean" else 1.0

    def plain(*head: Any) -> Tensor:
        return scale * _losses_at(rows, Head(*head), targets).sum()

    return losses_known_rows.summed_loss(student, targets, rows, scale, softmax, plain)


def labelled_rows(targets: Targets, ids: Tensor | None, capacity: int | None) -> Tensor | None:
    """Labelled rows, -1 for none: those of `ids`, or as many as fit; None: any number of them."""
    labelled = targets.labels != targets.ignore_index
    if labelled.shape[0] == 0:
        return targets.labels
    if ids is not None:
        return torch.where(labelled.index_select(0, ids.clamp(min=0)), ids, -1)
    if capacity is not None:
        room = max(capacity, 1)  # one row, even if none fits, has gradients to make NaN
        return ids_of(labelled & (labelled.cumsum(dim=0) <= room), room)
    return None


def masked_linear_cross_entropy(
    student: Head,
    targets: Targets,
    ids: Tensor | None,
    capacity: int | None,
    reduction: str,
    softmax: Softmax = PLAIN_SOFTMAX,
) -> Tensor:
    """The loss over the labelled rows, or over those of them that `ids` [K] (-1: none) names."""
    labels = targets.labels
    labelled = labels != targets.ignore_index
    ids = labelled_rows(targets, ids, capacity)
    if _host_counts(labels):
        ids = labelled.nonzero().squeeze(1) if ids is None else ids[ids >= 0]
    if ids is not None and _host_knows(ids, student, targets, reduction):
        losses = _known_rows_loss(ids, student, targets, reduction, softmax)
    else:
        losses = _streamed(student, targets) if ids is None else _losses_at(ids, student, targets)
        if reduction == "none":
            if ids is not None:
                losses = losses.new_zeros(labels.shape[0]).index_add(0, ids.clamp(min=0), losses)
        else:
            losses = losses.sum()
        if reduction == "mean":
            losses = losses / (labelled if ids is None else ids >= 0).sum().clamp(min=1)
    if capacity is not None:
        # A factor, not a where(): the gradients of rows that did not fit must not pass for zero.
        losses = losses * torch.where(labelled.sum() > capacity, float("nan"), 1.0)
    return losses
