"""Reconstruction of masked patches in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from syncmask_kernels.backends.eager.masking import gather_masked, scatter_masked
from syncmask_kernels.backends.patch_losses_request import PatchLoss


def _target_patches(target: Tensor, ids: Tensor | None, patch_size: int | None) -> Tensor:
    """The patches [B, P, C] of `target`, or of `ids` [B, K] only; an image is read where needed."""
    if target.dim() == 3:
        return target if ids is None else gather_masked(target, ids, 0)
    assert patch_size is not None
    grid = target.unfold(2, patch_size, patch_size).unfold(3, patch_size, patch_size)
    grid = grid.permute(0, 2, 3, 4, 5, 1)  # [B, rows, columns, y, x, channel], a view
    if ids is None:
        return grid.flatten(3).flatten(1, 2)
    batch = torch.arange(ids.shape[0], device=ids.device).unsqueeze(1)
    cell, columns = ids.clamp(min=0), grid.shape[2]
    return grid[batch, cell // columns, cell % columns].flatten(2)


def _masked_rows(
    pred: Tensor, target: Tensor, ids_or_mask: Tensor, loss: PatchLoss
) -> tuple[Tensor, Tensor, Tensor]:
    """Predictions and targets [B, P or K, C], at least float32, 0 where `keep` is False."""
    by_mask = ids_or_mask.dtype == torch.bool
    ids = None if by_mask else ids_or_mask
    keep = ids_or_mask if by_mask else ids_or_mask >= 0
    if loss.gather_pred:
        pred = gather_masked(pred, ids_or_mask, 0)
    wide = torch.promote_types(torch.promote_types(pred.dtype, target.dtype), torch.float32)
    unused = ~keep.unsqueeze(-1)  # what is not looked at may be NaN
    pred = pred.to(wide).masked_fill(unused, 0)
    target = _target_patches(target, ids, loss.patch_size).to(wide).masked_fill(unused, 0)
    if loss.norm_pix:
        target = target - target.mean(dim=-1, keepdim=True)
        variance = target.square().sum(dim=-1, keepdim=True) / (target.shape[-1] - 1)
        target = target / (variance + 1e-6).sqrt()
    return pred, target, keep


def _patch_losses(pred: Tensor, target: Tensor, kind: str) -> Tensor:
    """[B, K, C] -> [B, K]."""
    if kind == "cosine":
        return 1 - F.cosine_similarity(pred, target, dim=-1)
    loss = {"l1": F.l1_loss, "mse": F.mse_loss, "smooth_l1": F.smooth_l1_loss}[kind]
    return loss(pred, target, reduction="none").mean(dim=-1)


def masked_patch_loss(
    pred: Tensor, target: Tensor, ids_or_mask: Tensor, loss: PatchLoss
) -> tuple[Tensor, Tensor]:
    """The loss over masked patches of pred [B, P or K, C] and target [B, P, C] or an image, and by
    what the losses of patches are divided.
    """
    pred, target, keep = _masked_rows(pred, target, ids_or_mask, loss)
    losses = _patch_losses(pred, target, loss.kind).masked_fill(~keep, 0)
    if loss.reduction == "none":
        return losses, losses.new_ones(())
    total = losses.sum()
    divisor = keep.sum().clamp(min=1) if loss.reduction == "mean" else total.new_ones(())
    return total / divisor, divisor.to(total.dtype)


def _slopes(pred: Tensor, target: Tensor, kind: str) -> Tensor:
    """[B, K, C] -> the gradient of the loss of each patch by its prediction."""
    if kind == "cosine":
        pred_norm, norm = (x.norm(dim=-1, keepdim=True).clamp(min=1e-8) for x in (pred, target))
        direction = pred / pred_norm
        away = target / norm
        cosine = (direction * away).sum(dim=-1, keepdim=True)
        return (direction * cosine - away) / pred_norm
    error = pred - target
    slope = {"l1": error.sign(), "mse": 2 * error, "smooth_l1": error.clamp(-1, 1)}[kind]
    return slope / error.shape[-1]


def masked_patch_loss_backward(
    grad: Tensor,
    divisor: Tensor,
    pred: Tensor,
    target: Tensor,
    ids_or_mask: Tensor,
    loss: PatchLoss,
) -> Tensor:
    """The gradient of `pred`, in terms that autograd can go through once more."""
    given, want, keep = _masked_rows(pred, target, ids_or_mask, loss)
    weight = (grad / divisor).expand(keep.shape).unsqueeze(-1)
    slopes = (weight * _slopes(given, want, loss.kind)).masked_fill(~keep.unsqueeze(-1), 0)
    if loss.gather_pred:
        slopes = scatter_masked(slopes, ids_or_mask, pred.shape[1])
    return slopes.to(pred.dtype)
