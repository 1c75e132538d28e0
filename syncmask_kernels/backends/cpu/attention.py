"""Calls of the C++ attention kernels (`csrc/cpu/attention.cpp`)."""

from __future__ import annotations

from syncmask_kernels.backends import overloads

head_average = overloads.define("head_average", "cpu")
attention_map = overloads.define("attention_map", "cpu")
attention_with_map = overloads.define("attention_with_map", "cpu")
