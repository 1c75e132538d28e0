"""Triton: one source for every CUDA device, compiled on first use.

Importing this package imports neither Triton nor a driver; the first operator it serves does. CPU
tensors are served only in Triton's interpreter, for tests.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from syncmask_kernels.backends.kernel import Kernel
from syncmask_kernels.backends.loss_request import Head, Targets
from syncmask_kernels.backends.overloads.masking import refuses_move, refuses_sum
from syncmask_kernels.backends.patch_losses_request import PatchLoss
from syncmask_kernels.backends.queue_losses_request import Keys
from syncmask_kernels.backends.request import ScoringQK, SyncRequest

MAX_POSITIONS = 8192  # a row of keys is held by one program
MAX_SHARED_WORDS = 512  # likewise the words, for the rules that normalise over them
MAX_SHARED_QUERIES = 128  # likewise, where their queries are held too
MAX_HEAD_DIM = 128  # the columns of a head are all held at once
MAX_PATCH_VALUES = 4096  # likewise the values of a patch
INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")
_INSTALLED = find_spec("triton") is not None


def _refuses_type(tensor: Tensor) -> str | None:
    if tensor.dtype == torch.float64:
        return "float64 (it computes in float32)"
    return None


def _refuses_products(tensor: Tensor) -> str | None:
    if INTERPRETED and tensor.dtype == torch.bfloat16:
        return "bfloat16 products (Triton's interpreter gets them wrong)"
    return _refuses_type(tensor)


def _refuses_keys(keys: Keys) -> str | None:
    return _refuses_type(keys.batch)


def _refuses_attention(q: Tensor) -> str | None:
    if q.shape[-1] > MAX_HEAD_DIM:
        return f"heads of {q.shape[-1]} columns (at most {MAX_HEAD_DIM})"
    return _refuses_products(q)


def _refuses_topk_mask(scores: Tensor) -> str | None:
    if scores.shape[-1] > MAX_POSITIONS:
        return f"rows of {scores.shape[-1]} positions (at most {MAX_POSITIONS})"
    return _refuses_type(scores)


def _refuses_sides(
    tokens: int, patches: int, token_score: str | None, most_words: int
) -> str | None:
    if max(tokens, patches) > MAX_POSITIONS:
        return f"{max(tokens, patches)} positions on one side (at most {MAX_POSITIONS})"
    if token_score not in (None, "max") and tokens > most_words:
        return f"token_score={token_score!r} over {tokens} words (at most {most_words})"
    return None


def _refuses_sync_topk_mask(request: SyncRequest) -> str | None:
    scoring = request.scoring
    for given in (scoring.attn, request.patch_scores, request.token_scores):
        if given is not None and _refuses_type(given):
            return _refuses_type(given)
    tokens, patches = scoring.attn.shape[3], scoring.attn.shape[4] - scoring.skip_keys
    rule = None if request.token_scores is not None else scoring.token_score
    return _refuses_sides(tokens, patches, rule, MAX_SHARED_WORDS)


def _refuses_sync_scores_qk(scoring: ScoringQK) -> str | None:
    tokens, patches = scoring.q.shape[3], scoring.k.shape[3] - scoring.skip_keys
    return _refuses_attention(scoring.q) or _refuses_sides(
        tokens, patches, scoring.token_score, MAX_SHARED_QUERIES
    )


def _refuses_patch_loss(pred: Tensor, target: Tensor, loss: PatchLoss) -> str | None:
    if pred.shape[-1] > MAX_PATCH_VALUES:
        return f"patches of {pred.shape[-1]} values (at most {MAX_PATCH_VALUES})"
    return _refuses_type(pred) or _refuses_type(target)


def _refuses_linear_cross_entropy(student: Head, targets: Targets, reduction: str) -> str | None:
    heads = [*student, *(targets.teacher or ())]
    reasons = [_refuses_products(tensor) for tensor in heads if tensor is not None]
    return next((reason for reason in reasons if reason is not None), None)


def _kernel(op: str, refuses: Callable[..., str | None]) -> Kernel:
    def run(*call: Any) -> Any:
        from syncmask_kernels.backends.triton import operators

        return getattr(operators, op)(*call)

    return Kernel(run, refuses)


_REFUSALS: dict[str, Callable[..., str | None]] = {
    "head_average": _refuses_type,
    "attention_map": _refuses_attention,
    "attention_with_map": _refuses_attention,
    "topk_mask": _refuses_topk_mask,
    "sync_topk_mask": _refuses_sync_topk_mask,
    "sync_scores_qk": _refuses_sync_scores_qk,
    "max_similarity": _refuses_products,
    "masked_linear_cross_entropy": _refuses_linear_cross_entropy,
    "sample_negatives": _refuses_type,
    "queue_contrastive_loss": _refuses_keys,
    "masked_patch_loss": _refuses_patch_loss,
    "masked_patch_loss_backward": _refuses_patch_loss,
    "mask_patches": refuses_sum,
    "masked_sum": refuses_sum,
    "gather_masked": refuses_move,
    "scatter_masked": refuses_sum,
}
KERNELS = {op: _kernel(op, refuses) for op, refuses in _REFUSALS.items()}


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
