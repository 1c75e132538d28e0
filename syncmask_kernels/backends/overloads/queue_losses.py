"""Schemas and fakes of the contrast with a queue."""

from __future__ import annotations

from typing import Any

from torch import Tensor

SCHEMAS = {
    "queue_contrastive_loss": (
        "(Tensor queries, Tensor? teacher, Tensor own_keys, Tensor queue, Tensor own_ids,"
        " Tensor? queue_ids, float alpha, Tensor? alpha_at) -> (Tensor losses, Tensor slope)"
    ),
}


def _fake_queue_contrastive_loss(queries: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return queries.new_empty((queries.shape[0],)), queries.new_empty(queries.shape)


FAKES = {"queue_contrastive_loss": _fake_queue_contrastive_loss}
