"""The PTX of every Triton kernel, run on the CPU: what it computes, and what it moves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import syncmask_kernels as smk
from syncmask_kernels.backends import triton as backend
from tests.accuracy import assert_as_accurate
from tests.gpu_on_cpu import build

pytest.importorskip("triton")
if backend.INTERPRETED:
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)
if missing := build.missing():
    pytest.skip(missing, allow_module_level=True)

from tests.gpu_on_cpu.triton_launch import triton_on_cpu

NAN, INF = float("nan"), float("inf")
Call = tuple[Callable[..., Any], dict[str, Any]]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def attention(*shape: int) -> Tensor:
    return torch.randn(shape, generator=seeded()).softmax(dim=-1)


def chance(probability: float, *shape: int) -> Tensor:
    return torch.rand(shape, generator=seeded(1)) < probability


def topk(rows: int, size: int, dtype: torch.dtype = torch.float32, **options: Any) -> Call:
    """Scores with ties, NaN, infinities, denormals and both zeros."""
    special = torch.tensor([0.5, 0.5, -0.0, 0.0, NAN, -NAN, INF, -INF, 1e-45, -1e-45, 3e-45])
    picked = special[torch.randint(len(special), (rows, size), generator=seeded(2))]
    drawn = torch.randn(rows, size, generator=seeded())
    scores = torch.where(drawn > 0.2, drawn, picked).to(dtype)
    return smk.topk_mask, {"scores": scores, **options}


def sync(*shape: int, dtype: torch.dtype = torch.float32, **options: Any) -> Call:
    batch, words = shape[-4], shape[-2]
    valid = chance(0.8, batch, words)
    valid[0] = False
    return smk.sync_topk_mask, {
        "attn": attention(*shape).to(dtype),
        "token_valid": valid,
        **options,
    }


def noise(batch: int, words: int, patches: int) -> dict[str, Any]:
    return {
        "patch_noise": torch.randn(batch, patches, generator=seeded(3)),
        "token_noise": torch.randn(batch, words, generator=seeded(4)),
    }


def own_scores(batch: int, words: int, patches: int) -> dict[str, Any]:
    return {
        "patch_scores": torch.randn(batch, patches, generator=seeded(5)),
        "token_scores": torch.randn(batch, words, generator=seeded(6)),
    }


# One row a call; every launch that it makes is run for every architecture.
CALLS: dict[str, Callable[[], Call]] = {
    "topk": lambda: topk(3, 197, k=60),
    "topk-one": lambda: topk(2, 1, k=1),
    "topk-valid": lambda: topk(3, 49, ratio=0.3, valid=chance(0.6, 3, 49)),
    "topk-smallest": lambda: topk(2, 33, k=torch.tensor([5, 40]), width=20, largest=False),
    "topk-bf16": lambda: topk(2, 257, torch.bfloat16, k=100),
    "topk-long": lambda: topk(1, 4100, k=1000),
    "sync": lambda: sync(3, 4, 9, 50),
    "sync-wide": lambda: sync(2, 12, 30, 257),
    "sync-bf16": lambda: sync(2, 3, 7, 50, dtype=torch.bfloat16),
    "sync-f16": lambda: sync(2, 3, 7, 50, dtype=torch.float16),
    "sync-layers": lambda: sync(2, 3, 2, 5, 37, skip_keys=0),
    "sync-cls": lambda: sync(3, 4, 9, 50, patch_score="cls", cls_index=2),
    "sync-dual": lambda: sync(3, 4, 23, 98, token_score="dual"),
    "sync-text-softmax": lambda: sync(
        3, 4, 9, 50, token_score="text_softmax", lse=torch.randn(3, 4, 9, generator=seeded(7))
    ),
    "sync-valid-patches": lambda: sync(3, 4, 9, 50, patch_valid=chance(0.5, 3, 49)),
    "sync-words": lambda: sync(
        3, 4, 40, 50, word_ids=torch.randint(-1, 20, (3, 40), generator=seeded(8)), token_ratio=0.4
    ),
    "sync-noise": lambda: sync(3, 4, 9, 50, **noise(3, 9, 49), token_k=torch.tensor([0, 3, 9])),
    "sync-own": lambda: sync(3, 4, 9, 50, **own_scores(3, 9, 49)),
}


def in_float64(arguments: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in arguments.items()
    }


def assert_same(got: Tensor, plain: Tensor, truth: Tensor) -> None:
    """Masks and ids bit by bit; numbers as accurate as those of plain PyTorch."""
    if not got.is_floating_point():
        assert torch.equal(got, plain)
        return
    finite = plain.isfinite()
    torch.testing.assert_close(got[~finite], plain[~finite], rtol=0, atol=0, equal_nan=True)
    assert_as_accurate(got[finite], plain[finite], truth[finite])


@pytest.mark.parametrize("arch", [80, 90], ids="sm_{}".format)
@pytest.mark.parametrize("name", CALLS)
def test_ptx_computes_what_eager_does(name: str, arch: int) -> None:
    operator, arguments = CALLS[name]()
    with triton_on_cpu(arch, seed=arch) as traffic, smk.use_backend("triton"):
        got = operator(**arguments)
    assert traffic
    with smk.use_backend("eager"):
        answers = got, operator(**arguments), operator(**in_float64(arguments))
    for one in zip(*([a] if isinstance(a, Tensor) else a for a in answers), strict=True):
        assert_same(*one)


@pytest.mark.parametrize("arch", [80, 90], ids="sm_{}".format)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sync_topk_mask_reads_attention_once(dtype: torch.dtype, arch: int) -> None:
    attn = attention(2, 12, 30, 257).to(dtype)
    with triton_on_cpu(arch) as traffic, smk.use_backend("triton"):
        smk.sync_topk_mask(attn)
    assert len(traffic) <= 2
    floor = attn.nbytes
    moved = sum(launch.bytes_read + launch.bytes_written for launch in traffic)
    sectors = sum(launch.sectors_read + launch.sectors_written for launch in traffic)
    assert floor * 256 / 257 <= moved <= 1.1 * floor
    assert floor * 256 / 257 <= 32 * sectors <= 1.1 * floor
