"""Synchronized masking for vision-language pretraining, as fused PyTorch operators.

>>> import torch, syncmask_kernels as smk
>>> attn = torch.rand(2, 4, 6, 17).softmax(dim=-1)  # [batch, head, word, image CLS + 16 patches]
>>> smk.sync_topk_mask(attn, patch_ratio=0.25).patch_mask.sum(dim=1)
tensor([4, 4])
"""

from syncmask_kernels._version import __version__
from syncmask_kernels.attention import (
    AttentionWithMap,
    attention_map,
    attention_with_map,
    head_average,
)
from syncmask_kernels.backends import BackendError, build_info, use_backend
from syncmask_kernels.grouping import grouped_order
from syncmask_kernels.losses import masked_linear_cross_entropy
from syncmask_kernels.masking import (
    gather_masked,
    mask_patches,
    mask_tokens,
    scatter_masked,
    token_valid,
)
from syncmask_kernels.momentum import ema_update_
from syncmask_kernels.negatives import Negatives, gather_negatives, sample_negatives
from syncmask_kernels.patch_losses import masked_patch_loss
from syncmask_kernels.queue_losses import enqueue_, queue_contrastive_loss
from syncmask_kernels.sampler import GroupedBatchSampler
from syncmask_kernels.selection import (
    AttentiveMask,
    Complement,
    SyncMask,
    TopK,
    attentive_mask,
    complement,
    max_similarity,
    sync_topk_mask,
    sync_topk_mask_qk,
    topk_mask,
    vote_keywords,
)

__all__ = [
    "AttentionWithMap",
    "AttentiveMask",
    "BackendError",
    "Complement",
    "GroupedBatchSampler",
    "Negatives",
    "SyncMask",
    "TopK",
    "__version__",
    "attention_map",
    "attention_with_map",
    "attentive_mask",
    "build_info",
    "complement",
    "ema_update_",
    "enqueue_",
    "gather_masked",
    "gather_negatives",
    "grouped_order",
    "head_average",
    "mask_patches",
    "mask_tokens",
    "masked_linear_cross_entropy",
    "masked_patch_loss",
    "max_similarity",
    "queue_contrastive_loss",
    "sample_negatives",
    "scatter_masked",
    "sync_topk_mask",
    "sync_topk_mask_qk",
    "token_valid",
    "topk_mask",
    "use_backend",
    "vote_keywords",
]
