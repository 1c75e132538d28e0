"""Calls of the C++ kernel that chooses negatives (`csrc/cpu/negatives.cpp`)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from syncmask_kernels.backends import overloads

_sample_negatives = overloads.define("sample_negatives", "cpu")


def sample_negatives(*call: Any) -> tuple[Tensor, Tensor]:
    """sim [B, N] -> ids [B] int64, found [B] bool."""
    return _sample_negatives(*overloads.negatives.arguments(*call))
