"""Every Triton launch compiles for every generation of devices, without spills, in a budget.

No GPU is needed: the launches are those that the operators make, and Triton is told which device to
compile for. What is compiled is what ships, down to the alignment of the pointers.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from syncmask_kernels.backends import overloads
from syncmask_kernels.backends import triton as backend
from syncmask_kernels.backends.request import TOKEN_SCORES, Count, Scoring, SyncRequest

triton = pytest.importorskip("triton")
if backend.INTERPRETED:
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.backends.nvidia.compiler import get_ptxas  # noqa: E402

from syncmask_kernels.backends.triton import attention, scores, selection  # noqa: E402
from syncmask_kernels.backends.triton.launch import Launch  # noqa: E402

# The most registers of a thread and bytes of shared memory of a program, over all cases.
BUDGET = {
    "average_kernel": (64, 0),
    "attention_kernel": (128, 128 * 1024),
    "map_kernel": (128, 100 * 1024),
    "score_kernel": (128, 2048),
    "score_qk_kernel": (168, 148 * 1024),
    "reduce_kernel": (64, 1024),
    "similarity_kernel": (80, 16 * 1024),
    "select_kernel": (128, 8192),
    "topk_kernel": (64, 32768),
}


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


def sync_launches(
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    rules: tuple[str, str] = ("mean", "max"),
    everything: bool = False,
    own_scores: bool = False,
) -> list[Launch]:
    batch, heads, words, keys = shape
    patches = keys - 1
    given: dict[str, Any] = dict.fromkeys(SyncRequest._fields[3:])
    k = lse = patch_valid = None
    if everything:
        k = torch.empty(batch, dtype=torch.int64)
        lse = torch.empty(1, batch, heads, words)
        patch_valid = torch.empty(batch, patches, dtype=torch.bool)
        given["patch_noise"] = torch.empty(batch, patches)
        given["token_noise"] = torch.empty(batch, words)
        given["word_ids"] = torch.empty(batch, words, dtype=torch.int64)
    if own_scores:
        given["patch_scores"] = torch.empty(batch, patches)
        given["token_scores"] = torch.empty(batch, words)
    attn = torch.empty(1, *shape, dtype=dtype)
    token_valid = torch.empty(batch, words, dtype=torch.bool)
    request = SyncRequest(
        Scoring(attn, lse, token_valid, patch_valid, *rules, 1, 0),
        Count(k, 1, 2, patches // 2),
        Count(None, 3, 20, words),
        **given,
    )
    return selection.sync_launches(*overloads.sync_arguments(request))[1]


def topk_launches(size: int, dtype: torch.dtype) -> list[Launch]:
    return selection.topk_launches(
        torch.empty(64, size, dtype=dtype), None, None, 1, 2, size, True
    )[1]


def attention_inputs(
    shape: tuple[int, int, int, int, int], dtype: torch.dtype
) -> tuple[torch.Tensor, ...]:
    """q, k and v of one layer, and valid keys."""
    batch, heads, words, keys, dim = shape
    q = torch.empty(1, batch, heads, words, dim, dtype=dtype)
    k, v = torch.empty(2, 1, batch, heads, keys, dim, dtype=dtype)
    return q, k, v, torch.empty(batch, keys, dtype=torch.bool)


def average_launches(shape: tuple[int, ...], dtype: torch.dtype) -> list[Launch]:
    return attention.average_launches(torch.empty(shape, dtype=dtype), 1)[1]


def map_launches(
    shape: tuple[int, int, int, int, int], dtype: torch.dtype, output: bool
) -> list[Launch]:
    q, k, v, valid = attention_inputs(shape, dtype)
    return attention.map_launches(q, k, v if output else None, valid, 0.125, 1)[2]


def score_qk_launches(
    shape: tuple[int, int, int, int, int], dtype: torch.dtype, rule: str, everything: bool
) -> list[Launch]:
    batch, heads, words, keys, _ = shape
    q, k, _, valid = attention_inputs(shape, dtype)
    distance = torch.empty(1, batch, heads, keys) if everything else None
    masks = torch.empty(batch, words, dtype=torch.bool), valid[:, 1:] if everything else None
    return scores.score_qk_launches(
        q, k, distance, valid, *masks, 0.125, -1, TOKEN_SCORES.index(rule), 1
    )[1]


def similarity_launches(batch: int, dtype: torch.dtype) -> list[Launch]:
    patches, tokens = (torch.empty(batch, n, 512, dtype=dtype) for n in (256, 30))
    return scores.similarity_launches(patches, tokens, None)[1]


FP32, BF16 = torch.float32, torch.bfloat16
USUAL, ODD, LARGE = (64, 12, 30, 257, 64), (37, 7, 23, 198, 40), (8, 12, 128, 1025, 128)
CASES = {
    "default": lambda: sync_launches((64, 12, 30, 257), FP32),
    "default-bf16": lambda: sync_launches((64, 12, 30, 257), BF16),
    "dual": lambda: sync_launches((37, 7, 23, 198), FP32, ("cls", "dual"), everything=True),
    "dual-bf16": lambda: sync_launches((37, 7, 23, 198), BF16, ("cls", "dual"), everything=True),
    "long": lambda: sync_launches(
        (4, 12, 512, 577), FP32, ("mean", "text_softmax"), everything=True
    ),
    "own": lambda: sync_launches((37, 7, 23, 198), FP32, own_scores=True),
    "topk": lambda: topk_launches(196, FP32) + topk_launches(4096, BF16),
    "average": lambda: average_launches((1, *USUAL[:4]), FP32),
    "output": lambda: map_launches(ODD, FP32, output=True),
    "output-bf16": lambda: map_launches(USUAL, BF16, output=True),
    "qk": lambda: score_qk_launches(ODD, FP32, "dual", everything=True)[1:],
    "qk-bf16": lambda: score_qk_launches(USUAL, BF16, "max", everything=True),
    "qk-large": lambda: score_qk_launches(LARGE, BF16, "dual", everything=False)[1:],
    "similarity": lambda: similarity_launches(64, FP32) + similarity_launches(64, BF16),
}


def compile_for(target: GPUTarget, name: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setattr(triton.runtime.driver, "_active", TargetOnly(target))
    for launch in CASES[name]():
        compiled = launch.kernel.warmup(**launch.args, grid=launch.grid, **launch.options)
        yield launch, compiled


@pytest.mark.parametrize("arch", [80, 90, 100], ids="sm_{}".format)
@pytest.mark.parametrize("name", CASES)
def test_compiles_within_budget(
    arch: int, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for launch, compiled in compile_for(GPUTarget("cuda", arch, 32), name, monkeypatch):
        kernel = launch.kernel.__name__
        ptx = compiled.asm["ptx"]
        file = tmp_path / f"{kernel}.ptx"
        file.write_text(ptx)
        target = re.search(r"\.target (\w+)", ptx)[1]
        command = [get_ptxas(arch).path, "-v", f"-arch={target}", "-o", "/dev/null", str(file)]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        assert "0 bytes spill stores, 0 bytes spill loads" in report
        registers, shared = BUDGET[kernel]
        assert int(re.search(r"Used (\d+) registers", report)[1]) <= registers
        assert compiled.metadata.shared <= shared
        # No atomics, no denormals flushed to zero, no fused rounding but in matrix products.
        assert not re.search(r"\b(atom|red)\.|\.ftz", ptx)
        assert launch.fused or not re.search(r"\bfma\.", ptx)


@pytest.mark.parametrize(
    "name", ["default", "dual", "topk", "output-bf16", "qk-bf16", "similarity"]
)
def test_compiles_for_amd(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for _, compiled in compile_for(GPUTarget("hip", "gfx942", 64), name, monkeypatch):
        # Scalar registers spill to lanes of vector registers, not to memory.
        assert re.findall(r"vgpr_spill_count:\s+(\d+)", compiled.asm["amdgcn"]) == ["0"]
