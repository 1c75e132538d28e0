"""Contrast with a queue of keys, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from syncmask_kernels.backends.eager.attention import product
from syncmask_kernels.backends.queue_losses_request import Keys

CPU_COLUMNS, COLUMNS = 8192, 16384  # keys at a time: what a CPU's cache holds; few launches


def _blocks(keys: Keys) -> Iterator[tuple[Tensor, Tensor | None]]:
    """All keys as columns [D, C], the batch's own first, and which are positives [B, C], if any."""
    own = keys.batch_ids.unsqueeze(1)
    yield keys.batch.T, own == keys.batch_ids
    size = CPU_COLUMNS if keys.queue.device.type == "cpu" else COLUMNS
    for start in range(0, keys.queue.shape[1], size):
        part = slice(start, start + size)
        same = None if keys.queue_ids is None else own == keys.queue_ids[part]
        yield keys.queue[:, part].to(keys.batch.dtype), same


class _Part(NamedTuple):
    """The logits of rows [R, D] with a block of keys, as exponentials below their maximum."""

    weights: Tensor  # [R, C]
    top: Tensor  # [R]
    total: Tensor  # [R]
    mixed: Tensor  # [B], the student's logits by the teacher's weights; 0 without a teacher


def _part(logits: Tensor, batch: int) -> _Part:
    """The part of logits [R, C], in their place; the student's are the first `batch` rows."""
    top = logits.amax(dim=1, keepdim=True)
    student, teacher = logits[:batch], logits[batch:]
    mixed = logits.new_zeros((batch,))
    if logits.shape[0] > batch:
        mixed = (teacher.sub_(top[batch:]).exp_() * student).sum(dim=1)
    student.sub_(top[:batch]).exp_()
    return _Part(logits, top.squeeze(1), logits.sum(dim=1), mixed)


def queue_contrastive_loss(
    queries: Tensor, teacher: Tensor | None, keys: Keys, alpha: float | Tensor
) -> tuple[Tensor, Tensor]:
    """queries and teacher [B, D] -> row losses [B] and their gradient [B, D].

    A block of keys stays in the cache while its logits become exponentials; once the softmax of
    whole rows is known, one product with the student's less the targets is the gradient.
    """
    batch = queries.shape[0]
    rows = queries if teacher is None else torch.cat((queries, teacher))
    share = 1.0 if teacher is None else 1 - alpha  # of the positives
    count, positive = queries.new_zeros((batch, 1)), queries.new_zeros((batch,))
    parts = []
    for block, same in _blocks(keys):
        logits = product(rows, block)
        if same is not None:
            count = count + same.sum(dim=1, keepdim=True)
            positive = positive + logits[:batch].where(same, 0.0).sum(dim=1)
        parts.append(_part(logits, batch))
    tops, totals, mixed = (torch.stack(of, dim=1) for of in list(zip(*parts, strict=True))[1:])
    peak = tops.amax(dim=1, keepdim=True)
    scales = (tops - peak).exp()
    total = (scales * totals).sum(dim=1, keepdim=True)
    scales = scales / total
    target = share * positive / count.squeeze(1)
    if teacher is not None:
        target = target + alpha * (scales[batch:] * mixed).sum(dim=1)
    slope = torch.zeros_like(queries)
    for (block, same), part, scale in zip(
        _blocks(keys), parts, scales.split(1, dim=1), strict=True
    ):
        weights = part.weights[:batch].mul_(scale[:batch])
        if teacher is not None:
            weights.addcmul_(part.weights[batch:], -alpha * scale[batch:])
        if same is not None:
            weights.sub_(same * (share / count))
        slope = slope + product(weights, block.T)
    return (peak + total.log())[:batch].squeeze(1) - target, slope


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
