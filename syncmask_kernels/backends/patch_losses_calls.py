"""Calls of the patch losses' overloads, the same for every backend that has them."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from syncmask_kernels.backends import overloads
from syncmask_kernels.backends.overloads.patch_losses import backward_arguments, loss_arguments
from syncmask_kernels.backends.patch_losses_request import PatchLoss


def define(
    backend: str,
) -> tuple[Callable[..., tuple[Tensor, Tensor]], Callable[..., Tensor]]:
    """`masked_patch_loss` and `masked_patch_loss_backward` of a backend's table."""
    loss_op = overloads.define("masked_patch_loss", backend)
    backward_op = overloads.define("masked_patch_loss_backward", backend)

    def masked_patch_loss(
        pred: Tensor, target: Tensor, ids_or_mask: Tensor, loss: PatchLoss
    ) -> tuple[Tensor, Tensor]:
        """The loss, and by what the losses of patches are divided."""
        result, divisor = loss_op(pred, target, ids_or_mask, *loss_arguments(loss))
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
        tensors = (grad, divisor, pred, target, ids_or_mask)
        found: Tensor = backward_op(*tensors, *backward_arguments(loss))
        return found

    return masked_patch_loss, masked_patch_loss_backward
