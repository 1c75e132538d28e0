"""Every Triton launch compiles for every generation of devices; test_budgets.py has what it takes.

No GPU is needed: the launches are those that the operators make, and Triton is told which device to
compile for. What is compiled is what ships, down to the alignment of the pointers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest

from syncmask_kernels.backends import triton as backend

triton = pytest.importorskip("triton")
if backend.INTERPRETED:
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402

from tests.gpu_on_cpu.triton_launch import TargetOnly  # noqa: E402
from tests.triton_launches import CASES  # noqa: E402


def compile_for(target: GPUTarget, name: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setattr(triton.runtime.driver, "_active", TargetOnly(target))
    for launch in CASES[name]():
        compiled = launch.kernel.warmup(**launch.args, grid=launch.grid, **launch.options)
        yield launch, compiled


@pytest.mark.parametrize("arch", [80, 90, 100], ids="sm_{}".format)
@pytest.mark.parametrize("name", CASES)
def test_compiles_without_what_rounds_or_orders_otherwise(
    arch: int, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No atomics, no denormals flushed to zero, no fused rounding but in matrix products."""
    for launch, compiled in compile_for(GPUTarget("cuda", arch, 32), name, monkeypatch):
        # A logarithm is a polynomial near 1, in these instructions.
        ptx = compiled.asm["ptx"].replace("fma.rn.ftz.f32", "")
        assert not re.search(r"\b(atom|red)\.|\.ftz", ptx)
        assert launch.fused or not re.search(r"\bfma\.", ptx)


@pytest.mark.parametrize(
    "name",
    [
        "default",
        "dual",
        "topk",
        "topk-long-bf16",
        "masking",
        "output-bf16",
        "qk-bf16",
        "patches",
        "rows-teacher-bf16",
        "stream",
        "stream-teacher-bf16",
        "queue",
        "negatives-everything",
        "negatives-semi-hard",
        "similarity",
        "similarity-bf16",
    ],
)
def test_compiles_for_amd(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for _, compiled in compile_for(GPUTarget("hip", "gfx942", 64), name, monkeypatch):
        # Scalar registers spill to lanes of vector registers, not to memory.
        assert re.findall(r"vgpr_spill_count:\s+(\d+)", compiled.asm["amdgcn"]) == ["0"]
