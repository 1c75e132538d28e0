"""The softmax of linear cross entropy where logits [V, K] are made a block of words at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class LogSum(NamedTuple):
    """The log of the sum of exponentials of each column of logits [V, K], in two parts.

    Added up they would round away digits of small differences.
    """

    top: Tensor  # [K], the maxima
    log_total: Tensor  # [K], the logs of the sums below these


class SoftBlock(NamedTuple):
    """Probabilities of a teacher for a block of words, or logits with what makes them such."""

    values: Tensor  # [words, K]
    sums: LogSum | None


class Shares(NamedTuple):
    """The slope by a logit: mass * softmax - even - alpha * soft, - hard at the label."""

    mass: Tensor  # [K]
    hard: float
    even: float
    alpha: float


class Softmax(NamedTuple):
    """What is done to a block of logits [words, K] between the matrix products.

    `add_block` adds the bias in place and takes the block into the running maxima and sums of
    exponentials below them. `slopes` gives the slopes, and the part of the loss that the labels
    (counted from the first word of the block) do not make.
    """

    add_block: Callable[[Tensor, Tensor | None, Tensor, Tensor], None]
    slopes: Callable[[Tensor, LogSum, Tensor, Shares, SoftBlock | None], tuple[Tensor, Tensor]]


def _add_block(logits: Tensor, bias: Tensor | None, top: Tensor, total: Tensor) -> None:
    if bias is not None:
        logits += bias.unsqueeze(1)
    before = top.clone()
    torch.maximum(before, logits.amax(dim=0), out=top)
    total.mul_((before - top).exp_()).add_((logits - top).exp_().sum(dim=0))


def _log_p(logits: Tensor, sums: LogSum) -> Tensor:
    return (logits - sums.top).sub_(sums.log_total)


def _slopes(
    logits: Tensor, sums: LogSum, labels: Tensor, shares: Shares, soft: SoftBlock | None
) -> tuple[Tensor, Tensor]:
    log_p = _log_p(logits, sums)
    loss = log_p.new_zeros(())
    if shares.even > 0:
        loss -= shares.even * log_p.sum()
    chosen = None
    if soft is not None:
        chosen = soft.values if soft.sums is None else _log_p(soft.values, soft.sums).exp_()
        chosen = shares.alpha * chosen
        loss -= (chosen * log_p).sum()
    slopes = log_p.exp_().mul_(shares.mass)
    if shares.even > 0:
        slopes -= shares.even
    if chosen is not None:
        slopes -= chosen
    inside = (labels >= 0) & (labels < slopes.shape[0])
    hard = (inside.to(slopes.dtype) * -shares.hard).unsqueeze(0)
    slopes.scatter_add_(0, labels.clamp(0, slopes.shape[0] - 1).unsqueeze(0), hard)
    return slopes, loss


PLAIN_SOFTMAX = Softmax(_add_block, _slopes)
