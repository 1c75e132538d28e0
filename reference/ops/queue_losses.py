"""Contrast with a queue, one row after the other, and a queue, one key after the other.

Everything is computed in the type of the input: give float64 for the truth.
"""

from __future__ import annotations

import torch
from torch import Tensor


def queue_contrastive_loss(
    image_feat: Tensor,
    text_feat: Tensor,
    image_key: Tensor,
    text_key: Tensor,
    image_queue: Tensor,
    text_queue: Tensor,
    temperature: Tensor,
    *,
    alpha: float = 0.0,
    item_ids: Tensor | None = None,
    queue_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """feat and key [B, D], queues [D, Q], B > 0 -> the loss, sim_i2t [B, B], sim_t2i [B, B]."""
    images = torch.cat([image_key.T, image_queue], dim=1)
    texts = torch.cat([text_key.T, text_queue], dim=1)
    batch, keys = image_feat.shape[0], images.shape[1]
    losses, sims = [], []
    for feat, key, others in ((image_feat, image_key, texts), (text_feat, text_key, images)):
        rows = []
        for b in range(batch):
            positive = _positives(b, batch, keys, item_ids, queue_ids)
            logits = feat[b] @ others / temperature
            soft = (key[b] @ others / temperature).softmax(dim=0).detach()
            target = alpha * soft
            target[positive] += (1 - alpha) / len(positive)
            losses.append(-(target * (logits - logits.logsumexp(dim=0))).sum())
            rows.append(logits[:batch])
        sims.append(torch.stack(rows))
    return torch.stack(losses).mean(), sims[0], sims[1]


def _positives(
    row: int, batch: int, keys: int, item_ids: Tensor | None, queue_ids: Tensor | None
) -> list[int]:
    """The columns of the keys of a row's item, of `batch` keys followed by the queue."""
    if item_ids is None:
        return [row]
    ids = item_ids.tolist() + ([] if queue_ids is None else queue_ids.tolist())
    return [column for column in range(min(len(ids), keys)) if ids[column] == item_ids[row]]


def enqueue(
    queue: Tensor, pointer: int, keys: Tensor, ids: list[int], queue_ids: list[int]
) -> tuple[Tensor, int, list[int]]:
    """queue [D, Q], keys [B, D] -> the next queue, pointer and ids of the queue."""
    queue, queue_ids = queue.clone(), list(queue_ids)
    for key, number in zip(keys, ids, strict=True):
        queue[:, pointer] = key
        queue_ids[pointer] = number
        pointer = (pointer + 1) % queue.shape[1]
    return queue, pointer, queue_ids
