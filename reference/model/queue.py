"""The queue of teacher features that contrastive losses look back on."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import syncmask_kernels as smk


class FeatureQueue(nn.Module):
    """Columns of past keys, random until they are written, with the items they belong to."""

    images: Tensor
    texts: Tensor
    item_ids: Tensor
    pointer: Tensor

    def __init__(self, width: int, size: int) -> None:
        super().__init__()
        self.register_buffer("images", F.normalize(torch.randn(width, size), dim=0))
        self.register_buffer("texts", F.normalize(torch.randn(width, size), dim=0))
        self.register_buffer("item_ids", torch.full((size,), -1))
        self.register_buffer("pointer", torch.zeros(1, dtype=torch.int64))

    def enqueue_(self, images: Tensor, texts: Tensor, item_ids: Tensor) -> None:
        """Write keys ``[B, D]`` of both sides over the oldest ones."""
        if len(self.item_ids) > 0:
            smk.enqueue_(self.images, self.pointer.clone(), images)
            smk.enqueue_(self.texts, self.pointer, texts, item_ids, self.item_ids)
