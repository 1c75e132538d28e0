"""CUDA sources with defects to plant."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from tests.gpu_on_cpu.build import cuda_library

ROOT = Path(__file__).parent
DEFECTS = ("none", "no barrier", "out of bounds", "wrong lanes", "divergent barrier")


def row_sum(x: Tensor, defect: str = "none") -> Tensor:
    """Sums of the rows of x, by ``row_sum.cu``."""
    function = ctypes.CDLL(str(cuda_library(ROOT))).row_sum
    function.restype = ctypes.c_char_p
    sums = torch.full((len(x),), float("nan"))
    addresses = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (x, sums)]
    failure = function(*addresses, *x.shape, DEFECTS.index(defect))
    if failure:
        raise RuntimeError(failure.decode())
    return sums
