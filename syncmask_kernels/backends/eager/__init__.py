"""Plain PyTorch: serves every operator on every device, traceable by torch.compile."""

from __future__ import annotations

from syncmask_kernels.backends.eager import attention, selection
from syncmask_kernels.backends.kernel import Kernel

KERNELS = {
    "head_average": Kernel(attention.head_average),
    "attention_map": Kernel(attention.attention_map),
    "topk_mask": Kernel(selection.topk_mask),
    "sync_topk_mask": Kernel(selection.sync_topk_mask),
}


def unavailable(device_type: str) -> str | None:
    return None


def state() -> str:
    return "ready (plain PyTorch)"
