"""Triton kernels launched on CPU tensors: compiled for a GPU, and run from the PTX of that."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pkgutil import iter_modules
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from syncmask_kernels.backends import triton as backend
from syncmask_kernels.backends.triton.launch import Launch
from tests.gpu_on_cpu.program import Traffic, available, programs


class TargetOnly:
    """A driver that has no device, and names the one to compile for."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        return str(self.target.arch)  # Triton keeps what it compiled by device

    def get_current_stream(self, device: str) -> int:
        return 0


@contextmanager
def _dispatched_on_cpu() -> Iterator[None]:
    """What the backend registered for CUDA tensors serves CPU tensors, too."""
    for module in iter_modules(backend.__path__, f"{backend.__name__}."):
        import_module(module.name)
    library = torch.library.Library("syncmask", "IMPL")
    for name in torch._C._dispatch_get_all_op_names():
        if name.startswith("syncmask::") and name.endswith(".triton"):
            kernel = torch.library.get_kernel(name, "CUDA")
            library.impl(name, kernel.call_boxed, "CPU", with_keyset=True)
    try:
        yield
    finally:
        library._destroy()


@contextmanager
def triton_on_cpu(arch: int = 80, seed: int = 0) -> Iterator[list[Traffic]]:
    """Launches of Triton kernels take CPU tensors inside the `with` block.

    So ``smk.use_backend("triton")`` serves them there. The list grows with every launch.
    """
    traffic: list[Traffic] = []
    compile_or_run = JITFunction.run

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        compiled = compile_or_run(kernel, *args, grid=grid, warmup=True, **options)
        if not warmup:
            given = dict(zip(kernel.arg_names, args, strict=False)) | options
            kinds = compiled.src.signature
            passed = {n: given[n] for n in kernel.arg_names if kinds[n] != "constexpr"}
            program = programs(compiled.asm["ptx"])[compiled.metadata.name]
            blocks = grid(given) if callable(grid) else grid
            threads = 32 * compiled.metadata.num_warps
            shared = compiled.metadata.shared
            traffic.append(program.run(blocks, threads, passed, shared, seed))
        return compiled

    with (
        _dispatched_on_cpu(),
        mock.patch.object(
            triton.runtime.driver, "_active", TargetOnly(GPUTarget("cuda", arch, 32))
        ),
        mock.patch.object(JITFunction, "run", run),
        mock.patch.object(backend, "unavailable", available),
    ):
        yield traffic


def execute(launches: Sequence[Launch], arch: int = 80, seed: int = 0) -> list[Traffic]:
    """Run launches of this library one after the other; what each of them moves."""
    with triton_on_cpu(arch, seed) as traffic:
        for launch in launches:
            launch.kernel[launch.grid](**launch.args, **launch.options)
    return traffic
