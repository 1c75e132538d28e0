"""Choosing positions: exact top-k, and the patches and words that image and text share."""

from syncmask_kernels.selection.similarity import max_similarity
from syncmask_kernels.selection.sync import SyncMask, sync_topk_mask, sync_topk_mask_qk
from syncmask_kernels.selection.topk import (
    AttentiveMask,
    Complement,
    TopK,
    attentive_mask,
    complement,
    topk_mask,
    vote_keywords,
)

__all__ = [
    "AttentiveMask",
    "Complement",
    "SyncMask",
    "TopK",
    "attentive_mask",
    "complement",
    "max_similarity",
    "sync_topk_mask",
    "sync_topk_mask_qk",
    "topk_mask",
    "vote_keywords",
]
