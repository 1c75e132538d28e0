"""Calls of the C++ kernels of patch losses (`csrc/cpu/patch_losses.cpp`)."""

from __future__ import annotations

import torch
from torch import Tensor

from syncmask_kernels.backends import overloads
from syncmask_kernels.backends.overloads.patch_losses import backward_arguments, loss_arguments
from syncmask_kernels.backends.patch_losses_request import PatchLoss

_loss = overloads.define("masked_patch_loss", "cpu")
_backward = overloads.define("masked_patch_loss_backward", "cpu")


def refuses(pred: Tensor, target: Tensor, loss: PatchLoss) -> str | None:
    if torch.float64 in (pred.dtype, target.dtype):
        return "float64 is served by eager only"
    return None


def masked_patch_loss(
    pred: Tensor, target: Tensor, ids_or_mask: Tensor, loss: PatchLoss
) -> tuple[Tensor, Tensor]:
    """The loss, and by what the losses of patches are divided."""
    result, divisor = _loss(pred, target, ids_or_mask, *loss_arguments(loss))
    return result, divisor


def masked_patch_loss_backward(
    grad: Tensor,
    divisor: Tensor,
    pred: Tensor,
    target: Tensor,
    ids_or_mask: Tensor,
    loss: PatchLoss,
) -> Tensor:
    """The gradient of `pred`."""
    found: Tensor = _backward(grad, divisor, pred, target, ids_or_mask, *backward_arguments(loss))
    return found
