"""Reconstruction of masked patches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from syncmask_kernels import _checks, _host, backends
from syncmask_kernels.attention import wants_grad
from syncmask_kernels.backends.eager import patch_losses as eager
from syncmask_kernels.backends.loss_request import REDUCTIONS
from syncmask_kernels.backends.patch_losses_request import KINDS, PatchLoss


def _patch_grid(pred: Tensor, target: Tensor, patch_size: int | None) -> tuple[int, int]:
    """The checked number of patches of `target` and of values in a patch."""
    _checks.floating("target", target, "[B, P, C]", "[B, channels, Hi, Wi]")
    _checks.same_device("target", target, "pred", pred)
    if target.dim() == 3:
        if patch_size is not None:
            raise ValueError(f"patch_size is for an image target, got patch_size={patch_size}")
        return target.shape[1], target.shape[2]
    if patch_size is None or patch_size < 1:
        raise ValueError(f"patch_size must be at least 1 for an image, got {patch_size}")
    _, channels, height, width = target.shape
    if height % patch_size or width % patch_size:
        raise ValueError(
            f"target must have sides that patch_size={patch_size} divides, "
            f"got shape {tuple(target.shape)}"
        )
    return (height // patch_size) * (width // patch_size), channels * patch_size**2


class _MaskedPatchLoss(torch.autograd.Function):
    """The forward and backward of a backend without autograd; the target is a constant."""

    @staticmethod
    def forward(
        ctx: Any, run: Any, run_backward: Any, loss: PatchLoss, pred: Tensor, *constants: Tensor
    ) -> Any:
        result, divisor = run(pred, *constants, loss)
        ctx.save_for_backward(divisor, pred, *constants)
        ctx.run_backward, ctx.loss = run_backward, loss
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # A gradient of the gradient takes operations that autograd records.
        twice = torch.is_grad_enabled()
        run: Any = eager.masked_patch_loss_backward if twice else ctx.run_backward
        return None, None, None, run(grad, *ctx.saved_tensors, ctx.loss), None, None


def masked_patch_loss(
    pred: Tensor,
    target: Tensor,
    ids_or_mask: Tensor,
    *,
    kind: str = "l1",
    patch_size: int | None = None,
    norm_pix: bool = False,
    reduction: str = "mean",
) -> Tensor:
    """Reconstruction loss over masked patches, against features or straight against the image.

    Args:
        pred: ``[B, P, C]`` floating predictions of all patches, or, with ids, ``[B, K, C]``: row k
            predicts patch ``ids[:, k]`` (what is meant where K = P, too).
        target: ``[B, P, C]`` floating, or the image ``[B, channels, Hi, Wi]``, whose patches are
            numbered row by row and flattened as in MAE (row, column, channel).
        ids_or_mask: the masked patches, int64 ids ``[B, K]`` (-1: none) or a bool mask ``[B, P]``.
        kind: ``"l1"`` (default), ``"mse"``, ``"smooth_l1"`` (beta 1), averaged over the C values of
            a patch, or ``"cosine"``, 1 minus the cosine of prediction and target.
        patch_size: side of a patch in pixels; required for an image, which it must divide.
        norm_pix: normalise each target patch by its mean and unbiased variance (eps 1e-6), as MAE
            does. Default False.
        reduction: ``"mean"`` over masked patches (default), ``"sum"`` over them, or ``"none"``.

    Returns:
        Tensor: the loss, float32 (float64 where an input is): one value, or the shape of
        `ids_or_mask` with 0 where there is no masked patch. Over no patches it is 0 with zero
        gradients. Gradients flow to `pred` and `target`. Patches that are not masked may hold NaN.

    Raises:
        TypeError: types do not fit.
        ValueError: shapes, devices or options do not fit, or (on the CPU) an id is out of range.

    Deterministic where no row repeats an id; no host sync on a GPU.

    Source: MAE `models_mae.py` `forward_loss` (``kind="mse", norm_pix=True``), SimMIM (l1).

    Example:
        >>> import torch, syncmask_kernels as smk
        >>> image = torch.ones(1, 3, 4, 4)  # 4 patches of 2 x 2 pixels
        >>> ids = torch.tensor([[1, 2]])
        >>> smk.masked_patch_loss(torch.zeros(1, 2, 12), image, ids, kind="mse", patch_size=2)
        tensor(1.)
    """
    _checks.floating("pred", pred, "[B, P, C]", "[B, K, C]")
    patches, values = _patch_grid(pred, target, patch_size)
    _checks.rank("ids_or_mask", ids_or_mask, "[B, K]", "[B, P]")
    _checks.dtype("ids_or_mask", ids_or_mask, torch.int64, torch.bool)
    _checks.same_device("ids_or_mask", ids_or_mask, "pred", pred)
    batch, chosen = ids_or_mask.shape
    if ids_or_mask.dtype == torch.bool:
        _checks.shape("ids_or_mask", ids_or_mask, "[B, P]", (pred.shape[0], patches))
    else:
        _host.ids_within("ids_or_mask", ids_or_mask, -1, patches, "P")
    gather_pred = pred.shape[1] != chosen
    _checks.shape(
        "pred", pred, "[B, P or K, C]", (batch, patches if gather_pred else chosen, values)
    )
    _checks.shape("target", target, "of the batch of pred", (batch, *target.shape[1:]))
    if values == 0 or (norm_pix and values == 1):
        raise ValueError(
            f"target must have patches of 1 value (2 with norm_pix) or more, got {values}"
        )
    _checks.choice("kind", kind, KINDS)
    _checks.choice("reduction", reduction, REDUCTIONS)
    loss = PatchLoss(kind, patch_size, norm_pix, gather_pred, reduction)
    given = pred, target, ids_or_mask
    run, run_backward = (
        backends.choose(op, pred, pred, target, loss)
        for op in ("masked_patch_loss", "masked_patch_loss_backward")
    )
    if wants_grad(target):
        run = eager.masked_patch_loss
    if wants_grad(pred) and run is not eager.masked_patch_loss:
        recorded: Tensor = _MaskedPatchLoss.apply(run, run_backward, loss, *given)
        return recorded
    result: Tensor = run(*given, loss)[0]
    return result
