"""Calls of the C++ chain (`csrc/cpu/grouping.cpp`)."""

from __future__ import annotations

from syncmask_kernels.backends import overloads

grouped_order = overloads.define("grouped_order", "cpu")
