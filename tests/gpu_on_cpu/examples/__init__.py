"""CUDA sources to try what runs them, with defects to plant."""

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


def exchange(threads: int) -> tuple[Tensor, Tensor]:
    """What ``exchange.cu`` leaves in its results [ways, threads] and counters."""
    results = torch.full((18, threads), float("nan"))
    counters = torch.tensor([0, 0, 99, 9], dtype=torch.int32)
    addresses = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (results, counters)]
    ctypes.CDLL(str(cuda_library(ROOT))).exchange(*addresses, threads)
    return results, counters
