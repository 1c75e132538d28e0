"""What the public patch loss hands to a backend, validated."""

from __future__ import annotations

from typing import NamedTuple

KINDS = ("l1", "mse", "smooth_l1", "cosine")


class PatchLoss(NamedTuple):
    """What is computed; see `masked_patch_loss`."""

    kind: str
    patch_size: int | None  # None where the target is no image
    norm_pix: bool
    gather_pred: bool  # pred [B, P, C] awaits its ids; else it is beside them
    reduction: str
