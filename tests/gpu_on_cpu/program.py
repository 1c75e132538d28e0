"""Runs kernels from their PTX on the memory of CPU tensors."""

from __future__ import annotations

import ctypes
import functools
import re
import struct
from collections.abc import Mapping, Sequence
from itertools import chain, repeat
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from tests.gpu_on_cpu.build import library
from tests.gpu_on_cpu.ptx import Kernel, PtxError, kernels


class ExecutionError(RuntimeError):
    """A kernel did what a GPU would not forgive: the message says what, and which thread where."""


class Traffic(NamedTuple):
    """What one launch reads from and writes to global memory.

    A sector is 32 bytes, the least that a GPU moves; it counts once, however often it is touched.
    """

    kernel: str
    bytes_read: int
    bytes_written: int
    sectors_read: int
    sectors_written: int


class _Range(ctypes.Structure):
    _fields_ = (("name", ctypes.c_char_p), ("begin", ctypes.c_uint64), ("end", ctypes.c_uint64))


def _extent(tensor: Tensor) -> tuple[int, int]:
    """The addresses between the first and the last element."""
    if tensor.numel() == 0:
        return tensor.data_ptr(), tensor.data_ptr()
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    last = sum((size - 1) * stride for size, stride in steps)
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def available(device_type: str) -> None:
    """In place of a backend's `unavailable`; a mock would stop torch.compile."""


class Program:
    """A kernel that is ready to run."""

    def __init__(self, kernel: Kernel, ptx: str) -> None:
        self.kernel = kernel
        self.ptx = ptx
        self.handle = library().gpu_program(kernel.name.encode(), kernel.program.encode())
        if not self.handle:
            raise PtxError(self.explained(library().gpu_failure().decode()))

    def explained(self, failure: str) -> str:
        """The failure with the PTX of the line that it names, and the source of that."""
        lines = self.ptx.splitlines()
        files = dict(re.findall(r'\.file\s+(\d+)\s+"([^"]*)"', self.ptx))
        for number in dict.fromkeys(map(int, re.findall(r"\bline (\d+)", failure))):
            failure += f"\n  {number}: {lines[number - 1].strip()}"
            places = re.findall(r"\.loc\s+(\d+)\s+(\d+)", "\n".join(lines[:number]))
            if places:
                file, line = places[-1]
                failure += f"  ({Path(files[file]).name}:{line})"
        return failure

    def run(
        self,
        grid: Sequence[int],
        threads: int,
        arguments: Mapping[str, Tensor | int | float],
        shared: int = 0,
        seed: int = 0,
    ) -> Traffic:
        """Run the grid; arguments in the order of the parameters, tensors by their address."""
        # Parameters beyond the arguments are Triton's scratch memory, of which none is asked for.
        values = chain(arguments.values(), repeat(0))
        packed = [_packed(next(values), parameter.size) for parameter in self.kernel.parameters]
        tensors = [(n, _extent(t)) for n, t in arguments.items() if isinstance(t, Tensor)]
        ranges = [_Range(name.encode(), *extent) for name, extent in tensors]
        size = (ctypes.c_uint * 6)(*grid, *[1] * (3 - len(grid)), threads, 1, 1)
        counted = (ctypes.c_uint64 * 4)()
        library().gpu_seed(ctypes.c_uint64(seed))
        done = library().gpu_run(
            ctypes.c_void_p(self.handle),
            size,
            ctypes.c_size_t(shared),
            (ctypes.c_char_p * len(packed))(*packed),
            (_Range * len(ranges))(*ranges),
            ctypes.c_size_t(len(ranges)),
            counted,
        )
        if not done:
            raise ExecutionError(self.explained(library().gpu_failure().decode()))
        return Traffic(self.kernel.name, *counted)


def _packed(value: Tensor | int | float, size: int) -> bytes:
    if isinstance(value, float):
        return struct.pack("<f" if size == 4 else "<d", value)
    number = value.data_ptr() if isinstance(value, Tensor) else int(value)
    return (number % 256**size).to_bytes(size, "little")


@functools.cache
def programs(ptx: str) -> dict[str, Program]:
    """Every kernel of a PTX module, by name."""
    return {name: Program(kernel, ptx) for name, kernel in kernels(ptx).items()}
