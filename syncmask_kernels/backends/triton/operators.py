"""All operators that Triton serves."""

from syncmask_kernels.backends.triton.attention import (
    attention_map,
    attention_with_map,
    head_average,
)
from syncmask_kernels.backends.triton.losses import masked_linear_cross_entropy
from syncmask_kernels.backends.triton.masking import (
    gather_masked,
    mask_patches,
    masked_sum,
    scatter_masked,
)
from syncmask_kernels.backends.triton.negatives import sample_negatives
from syncmask_kernels.backends.triton.patch_losses import (
    masked_patch_loss,
    masked_patch_loss_backward,
)
from syncmask_kernels.backends.triton.queue_losses import queue_contrastive_loss
from syncmask_kernels.backends.triton.scores import max_similarity, sync_scores_qk
from syncmask_kernels.backends.triton.selection import sync_topk_mask, topk_mask

__all__ = [
    "attention_map",
    "attention_with_map",
    "gather_masked",
    "head_average",
    "mask_patches",
    "masked_linear_cross_entropy",
    "masked_patch_loss",
    "masked_patch_loss_backward",
    "masked_sum",
    "max_similarity",
    "queue_contrastive_loss",
    "sample_negatives",
    "scatter_masked",
    "sync_scores_qk",
    "sync_topk_mask",
    "topk_mask",
]
