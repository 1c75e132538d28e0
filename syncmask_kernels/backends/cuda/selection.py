"""Calls of the CUDA selection kernels (`csrc/cuda/selection.cu`)."""

from __future__ import annotations

from syncmask_kernels.backends import native_selection
from syncmask_kernels.backends.request import SyncRequest

MAX_SHARED_WORDS = 256  # a block holds all words where scores are normalised over them

_selection = native_selection.NativeSelection("cuda")
topk_mask = _selection.topk_mask
sync_topk_mask = _selection.sync_topk_mask


def refuses_sync_topk_mask(request: SyncRequest) -> str | None:
    scoring, words = request.scoring, request.scoring.attn.shape[3]
    shared = scoring.token_score != "max" and request.token_scores is None
    if shared and words > MAX_SHARED_WORDS:
        return (
            f"token_score={scoring.token_score!r} over {words} words (at most {MAX_SHARED_WORDS})"
        )
    return native_selection.refuses_sync_topk_mask(request)
