"""CUDA C++ for CUDA tensors, built where there is nvcc (`csrc/cuda`)."""

from __future__ import annotations

import torch

from syncmask_kernels.backends import native
from syncmask_kernels.backends.kernel import Kernel, refuses_float64

KERNELS: dict[str, Kernel] = {}
_missing, _state = native.load("cuda")
if _missing is None:
    from syncmask_kernels.backends.cuda import grouping, selection

    KERNELS["topk_mask"] = Kernel(selection.topk_mask, refuses_float64)
    KERNELS["grouped_order"] = Kernel(grouping.grouped_order, refuses_float64)
    KERNELS["sync_topk_mask"] = Kernel(selection.sync_topk_mask, selection.refuses_sync_topk_mask)


def unavailable(device_type: str) -> str | None:
    if device_type != "cuda":
        return f"it serves CUDA tensors, not {device_type}"
    return _missing


def state() -> str:
    if _missing is None and not torch.cuda.is_available():
        return "no CUDA device"
    return _state
