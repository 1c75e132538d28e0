"""All operators that Triton serves."""

from syncmask_kernels.backends.triton.attention import (
    attention_map,
    attention_with_map,
    head_average,
)
from syncmask_kernels.backends.triton.scores import max_similarity, sync_scores_qk
from syncmask_kernels.backends.triton.selection import sync_topk_mask, topk_mask

__all__ = [
    "attention_map",
    "attention_with_map",
    "head_average",
    "max_similarity",
    "sync_scores_qk",
    "sync_topk_mask",
    "topk_mask",
]
