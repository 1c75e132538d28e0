"""The PTX of every Triton kernel, run on the CPU: what it computes, and what it moves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import syncmask_kernels as smk
from syncmask_kernels.backends import triton as backend
from tests import negatives_calls
from tests.accuracy import assert_as_accurate
from tests.cross_entropy_calls import cross_entropy
from tests.gpu_on_cpu import build

triton = pytest.importorskip("triton")
if backend.INTERPRETED:
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)
if missing := build.missing():
    pytest.skip(missing, allow_module_level=True)

import triton.language as tl  # noqa: E402

from tests.gpu_on_cpu.ptx import PtxError  # noqa: E402
from tests.gpu_on_cpu.triton_launch import triton_on_cpu  # noqa: E402

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


def heads(
    op: Any,
    *shape: int,
    dtype: torch.dtype = torch.float32,
    values: int | None = None,
    layers: int = 1,
    **options: Any,
) -> Call:
    """Queries [B, H, T, D] and keys [B, H, S, D] of some layers, and values."""
    batch, count, words, keys, dim = shape
    lead = (batch, count) if layers == 1 else (layers, batch, count)
    drawn = {
        "q": torch.randn(*lead, words, dim, generator=seeded(9)).to(dtype),
        "k": torch.randn(*lead, keys, dim, generator=seeded(10)).to(dtype),
    }
    if values is not None:
        drawn["v"] = torch.randn(*lead, keys, values, generator=seeded(11)).to(dtype)
    valid = chance(0.8, batch, keys)
    valid[0] = False
    return op, {**drawn, "key_valid": valid, **options}


def similarity(*shape: int, dtype: torch.dtype = torch.float32) -> Call:
    batch, patches, tokens, dim = shape
    return smk.max_similarity, {
        "patches": torch.randn(batch, patches, dim, generator=seeded(12)).to(dtype),
        "tokens": torch.randn(batch, tokens, dim, generator=seeded(13)).to(dtype),
        "token_valid": chance(0.7, batch, tokens),
    }


def patch_loss(pred: Tensor, **rest: Any) -> tuple[Tensor, Tensor]:
    """The loss, and the gradient of the prediction."""
    leaf = pred.detach().requires_grad_()
    loss = smk.masked_patch_loss(leaf, **rest)
    slope = torch.arange(1, loss.numel() + 1).reshape(loss.shape).to(loss)
    return loss.detach(), torch.autograd.grad(loss, leaf, slope)[0]


def patches(
    ids_or_mask: Tensor,
    side: int,
    rows: int,
    types: tuple[torch.dtype, torch.dtype] = (torch.float32, torch.float32),
    **options: Any,
) -> Call:
    """`rows` predictions of each of 2 images, which are 6 patches each."""
    shapes = (2, rows, 3 * side**2), (2, 3, 2 * side, 3 * side)
    pred, image = (torch.randn(s, generator=seeded(40 + len(s))) for s in shapes)
    given = {"pred": pred.to(types[0]), "target": image.to(types[1]), "ids_or_mask": ids_or_mask}
    return patch_loss, {**given, "patch_size": side, **options}


def features(**options: Any) -> Call:
    pred, target = (torch.randn(2, 6, 40, generator=seeded(i)).half() for i in (43, 44))
    return patch_loss, {"pred": pred, "target": target, "ids_or_mask": chance(0.5, 2, 6), **options}


PATCH_IDS = torch.tensor([[4, 4, -1, 0], [2, -1, 2, 2]])
FLOAT, BFLOAT = torch.float32, torch.bfloat16


def contrast(image_feat: Tensor, text_feat: Tensor, **rest: Any) -> tuple[Tensor, ...]:
    """The loss, both gradients, and the similarities."""
    leaves = [x.detach().requires_grad_() for x in (image_feat, text_feat)]
    loss, *sims = smk.queue_contrastive_loss(*leaves, temperature=0.1, **rest)
    return loss.detach(), *torch.autograd.grad(loss, leaves), *(sim.detach() for sim in sims)


def queue(batch: int, columns: int, dtype: torch.dtype = torch.float32, **options: Any) -> Call:
    """Features, keys and queues of 16 numbers."""
    names = ("image_feat", "text_feat", "image_key", "text_key", "image_queue", "text_queue")
    shapes = [(batch, 16)] * 4 + [(16, columns)] * 2
    drawn = {
        name: (torch.randn(shape, generator=seeded(14 + i)) / 4).to(dtype)
        for i, (name, shape) in enumerate(zip(names, shapes, strict=True))
    }
    return contrast, {**drawn, **options}


def items(count: int, seed: int = 20) -> Tensor:
    return torch.randint(9, (count,), generator=seeded(seed))


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
    "sync-many-words": lambda: sync(
        *(2, 1, 600, 9),
        word_ids=torch.randint(-1, 300, (2, 600), generator=seeded(8)),
        token_ratio=0.4,
    ),
    "sync-noise": lambda: sync(3, 4, 9, 50, **noise(3, 9, 49), token_k=torch.tensor([0, 3, 9])),
    "sync-own": lambda: sync(3, 4, 9, 50, **own_scores(3, 9, 49)),
    "average": lambda: (smk.head_average, {"attn": attention(2, 2, 3, 5, 261)}),
    "average-bf16": lambda: (smk.head_average, {"attn": attention(2, 3, 5, 50).bfloat16()}),
    "map": lambda: heads(smk.attention_map, 2, 3, 5, 70, 40, layers=2),
    "map-bf16": lambda: heads(smk.attention_map, 2, 3, 33, 130, 64, dtype=torch.bfloat16),
    "output": lambda: heads(smk.attention_with_map, 2, 2, 33, 70, 24, values=40),
    "output-f16": lambda: heads(
        smk.attention_with_map, 2, 2, 17, 130, 40, values=64, dtype=torch.float16
    ),
    "output-bf16": lambda: heads(
        smk.attention_with_map, 2, 2, 5, 66, 128, values=70, dtype=torch.bfloat16
    ),
    "qk": lambda: heads(smk.sync_topk_mask_qk, 2, 2, 33, 70, 16, patch_score="cls"),
    "qk-dual": lambda: heads(
        smk.sync_topk_mask_qk, 2, 2, 9, 70, 24, values=5, token_score="dual", layers=2
    ),
    "qk-text-softmax-bf16": lambda: heads(
        smk.sync_topk_mask_qk,
        *(2, 2, 30, 70, 64),
        dtype=torch.bfloat16,
        token_score="text_softmax",
        token_valid=chance(0.7, 2, 30),
        patch_valid=chance(0.7, 2, 69),
    ),
    "queue": lambda: queue(5, 23),
    "queue-soft": lambda: queue(3, 5000, alpha=0.4),
    "queue-items-bf16": lambda: queue(
        *(6, 300, torch.bfloat16),
        alpha=torch.tensor(0.4),
        item_ids=items(6),
        queue_ids=items(300, 21),
    ),
    "rows": lambda: cross_entropy(42, 40, 97, gathered=True, smoothing=0.1),
    "rows-soft": lambda: cross_entropy(30, 8, 4200, gathered=True, teacher="soft"),
    "rows-f16": lambda: cross_entropy(42, 40, 97, torch.float16, gathered=True, teacher="head"),
    "rows-mixed": lambda: cross_entropy(
        42, 40, 97, torch.bfloat16, torch.float32, gathered=True, teacher="head", smoothing=0.1
    ),
    "stream": lambda: cross_entropy(110, 24, 300, smoothing=0.1),
    "stream-soft": lambda: cross_entropy(42, 24, 97, teacher="soft"),
    "stream-bf16": lambda: cross_entropy(200, 40, 300, torch.bfloat16, teacher="head"),
    "similarity": lambda: similarity(2, 70, 40, 40),
    "similarity-bf16": lambda: similarity(2, 30, 70, 130, dtype=torch.bfloat16),
    "patches": lambda: patches(chance(0.5, 2, 6), 5, 6),
    "patches-ids-bf16": lambda: patches(
        PATCH_IDS, 4, 6, (BFLOAT, FLOAT), kind="mse", norm_pix=True, reduction="none"
    ),
    "patches-gathered": lambda: patches(
        PATCH_IDS, 3, 4, (FLOAT, BFLOAT), kind="cosine", norm_pix=True, reduction="sum"
    ),
    "patches-large": lambda: patches(chance(0.3, 2, 6), 32, 6, kind="smooth_l1", norm_pix=True),
    "features-f16": lambda: features(kind="cosine", reduction="none"),
}
CALLS |= negatives_calls.CALLS


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
    try:
        with triton_on_cpu(arch, seed=arch) as traffic, smk.use_backend("triton"):
            got = operator(**arguments)
    except PtxError as error:
        if arch == 80 or "wgmma" not in str(error):
            raise
        pytest.skip("its matrix products are wgmma there; they run from the PTX of sm_80")
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


@triton.jit
def product_kernel(
    a, b, c, K,
    M: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """c [M, N] = a [M, K] b [K, N], in blocks of K that are copied ahead."""
    rows, columns, inner = tl.arange(0, M), tl.arange(0, N), tl.arange(0, BLOCK)
    total = tl.zeros((M, N), tl.float32)
    for start in tl.range(0, K, BLOCK, num_stages=3):
        left = tl.load(a + rows[:, None] * K + (start + inner)[None, :])
        right = tl.load(b + (start + inner)[:, None] * N + columns[None, :])
        total = tl.dot(left, right, total, input_precision=PRECISION)
    tl.store(c + rows[:, None] * N + columns[None, :], total)


@pytest.mark.parametrize(
    ("dtype", "precision"),
    [
        (torch.float16, "ieee"),
        (torch.bfloat16, "ieee"),
        (torch.float32, "tf32"),
        (torch.float32, "ieee"),
    ],
)
def test_matrix_products(dtype: torch.dtype, precision: str) -> None:
    """mma.sync, ldmatrix and cp.async, for inputs that the instructions take as they are."""
    a, b = (torch.randn(shape, generator=seeded()).to(dtype) for shape in ((32, 96), (96, 16)))
    if precision == "tf32":
        a, b = (x.bfloat16().float() for x in (a, b))
    c = torch.full((32, 16), NAN)
    with triton_on_cpu(80) as traffic:
        options = {"num_warps": 2, "enable_fp_fusion": False}
        product_kernel[(1,)](a, b, c, 96, 32, 16, 32, precision, **options)
    exact = a.double() @ b.double()
    size = a.double().abs() @ b.double().abs()
    assert ((c - exact).abs() <= 4 * 2.0**-24 * size).all()
    assert traffic[0].bytes_written == c.nbytes
    assert traffic[0].sectors_read == (a.nbytes + b.nbytes) / 32
