"""Contrast with a queue of keys, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from syncmask_kernels.backends.eager.attention import product
from syncmask_kernels.backends.queue_losses_request import Keys

CPU_COLUMNS, COLUMNS = 4096, 16384  # keys at a time: what a CPU's cache holds; few launches


class Sums(NamedTuple):
    """Of the logits of rows [R] with a block of keys, in tiles of it."""

    top: Tensor  # [R, tiles], the maxima
    total: Tensor  # [R, tiles], the sums of the exponentials below them
    mixed: Tensor  # [B, tiles], the student's logits by the teacher's exponentials; 0 without one
    positive: Tensor  # [B, tiles], the sums of the student's logits of positives
    positive_count: Tensor  # [B, tiles], their numbers


class Passes(NamedTuple):
    """What is done to a block of logits between the products, in its place.

    The student's are its first B rows, the teacher's the others, if any. Positives are the keys of
    the row's own id in `ids` [C]; without `ids` there are none.

    `exponentials_(logits [R, C], own_ids [B], ids)` leaves exponentials below the maxima.
    `slopes_(weights [R, C], scales [R, tiles], own_ids [B], ids, share [B])` puts into the first
    B rows the scaled rows of student and teacher, added up, less the share at each positive.
    `room(like, size)` is memory for all blocks, uninitialised.
    """

    exponentials_: Callable[[Tensor, Tensor, Tensor | None], Sums]
    slopes_: Callable[[Tensor, Tensor, Tensor, Tensor | None, Tensor], None]
    room: Callable[[Tensor, int], Tensor]


def _exponentials_(logits: Tensor, own_ids: Tensor, ids: Tensor | None) -> Sums:
    batch = own_ids.shape[0]
    student, teacher = logits[:batch], logits[batch:]
    mixed = positive = count = logits.new_zeros((batch, 1))
    if ids is not None:
        same = own_ids.unsqueeze(1) == ids
        positive = student.where(same, 0.0).sum(dim=1, keepdim=True)
        count = same.sum(dim=1, keepdim=True).to(logits.dtype)
    top = logits.amax(dim=1, keepdim=True)
    if logits.shape[0] > batch:
        mixed = (teacher.sub_(top[batch:]).exp_() * student).sum(dim=1, keepdim=True)
    student.sub_(top[:batch]).exp_()
    return Sums(top, logits.sum(dim=1, keepdim=True), mixed, positive, count)


def _slopes_(
    weights: Tensor, scales: Tensor, own_ids: Tensor, ids: Tensor | None, share: Tensor
) -> None:
    batch = own_ids.shape[0]
    slopes = weights[:batch].mul_(scales[:batch])
    if weights.shape[0] > batch:
        slopes.addcmul_(weights[batch:], scales[batch:])
    if ids is not None:
        slopes.sub_((own_ids.unsqueeze(1) == ids) * share.unsqueeze(1))


PLAIN_PASSES = Passes(_exponentials_, _slopes_, Tensor.new_empty)


def _blocks(keys: Keys) -> Iterator[tuple[Tensor, Tensor | None]]:
    """All keys as columns [D, C], the batch's own first, and their ids, unless none is positive."""
    yield keys.batch.T, keys.batch_ids
    size = CPU_COLUMNS if keys.queue.device.type == "cpu" else COLUMNS
    for start in range(0, keys.queue.shape[1], size):
        part = slice(start, start + size)
        ids = None if keys.queue_ids is None else keys.queue_ids[part]
        yield keys.queue[:, part], ids


def queue_contrastive_loss(
    queries: Tensor,
    teacher: Tensor | None,
    keys: Keys,
    alpha: float | Tensor,
    wanted: bool,
    passes: Passes = PLAIN_PASSES,
) -> tuple[Tensor, Tensor | None]:
    """queries and teacher [B, D] -> row losses [B] and, where it is wanted, their gradient [B, D].

    A block of keys stays in the cache while its logits become exponentials; once the softmax of
    whole rows is known, one product with the student's less the targets is the gradient.
    """
    batch, own_ids = queries.shape[0], keys.batch_ids
    rows = queries if teacher is None else torch.cat((queries, teacher))
    sizes = [len(rows) * block.shape[1] for block, _ in _blocks(keys)]
    room = passes.room(rows, sum(sizes))
    weights = [part.view(len(rows), -1) for part in room.split(sizes)]
    sums = []
    for (block, ids), logits in zip(_blocks(keys), weights, strict=True):
        torch.mm(rows, block.to(rows.dtype), out=logits)  # which autocast leaves alone
        sums.append(passes.exponentials_(logits, own_ids, ids))
    of_all = Sums(*(torch.cat(parts, dim=1) for parts in zip(*sums, strict=True)))
    peak = of_all.top.amax(dim=1, keepdim=True)
    scales = (of_all.top - peak).exp()
    total = (scales * of_all.total).sum(dim=1, keepdim=True)
    scales /= total
    share = (1.0 if teacher is None else 1 - alpha) / of_all.positive_count.sum(dim=1)
    target = share * of_all.positive.sum(dim=1)
    if teacher is not None:
        scales[batch:] *= alpha
        target += (scales[batch:] * of_all.mixed).sum(dim=1)
        scales[batch:].neg_()
    losses = (peak + total.log())[:batch].squeeze(1) - target
    if not wanted:
        return losses, None
    slope = torch.zeros_like(queries)
    parts = scales.split([x.top.shape[1] for x in sums], dim=1)
    for (block, ids), part, scale in zip(_blocks(keys), weights, parts, strict=True):
        passes.slopes_(part, scale, own_ids, ids, share)
        slope += product(part[:batch], block.T.to(part.dtype))
    return losses, slope


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
