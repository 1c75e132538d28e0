"""Linear cross entropy with the C++ kernels of `csrc/cpu/losses.cpp` between PyTorch's products."""

from __future__ import annotations

import torch
from torch import Tensor

from syncmask_kernels.backends import overloads
from syncmask_kernels.backends.eager import losses, losses_known_rows
from syncmask_kernels.backends.eager.losses_softmax import LogSum, Shares, SoftBlock, Softmax
from syncmask_kernels.backends.kernel import refuses_compiling
from syncmask_kernels.backends.loss_request import Head, Targets

_add_block = overloads.define("linear_cross_entropy_add_block", "cpu")
_slopes_overload = overloads.define("linear_cross_entropy_slopes", "cpu")


def _slopes(
    logits: Tensor, sums: LogSum, labels: Tensor, shares: Shares, soft: SoftBlock | None
) -> tuple[Tensor, Tensor]:
    values, soft_sums = (None, None) if soft is None else soft
    slopes, loss = _slopes_overload(
        logits, *sums, labels, *shares, values, *(soft_sums or (None, None))
    )
    return slopes, loss


SOFTMAX = Softmax(_add_block, _slopes)


def refuses_linear_cross_entropy(student: Head, targets: Targets, reduction: str) -> str | None:
    compiling = refuses_compiling()
    if compiling is not None:
        return compiling
    if reduction == "none":
        return "losses that are not summed are served by eager only"
    if student.hidden.dtype != torch.float32 or not losses_known_rows.serves(student, targets):
        return "other types than float32, and autocast, are served by eager only"
    return None


def masked_linear_cross_entropy(
    student: Head, targets: Targets, ids: Tensor | None, capacity: int | None, reduction: str
) -> Tensor:
    return losses.masked_linear_cross_entropy(student, targets, ids, capacity, reduction, SOFTMAX)
