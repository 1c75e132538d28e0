"""Calls of the C++ masking kernels (`csrc/cpu/masking.cpp`)."""

from __future__ import annotations

from syncmask_kernels.backends import overloads

refuses_sum = overloads.masking.refuses_sum
refuses_move = overloads.masking.refuses_move
mask_patches = overloads.define("mask_patches", "cpu")
masked_sum = overloads.define("masked_sum", "cpu")
gather_masked = overloads.define("gather_masked", "cpu")
scatter_masked = overloads.define("scatter_masked", "cpu")
