"""Triton: one source for every CUDA device, compiled on first use.

Importing this package imports neither Triton nor a driver; the first operator it serves does. CPU
tensors are served only in Triton's interpreter, for tests.
"""

from __future__ import annotations

import os
from importlib.util import find_spec

import torch
from torch import Tensor

from syncmask_kernels.backends.kernel import Kernel
from syncmask_kernels.backends.request import Count, Selection, SyncRequest

MAX_POSITIONS = 8192  # a row of keys is held by one program
MAX_SHARED_WORDS = 512  # likewise the words, for the rules that normalise over them
INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")
_INSTALLED = find_spec("triton") is not None


def _topk_mask(
    scores: Tensor, valid: Tensor | None, count: Count, largest: bool
) -> tuple[Tensor, Tensor]:
    from syncmask_kernels.backends.triton import selection

    return selection.topk_mask(scores, valid, count, largest)


def _sync_topk_mask(request: SyncRequest) -> Selection:
    from syncmask_kernels.backends.triton import selection

    return selection.sync_topk_mask(request)


def _refuses_topk_mask(scores: Tensor) -> str | None:
    if scores.dtype == torch.float64:
        return "float64 scores (it computes in float32)"
    if scores.shape[-1] > MAX_POSITIONS:
        return f"rows of {scores.shape[-1]} positions (at most {MAX_POSITIONS})"
    return None


def _refuses_sync_topk_mask(request: SyncRequest) -> str | None:
    scoring = request.scoring
    for given in (scoring.attn, request.patch_scores, request.token_scores):
        if given is not None and given.dtype == torch.float64:
            return "float64 attention or scores (it computes in float32)"
    tokens, patches = scoring.attn.shape[3], scoring.attn.shape[4] - scoring.skip_keys
    if max(tokens, patches) > MAX_POSITIONS:
        return f"{max(tokens, patches)} positions on one side (at most {MAX_POSITIONS})"
    shared = scoring.token_score != "max" and request.token_scores is None
    if shared and tokens > MAX_SHARED_WORDS:
        return (
            f"token_score={scoring.token_score!r} over {tokens} words (at most {MAX_SHARED_WORDS})"
        )
    return None


KERNELS = {
    "topk_mask": Kernel(_topk_mask, _refuses_topk_mask),
    "sync_topk_mask": Kernel(_sync_topk_mask, _refuses_sync_topk_mask),
}


def unavailable(device_type: str) -> str | None:
    if not _INSTALLED:
        return "triton is not installed"
    if device_type == "cuda" or (device_type == "cpu" and INTERPRETED):
        return None
    return (
        f"it serves CUDA tensors, not {device_type} ones (TRITON_INTERPRET=1 interprets it there)"
    )


def state() -> str:
    if not _INSTALLED:
        return "triton is not installed"
    if INTERPRETED:
        return "ready (interpreted: slow, for tests)"
    if not torch.cuda.is_available():
        return "no CUDA device"
    return "ready (compiled on first use)"
