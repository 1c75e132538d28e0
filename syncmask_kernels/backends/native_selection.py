"""Calls of the selection kernels of a native library (`csrc/<backend>/selection.*`)."""

from __future__ import annotations

from torch import Tensor

from syncmask_kernels.backends import overloads
from syncmask_kernels.backends.kernel import refuses_float64
from syncmask_kernels.backends.request import Count, Selection, SyncRequest


class NativeSelection:
    """The functions of a backend's table, served by the overloads of its name."""

    def __init__(self, backend: str) -> None:
        self._topk_mask = overloads.define("topk_mask", backend)
        self._sync_topk_mask = overloads.define("sync_topk_mask", backend)

    def topk_mask(
        self, scores: Tensor, valid: Tensor | None, count: Count, largest: bool
    ) -> tuple[Tensor, Tensor]:
        return self._topk_mask(scores, valid, *count, largest)

    def sync_topk_mask(self, request: SyncRequest) -> Selection:
        return Selection(*self._sync_topk_mask(*overloads.selection.sync_arguments(request)))


def refuses_sync_topk_mask(request: SyncRequest) -> str | None:
    floats = (request.scoring.attn, request.patch_scores, request.token_scores)
    return refuses_float64(*floats)
