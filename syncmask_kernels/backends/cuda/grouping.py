"""Calls of the CUDA chain (`csrc/cuda/grouping.cu`)."""

from __future__ import annotations

from syncmask_kernels.backends import native_grouping, overloads

grouped_order = overloads.define("grouped_order", "cuda")
refuses = native_grouping.refuses
