"""Contrast with a queue of keys, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

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


def queue_contrastive_loss(
    queries: Tensor, teacher: Tensor | None, keys: Keys, alpha: float | Tensor
) -> tuple[Tensor, Tensor]:
    """queries and teacher [B, D] -> row losses [B] and their gradient [B, D].

    As logits are linear in the query, targets enter by their mean key alone, and the gradient is
    the mean key of the student's softmax less theirs.
    """
    batch = queries.shape[0]
    rows = queries if teacher is None else torch.cat((queries, teacher))
    log_sums, means, target = _attend(rows, keys)
    if teacher is not None:
        target = (1 - alpha) * target + alpha * means[batch:]
    return log_sums[:batch] - (queries * target).sum(dim=1), means[:batch] - target


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
