"""Losses over masked positions only, in plain PyTorch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from syncmask_kernels.backends.eager.masking import flat_rows, gather_masked

STREAM_LOGITS = 2**24  # logits alive at a time where the number of labelled rows is unknown


class Head(NamedTuple):
    """A linear layer over the vocabulary and its input rows."""

    hidden: Tensor  # [R, D]
    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V]

    def logits(self) -> Tensor:
        """[R, V] in the type of the rows (autocast decides otherwise), then at least float32."""
        bias = None if self.bias is None else self.bias.to(self.hidden.dtype)
        product = F.linear(self.hidden, self.weight.to(self.hidden.dtype), bias)
        return product.to(torch.promote_types(product.dtype, torch.float32))

    def take(self, rows: Tensor, keep: Tensor) -> Head:
        """Its rows [R'], zero where `keep` is False: what is not looked at may be NaN."""
        return self._replace(hidden=_take(self.hidden, rows, keep))


class Targets(NamedTuple):
    """What the rows are compared with; `soft` or `teacher` or neither."""

    labels: Tensor  # [R]
    soft: Tensor | None  # [R, V]
    teacher: Head | None
    alpha: float | Tensor
    ignore_index: int
    label_smoothing: float


def _take(x: Tensor, rows: Tensor, keep: Tensor) -> Tensor:
    return x.index_select(0, rows).masked_fill(~keep.unsqueeze(1), 0)


def _row_losses(student: Head, targets: Targets) -> Tensor:
    """The loss of each row [R], 0 where it has no label."""
    logits = student.logits()
    loss = F.cross_entropy(
        logits,
        targets.labels,
        ignore_index=targets.ignore_index,
        label_smoothing=targets.label_smoothing,
        reduction="none",
    )
    if targets.soft is None and targets.teacher is None:
        return loss
    if targets.teacher is not None:
        with torch.no_grad():
            soft = targets.teacher.logits().softmax(dim=-1)
    soft_loss = -(soft * logits.log_softmax(dim=-1)).sum(dim=-1)
    ...
