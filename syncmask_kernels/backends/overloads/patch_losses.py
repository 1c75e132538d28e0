"""Schemas and fakes of masked_patch_loss and its gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from syncmask_kernels.backends.loss_request import REDUCTIONS
from syncmask_kernels.backends.patch_losses_request import KINDS, PatchLoss

_LOSS = (
    "Tensor pred, Tensor target, Tensor ids_or_mask, int kind, int? patch_size, bool norm_pix,"
    " bool gather_pred"
)
SCHEMAS = {
    "masked_patch_loss": f"({_LOSS}, int reduction) -> (Tensor loss, Tensor divisor)",
    "masked_patch_loss_backward": f"(Tensor grad, Tensor divisor, {_LOSS}) -> Tensor",
}


def backward_arguments(loss: PatchLoss) -> tuple[int, int | None, bool, bool]:
    """In the order of the schema."""
    return KINDS.index(loss.kind), loss.patch_size, loss.norm_pix, loss.gather_pred


def loss_arguments(loss: PatchLoss) -> tuple[int, int | None, bool, bool, int]:
    """In the order of the schema."""
    return *backward_arguments(loss), REDUCTIONS.index(loss.reduction)


def _fake_masked_patch_loss(
    pred: Tensor,
    target: Tensor,
    ids_or_mask: Tensor,
    kind: int,
    patch_size: int | None,
    norm_pix: bool,
    gather_pred: bool,
    reduction: int,
) -> tuple[Tensor, Tensor]:
    shape = ids_or_mask.shape if REDUCTIONS[reduction] == "none" else ()
    return pred.new_empty(shape, dtype=torch.float32), pred.new_empty((), dtype=torch.float32)


def _fake_masked_patch_loss_backward(
    grad: Tensor, divisor: Tensor, pred: Tensor, *rest: object
) -> Tensor:
    return pred.new_empty(pred.shape)


FAKES = {
    "masked_patch_loss": _fake_masked_patch_loss,
    "masked_patch_loss_backward": _fake_masked_patch_loss_backward,
}
