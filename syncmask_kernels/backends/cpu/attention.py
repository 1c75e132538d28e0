"""Calls of the C++ attention kernels (`csrc/cpu/attention.cpp`)."""

from __future__ import annotations

import torch
from torch import Tensor

from syncmask_kernels.backends import overloads

head_average = overloads.define("head_average", "cpu")
attention_map = overloads.define("attention_map", "cpu")
attention_with_map = overloads.define("attention_with_map", "cpu")


def refuses(tensor: Tensor) -> str | None:
    return "float64 is served by eager only" if tensor.dtype == torch.float64 else None
