"""Calls of the CUDA chain (`csrc/cuda/grouping.cu`)."""

from __future__ import annotations

from syncmask_kernels.backends import overloads

grouped_order = overloads.define("grouped_order", "cuda")
