"""Losses over masked positions, one row after the other.

Everything is computed in the type of the input: give float64 for the truth.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _reduced(losses: list[Tensor], zero: Tensor, reduction: str) -> Tensor:
    """The sum or the mean of the losses, 0 over none."""
    total = sum(losses, start=zero)
    return total / max(len(losses), 1) if reduction == "mean" else total


def masked_linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    ids: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    soft_labels: Tensor | None = None,
    teacher: tuple[Tensor, Tensor, Tensor | None] | None = None,
    alpha: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """hidden [B, T, D], weight [V, D], labels [B, T] -> the loss; `ids` [B, K] as positions."""
    zero = (hidden[:0].sum() + weight[:0].sum()).to(hidden.dtype)
    out = zero.expand(labels.shape).clone()
    losses = []
    for b, t in (labels != ignore_index).nonzero().tolist():
        if ids is not None and t not in ids[b].tolist():
            continue
        log_p = _log_softmax(hidden[b, t], weight, bias)
        label = int(labels[b, t])
        loss = -(1 - label_smoothing) * log_p[label] - label_smoothing * log_p.mean()
        if soft_labels is not None:
            loss = (1 - alpha) * loss - alpha * (soft_labels[b, t] * log_p).sum()
        if teacher is not None:
            hidden_t, weight_t, bias_t = teacher
            p_t = _log_softmax(hidden_t[b, t], weight_t, bias_t).exp().detach()
            loss = (1 - alpha) * loss - alpha * (p_t * log_p).sum()
        out[b, t] = loss
        losses.append(loss)
    return out if reduction == "none" else _reduced(losses, zero, reduction)


def _log_softmax(row: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    logits = weight @ row if bias is None else weight @ row + bias
    return logits - logits.logsumexp(dim=0)


def patchify(image: Tensor, patch_size: int) -> Tensor:
    """image [B, channels, Hi, Wi] -> [B, P, C]; a patch is (row, column, channel), flattened."""
    _, _, height, width = image.shape
    patches = []
    for top in range(0, height, patch_size):
        for left in range(0, width, patch_size):
            patch = image[:, :, top : top + patch_size, left : left + patch_size]
            patches.append(patch.permute(0, 2, 3, 1).flatten(1))
    return torch.stack(patches, dim=1)


def masked_patch_loss(
    pred: Tensor,
    target: Tensor,
    mask: Tensor,
    *,
    kind: str = "l1",
    patch_size: int | None = None,
    norm_pix: bool = False,
    reduction: str = "mean",
) -> Tensor:
    """pred [B, P, C], target [B, P, C] or an image, mask [B, P] -> the loss."""
    patches = target if patch_size is None else patchify(target, patch_size)
    zero = pred[:0].sum()
    out = zero.expand(mask.shape).clone()
    losses = []
    for b, p in mask.nonzero().tolist():
        want = patches[b, p]
        if norm_pix:
            want = (want - want.mean()) / (want.var(unbiased=True) + 1e-6).sqrt()
        losses.append(_patch_loss(pred[b, p], want, kind))
        out[b, p] = losses[-1]
    return out if reduction == "none" else _reduced(losses, zero, reduction)


def _patch_loss(pred: Tensor, want: Tensor, kind: str) -> Tensor:
    error = pred - want
    if kind == "l1":
        return error.abs().mean()
    if kind == "mse":
        return (error**2).mean()
    if kind == "smooth_l1":
        small = error.abs() < 1
        return torch.where(small, error**2 / 2, error.abs() - 0.5).mean()
    return 1 - (pred @ want) / (pred.norm() * want.norm())
