"""Operators of CUDA sources on CPU tensors: compiled by g++, or run from the PTX of nvcc."""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from syncmask_kernels.backends import cuda as backend
from syncmask_kernels.backends import native as loader
from tests.gpu_on_cpu.build import cuda_library, library, nvcc_ptx
from tests.gpu_on_cpu.program import ExecutionError, Program, Traffic, available, programs

SOURCES = Path(__file__).parents[2] / "csrc"
_LISTENER = ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.POINTER(ctypes.c_uint64))


@contextmanager
def launches_on_cpu(
    root: Path, ptx_arch: int | None = None, seed: int = 0
) -> Iterator[list[Traffic]]:
    """The ``.cu`` files below a folder serve CPU tensors inside the `with` block.

    Their launchers are compiled by g++, and so are their kernels, or those are run from the PTX
    that nvcc makes for an architecture. Only then the list grows with every launch.
    """
    torch.ops.load_library(cuda_library(root))
    kernels: dict[str, Program] = {}
    for ptx in nvcc_ptx(root, ptx_arch) if ptx_arch else []:
        kernels |= programs(ptx)
    traffic: list[Traffic] = []

    @_LISTENER
    def listener(name: bytes, counted: Any) -> None:
        traffic.append(Traffic(name.decode(), *counted[:4]))

    names = (ctypes.c_char_p * len(kernels))(*map(str.encode, kernels))
    handles = (ctypes.c_void_p * len(kernels))(*(kernel.handle for kernel in kernels.values()))
    library().gpu_seed(ctypes.c_uint64(seed))
    library().gpu_use_ptx(names, handles, ctypes.c_size_t(len(kernels)), listener)
    try:
        yield traffic
    except RuntimeError as error:
        failed = kernels.get(str(error).partition(",")[0])
        if failed is None:
            raise
        raise ExecutionError(failed.explained(str(error))) from error
    finally:
        library().gpu_use_ptx(None, None, ctypes.c_size_t(0), _LISTENER())


@contextmanager
def cuda_on_cpu(ptx_arch: int | None = None, seed: int = 0) -> Iterator[list[Traffic]]:
    """``smk.use_backend("cuda")`` serves CPU tensors inside the `with` block; see above."""
    with (
        launches_on_cpu(SOURCES, ptx_arch, seed) as traffic,
        mock.patch.object(loader, "load", return_value=(None, "run on the CPU")),
    ):
        importlib.reload(backend)
        with mock.patch.object(backend, "unavailable", available):
            yield traffic
    importlib.reload(backend)
