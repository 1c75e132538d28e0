"""C++ for CPU tensors: `lib/libsyncmask_cpu.so`, built where there is a compiler."""

from __future__ import annotations

from syncmask_kernels.backends.kernel import Kernel
KERNELS: dict[str, Kernel] = {}
def unavailable(device_type: str) -> str | None:
    return "not built"
def state() -> str:
    return "not built"
