"""Contrast with a queue of keys, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from syncmask_kernels.backends.eager.attention import product
from syncmask_kernels.backends.queue_losses_request import Keys

CPU_COLUMNS, COLUMNS = 4096, 16384  # keys at a time: what a CPU's cache holds; few launches


def _blocks(keys: Keys) -> Iterator[tuple[Tensor, Tensor | None]]:
    """All keys as columns [D, C], the batch's own first, and which are positives [B, C], if any."""
    own = keys.batch_ids.unsqueeze(1)
    yield keys.batch.T, own == keys.batch_ids
    size = CPU_COLUMNS if keys.queue.device.type == "cpu" else COLUMNS
    for start in range(0, keys.queue.shape[1], size):
        part = slice(start, start + size)
        same = None if keys.queue_ids is None else own == keys.queue_ids[part]
        yield keys.queue[:, part].to(keys.batch.dtype), same


def _attend(rows: Tensor, keys: Keys) -> tuple[Tensor, Tensor, Tensor]:
    """Of the logits of rows [R, D] with all keys, the log-sum-exp [R] and the mean key [R, D] by
    their softmax; and the mean key of the positives [B, D].
    """
    peak = rows.new_full((rows.shape[0], 1), float("-inf"))
    total, mean = torch.zeros_like(peak), torch.zeros_like(rows)
    positive, count = torch.zeros_like(keys.batch), keys.batch.new_zeros((len(keys.batch), 1))
    for block, same in _blocks(keys):
        logits = product(rows, block)
        higher = torch.maximum(peak, logits.amax(dim=1, keepdim=True))
        weights, fade = logits.sub_(higher).exp_(), (peak - higher).exp()
        total = total * fade + weights.sum(dim=1, keepdim=True)
        mean = mean * fade + product(weights, block.T)
        if same is not None:
            positive = positive + product(same.to(block.dtype), block.T)
            count = count + same.sum(dim=1, keepdim=True)
        peak = higher
    return (peak + total.log()).squeeze(1), mean / total, positive / count


class _Contrast(torch.autograd.Function):
    """Row losses [B] of queries [B, D]: cross entropy with the positives and the teacher's softmax.

    As logits are linear in the query, targets enter by their mean key alone, and the gradient is
    the mean key of the student's softmax less theirs. That is formed in the forward pass, in which
    the key block is at hand; the backward pass reads no keys, so the queue may change before it.
    """

    @staticmethod
    def forward(
        ctx: Any, queries: Tensor, teacher: Tensor | None, alpha: float | Tensor, keys: Keys
    ) -> Tensor:
        batch = queries.shape[0]
        rows = queries if teacher is None else torch.cat((queries, teacher))
        log_sums, means, target = _attend(rows, keys)
        if teacher is not None:
            target = (1 - alpha) * target + alpha * means[batch:]
        ctx.save_for_backward(means[:batch] - target)
        return log_sums[:batch] - (queries * target).sum(dim=1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (slope,) = ctx.saved_tensors
        return grad.unsqueeze(1) * slope, None, None, None


def queue_contrastive_loss(
    features: tuple[Tensor, Tensor],
    teachers: tuple[Tensor, Tensor],
    keys: tuple[Keys, Keys],
    temperature: float | Tensor,
    alpha: float | Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Both directions: features [B, D] of a side against the keys of the other side."""
    total, sims = features[0].new_zeros((), dtype=keys[0].batch.dtype), []
    for feature, teacher, others in zip(features, teachers, keys, strict=True):
        wide = others.batch.dtype
        if isinstance(temperature, Tensor):
            temperature = temperature.to(wide)
        queries = feature.to(wide) / temperature
        sims.append(product(queries, others.batch.T))
        if feature.shape[0] == 0:
            total = total + queries.sum()
            continue
        distilled = isinstance(alpha, Tensor) or alpha > 0
        with torch.no_grad():
            soft = teacher.to(wide) / temperature if distilled else None
        total = total + _Contrast.apply(queries, soft, alpha, others).mean() / 2
    return total, sims[0], sims[1]


@torch.no_grad()
def enqueue_(
    queue: Tensor, pointer: Tensor, keys: Tensor, ids: Tensor | None, queue_ids: Tensor | None
) -> None:
    """keys [B, D] into the columns of queue [D, Q] from `pointer` on, around its end."""
    size, count = queue.shape[1], keys.shape[0]
    kept = min(size, count)
    order = torch.arange(count - kept, count, device=queue.device)
    columns = (pointer + order) % size
    queue.scatter_(1, columns.expand(queue.shape[0], kept), keys[count - kept :].T.to(queue.dtype))
    if ids is not None and queue_ids is not None:
        queue_ids.scatter_(0, columns, ids[count - kept :])
    pointer.copy_((pointer + count) % size)
