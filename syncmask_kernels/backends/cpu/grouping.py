"""Calls of the C++ chain (`csrc/cpu/grouping.cpp`)."""

from __future__ import annotations

from syncmask_kernels.backends import native_grouping, overloads

grouped_order = overloads.define("grouped_order", "cpu")
refuses = native_grouping.refuses
