"""What the public queue losses hand to a backend, validated."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Keys(NamedTuple):
    """The keys of one modality: the batch's own and those of earlier batches, constants."""

    batch: Tensor  # [B, D], in the type that is computed in
    queue: Tensor  # [D, Q]
    batch_ids: Tensor  # [B] int64; columns of equal ids are positives
    queue_ids: Tensor | None  # [Q] int64; None where the queue has no positives
