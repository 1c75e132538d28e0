"""The C++ kernel that chooses negatives (`csrc/cpu/negatives.cpp`)."""

from __future__ import annotations

from syncmask_kernels.backends import overloads

sample_negatives = overloads.define("sample_negatives", "cpu")
