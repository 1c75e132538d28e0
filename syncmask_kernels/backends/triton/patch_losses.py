"""Launches of the Triton kernels of patch losses, and the operators made of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from syncmask_kernels.backends import patch_losses_calls
from syncmask_kernels.backends.loss_request import REDUCTIONS
from syncmask_kernels.backends.patch_losses_request import KINDS
from syncmask_kernels.backends.triton import INTERPRETED
from syncmask_kernels.backends.triton.launch import Launch, block, run, strides, warps
from syncmask_kernels.backends.triton.patch_losses_kernels import (
    patch_gradient_kernel,
    patch_loss_kernel,
    reduce_losses_kernel,
)

REDUCED = 1024  # entries or ids that a program goes through at a time


def _pair_args(
    pred: Tensor,
    target: Tensor,
    chosen: Tensor,
    kind: int,
    patch_size: int | None,
    norm_pix: bool,
    gather_pred: bool,
) -> dict[str, Any]:
    """What the kernels are told that read a prediction and its target."""
    values = pred.shape[2]
    if patch_size is None:
        batch, patch, channel = target.stride()
        image = {"across": 1, "SIDE": 1, "CHANNELS": values}
        image |= {"target_b": batch, "target_c": channel, "target_h": patch, "target_w": 0}
    else:
        image = {"across": target.shape[3] // patch_size, "SIDE": patch_size}
        image |= {"CHANNELS": target.shape[1]} | strides("target", "bchw", target)
    return {
        "pred": pred,
        "target": target,
        "ids_or_mask": chosen,
        "width": chosen.shape[1],
        "C": values,
        "KIND": KINDS[kind],
        "NORM_PIX": norm_pix,
        "BY_MASK": chosen.dtype == torch.bool,
        "GATHER_PRED": gather_pred,
        "BLOCK": block(values),
    } | (image | strides("pred", "bpc", pred))


def loss_launches(
    pred: Tensor, target: Tensor, ids_or_mask: Tensor, *loss: Any
) -> tuple[tuple[Tensor, Tensor], list[Launch]]:
    """The outputs of `masked_patch_loss`, not yet written, and the launches that write them."""
    *options, reduction = loss
    chosen, entries = ids_or_mask.contiguous(), ids_or_mask.numel()
    losses = torch.empty(chosen.shape, device=pred.device)
    args = _pair_args(pred, target, chosen, *options) | {"losses": losses}
    launches = []
    if entries > 0:
        launches.append(Launch(patch_loss_kernel, (entries,), args, warps(args["BLOCK"], 8)))
    if REDUCTIONS[reduction] == "none":
        return (losses, torch.ones((), device=pred.device)), launches
    total, divisor = torch.empty((), device=pred.device), torch.empty((), device=pred.device)
    reduce = {
        "losses": losses,
        "ids_or_mask": chosen,
        "loss": total,
        "divisor": divisor,
        "entries": entries,
        "BY_MASK": args["BY_MASK"],
        "MEAN": REDUCTIONS[reduction] == "mean",
        "BLOCK": REDUCED,
    }
    launches.append(Launch(reduce_losses_kernel, (1,), reduce, warps(REDUCED, 4)))
    return (total, divisor), launches


def gradient_launches(
    grad: Tensor, divisor: Tensor, pred: Tensor, target: Tensor, ids_or_mask: Tensor, *options: Any
) -> tuple[Tensor, list[Launch]]:
    """The gradient of `pred`, not yet written, and the launch that writes it."""
    batch, rows, _ = pred.shape
    chosen = ids_or_mask.contiguous()
    grad_pred = torch.empty(pred.shape, dtype=pred.dtype, device=pred.device)
    args = _pair_args(pred, target, chosen, *options)
    args |= {
        "grad": grad.contiguous(),
        "divisor": divisor,
        "grad_pred": grad_pred,
        "rows": rows,
        "EACH": grad.dim() > 0,
        "CHUNK": min(block(chosen.shape[1]), REDUCED),
    }
    launch = Launch(patch_gradient_kernel, (batch * rows,), args, warps(args["BLOCK"], 8))
    return grad_pred, [launch] if batch * rows > 0 else []


masked_patch_loss, masked_patch_loss_backward = patch_losses_calls.define("triton")


def _run_loss(pred: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    outputs, launches = loss_launches(pred, *rest)
    run(launches, pred)
    return outputs


def _run_backward(grad: Tensor, divisor: Tensor, pred: Tensor, *rest: Any) -> Tensor:
    grad_pred, launches = gradient_launches(grad, divisor, pred, *rest)
    run(launches, pred)
    return grad_pred


for _device in ("cpu", "cuda") if INTERPRETED else ("cuda",):
    torch.library.impl("syncmask::masked_patch_loss.triton", _device, _run_loss)
    torch.library.impl("syncmask::masked_patch_loss_backward.triton", _device, _run_backward)
