"""Plain PyTorch: serves every operator on every device, traceable by torch.compile."""

from __future__ import annotations

from syncmask_kernels.backends.eager import (
    attention,
    grouping,
    losses,
    masking,
    momentum,
    negatives,
    patch_losses,
    queue_losses,
    selection,
)
from syncmask_kernels.backends.kernel import Kernel

KERNELS = {
    "head_average": Kernel(attention.head_average),
    "attention_map": Kernel(attention.attention_map),
    "attention_with_map": Kernel(attention.attention_with_map),
    "topk_mask": Kernel(selection.topk_mask),
    "sync_topk_mask": Kernel(selection.sync_topk_mask),
    "sync_scores_qk": Kernel(selection.sync_scores_qk),
    "max_similarity": Kernel(selection.max_similarity),
    "token_valid": Kernel(masking.token_valid),
    "mask_tokens": Kernel(masking.mask_tokens),
    "mask_patches": Kernel(masking.mask_patches),
    "masked_sum": Kernel(masking.masked_sum),
    "gather_masked": Kernel(masking.gather_masked),
    "scatter_masked": Kernel(masking.scatter_masked),
    "masked_linear_cross_entropy": Kernel(losses.masked_linear_cross_entropy),
    "masked_patch_loss": Kernel(patch_losses.masked_patch_loss),
    "masked_patch_loss_backward": Kernel(patch_losses.masked_patch_loss_backward),
    "queue_contrastive_loss": Kernel(queue_losses.queue_contrastive_loss),
    "enqueue_": Kernel(queue_losses.enqueue_),
    "sample_negatives": Kernel(negatives.sample_negatives),
    "grouped_order": Kernel(grouping.grouped_order),
    "ema_update_": Kernel(momentum.ema_update_),
}


def unavailable(device_type: str) -> str | None:
    return None


def state() -> str:
    return "ready (plain PyTorch)"
