"""Schemas and fakes of the contrast with a queue."""

from __future__ import annotations

from typing import Any

from torch import Tensor

SCHEMAS = {
    "queue_contrastive_loss": (
        "(Tensor queries, Tensor? teacher, Tensor own_keys, Tensor queue, Tensor own_ids,"
        " Tensor? queue_ids, float alpha, Tensor? alpha_at, bool wanted)"
        " -> (Tensor losses, Tensor slope)"
    ),
    "queue_contrast_room": "(Tensor like, int size) -> Tensor",
    "queue_contrast_exponentials_": (
        "(Tensor(a!) logits, Tensor own_ids, Tensor? ids)"
        " -> (Tensor top, Tensor total, Tensor mixed, Tensor positive, Tensor count)"
    ),
    "queue_contrast_slopes_": (
        "(Tensor(a!) weights, Tensor scales, Tensor own_ids, Tensor? ids, Tensor share) -> ()"
    ),
}
TILE_KEYS = 1024  # as in csrc/include/syncmask/queue_losses.h


def _fake_queue_contrastive_loss(queries: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    batch, dim = queries.shape
    wanted = rest[-1]
    return queries.new_empty((batch,)), queries.new_empty((batch if wanted else 0, dim))


def _fake_room(like: Tensor, size: int) -> Tensor:
    return like.new_empty(size)


def _fake_exponentials(logits: Tensor, own_ids: Tensor, ids: Tensor | None) -> tuple[Tensor, ...]:
    tiles = (logits.shape[1] + TILE_KEYS - 1) // TILE_KEYS
    rows, batch = logits.shape[0], own_ids.shape[0]
    return tuple(logits.new_empty((n, tiles)) for n in (rows, rows, batch, batch, batch))


def _fake_slopes(*call: Tensor | None) -> None:
    """It writes what it is given."""


FAKES = {
    "queue_contrastive_loss": _fake_queue_contrastive_loss,
    "queue_contrast_room": _fake_room,
    "queue_contrast_exponentials_": _fake_exponentials,
    "queue_contrast_slopes_": _fake_slopes,
}
