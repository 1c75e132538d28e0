"""sync_topk_mask and topk_mask against plain PyTorch, torch.compile and the floor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import syncmask_kernels as smk

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(64, 12, 30, 257), (37, 7, 23, 198)]


def attention(
    shape: tuple[int, ...], dtype: torch.dtype, shortest: int
) -> list[tuple[Tensor, Tensor]]:
    """Six inputs, together larger than the caches, of captions of `shortest` to T words."""
    generator = torch.Generator().manual_seed(0)
    pairs = []
    for _ in range(6):
        attn = torch.randn(shape, generator=generator).softmax(dim=-1).to(DEVICE, dtype)
        words = torch.randint(shortest, shape[2] + 1, (shape[0], 1), generator=generator)
        pairs.append((attn, (torch.arange(shape[2]) < words).to(DEVICE)))
    return pairs


def plain_sync_topk_mask(pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The strongest plain PyTorch for the masks alone: no defined order of ties, no ids."""
    attn, valid = pair
    mean = attn.mean(dim=1, dtype=torch.float32)[..., 1:]
    weights = valid.float() / valid.sum(dim=1, keepdim=True)
    patch = torch.bmm(weights.unsqueeze(1), mean).squeeze(1)
    token = mean.amax(dim=-1).masked_fill(~valid, float("-inf"))
    chosen = patch.topk(patch.shape[1] // 2, sorted=False).indices
    patch_mask = torch.zeros_like(patch, dtype=torch.bool).scatter_(1, chosen, True)
    counts = (valid.sum(dim=1, keepdim=True) * 3 + 19) // 20
    ranks = token.argsort(dim=1, descending=True).argsort(dim=1)
    return patch_mask, ranks < counts


def agree(got: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    """Masks may differ where rounding swaps two scores that are all but equal."""
    for mask, wanted in zip(got[:2], expected[:2], strict=True):
        assert torch.equal(mask.sum(dim=1), wanted.sum(dim=1))
        assert (mask != wanted).float().mean() < 2e-3


@pytest.mark.parametrize("shortest", [8, None], ids=["8-to-T-words", "all-words"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def bench_sync_topk_mask(
    compare: Callable[..., Any], shape: tuple[int, ...], dtype: torch.dtype, shortest: int | None
) -> None:
    def eager(pair: tuple[Tensor, Tensor]) -> smk.SyncMask:
        with smk.use_backend("eager"):
            return smk.sync_topk_mask(*pair)

    torch._dynamo.reset()
    words = "all words" if shortest is None else f"{shortest} to {shape[2]} words"
    compare(
        f"sync_topk_mask {list(shape)} {str(dtype).removeprefix('torch.')}, {words}",
        {
            "attn.sum()": lambda pair: pair[0].sum(),
            "plain PyTorch": plain_sync_topk_mask,
            "torch.compile": torch.compile(plain_sync_topk_mask),
            "eager backend": eager,
            "this library": lambda pair: smk.sync_topk_mask(*pair),
        },
        attention(shape, dtype, shape[2] if shortest is None else shortest),
        agree,
    )


def plain_topk_mask(scores: Tensor) -> Tensor:
    chosen = scores.topk(scores.shape[1] // 2, sorted=False).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, chosen, True)


@pytest.mark.parametrize("shape", [(512, 256), (64, 577)], ids=str)
def bench_topk_mask(compare: Callable[..., Any], shape: tuple[int, int]) -> None:
    def equal(got: Any, expected: Any) -> None:
        masks = [x.mask if isinstance(x, smk.TopK) else x for x in (got, expected)]
        assert torch.equal(*masks)

    torch._dynamo.reset()
    compare(
        f"topk_mask {list(shape)} float32, half of each row",
        {
            "scores.sum()": torch.sum,
            "plain PyTorch": plain_topk_mask,
            "torch.compile": torch.compile(plain_topk_mask),
            "this library": lambda scores: smk.topk_mask(scores, k=scores.shape[1] // 2),
        },
        [torch.rand(shape, device=DEVICE) for _ in range(6)],
        equal,
    )
