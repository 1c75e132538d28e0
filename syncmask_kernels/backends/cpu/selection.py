"""Calls of the C++ selection kernels (`csrc/cpu/selection.cpp`)."""

from __future__ import annotations

import torch
from torch import Tensor

from syncmask_kernels.backends import overloads
from syncmask_kernels.backends.request import Count, Selection, SyncRequest

_topk_mask = overloads.define("topk_mask", "cpu")
_sync_topk_mask = overloads.define("sync_topk_mask", "cpu")


def refuses_topk_mask(scores: Tensor) -> str | None:
    return "float64 is served by eager only" if scores.dtype == torch.float64 else None


def topk_mask(
    scores: Tensor, valid: Tensor | None, count: Count, largest: bool
) -> tuple[Tensor, Tensor]:
    return _topk_mask(scores, valid, *count, largest)


def refuses_sync_topk_mask(request: SyncRequest) -> str | None:
    floats = (request.scoring.attn, request.scoring.lse, *request[3:7])
    if any(t is not None and t.dtype == torch.float64 for t in floats):
        return "float64 is served by eager only"
    return None


def sync_topk_mask(request: SyncRequest) -> Selection:
    return Selection(*_sync_topk_mask(*overloads.sync_arguments(request)))
