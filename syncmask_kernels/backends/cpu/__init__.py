"""C++ for CPU tensors, built where there is a compiler (`csrc/cpu`)."""

from __future__ import annotations

from syncmask_kernels.backends import native
from syncmask_kernels.backends.kernel import Kernel, refuses_float64

KERNELS: dict[str, Kernel] = {}
_missing, _state = native.load("cpu")
if _missing is None:
    from syncmask_kernels.backends.cpu import (
        attention,
        grouping,
        losses,
        masking,
        negatives,
        patch_losses,
        queue_losses,
        selection,
    )

    KERNELS["head_average"] = Kernel(attention.head_average, refuses_float64)
    KERNELS["attention_map"] = Kernel(attention.attention_map, refuses_float64)
    KERNELS["attention_with_map"] = Kernel(attention.attention_with_map, refuses_float64)
    KERNELS["topk_mask"] = Kernel(selection.topk_mask, refuses_float64)
    KERNELS["sync_topk_mask"] = Kernel(selection.sync_topk_mask, selection.refuses_sync_topk_mask)
    KERNELS["sync_scores_qk"] = Kernel(selection.sync_scores_qk, selection.refuses_sync_scores_qk)
    KERNELS["max_similarity"] = Kernel(selection.max_similarity, refuses_float64)
    KERNELS["sample_negatives"] = Kernel(negatives.sample_negatives, refuses_float64)
    KERNELS["grouped_order"] = Kernel(grouping.grouped_order, refuses_float64)
    KERNELS["mask_patches"] = Kernel(masking.mask_patches, masking.refuses_sum)
    KERNELS["masked_sum"] = Kernel(masking.masked_sum, masking.refuses_sum)
    KERNELS["gather_masked"] = Kernel(masking.gather_masked, masking.refuses_move)
    KERNELS["scatter_masked"] = Kernel(masking.scatter_masked, masking.refuses_sum)
    KERNELS["masked_linear_cross_entropy"] = Kernel(
        losses.masked_linear_cross_entropy, losses.refuses_linear_cross_entropy
    )
    KERNELS["queue_contrastive_loss"] = Kernel(
        queue_losses.queue_contrastive_loss, queue_losses.refuses_keys
    )
    for op in ("masked_patch_loss", "masked_patch_loss_backward"):
        KERNELS[op] = Kernel(getattr(patch_losses, op), refuses_float64)


def unavailable(device_type: str) -> str | None:
    if device_type != "cpu":
        return f"it serves CPU tensors, not {device_type}"
    return _missing


def state() -> str:
    return _state
