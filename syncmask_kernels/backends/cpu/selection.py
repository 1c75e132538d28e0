"""Calls of the C++ selection kernels (`csrc/cpu/selection.cpp`, `selection_qk.cpp`)."""

from __future__ import annotations

from torch import Tensor

from syncmask_kernels.backends import native_selection, overloads
from syncmask_kernels.backends.kernel import refuses_float64
from syncmask_kernels.backends.request import ScoringQK

_selection = native_selection.NativeSelection("cpu")
topk_mask = _selection.topk_mask
sync_topk_mask = _selection.sync_topk_mask
refuses_sync_topk_mask = native_selection.refuses_sync_topk_mask
max_similarity = overloads.define("max_similarity", "cpu")
_sync_scores_qk = overloads.define("sync_scores_qk", "cpu")


def refuses_sync_scores_qk(scoring: ScoringQK) -> str | None:
    return refuses_float64(scoring.q, scoring.distance)


def sync_scores_qk(scoring: ScoringQK) -> tuple[Tensor, Tensor]:
    patch, token = _sync_scores_qk(*overloads.selection.scoring_qk_arguments(scoring))
    return patch, token
