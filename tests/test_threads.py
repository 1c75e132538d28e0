"""The C++ kernels give the same bits with any number of threads."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

import syncmask_kernels as smk
from syncmask_kernels import backends
from tests.selection_cases import positions


@pytest.fixture(autouse=True)
def served_by_cpu() -> Iterator[None]:
    reason = backends.BACKENDS["cpu"].unavailable("cpu")
    if reason is not None:
        pytest.skip(reason)
    before = torch.get_num_threads()
    with smk.use_backend("cpu"):
        yield
    torch.set_num_threads(before)


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


ATTN, VALID = random(11, 3, 40, 30).softmax(dim=-1), positions(11, 40)
Q, K, V = random(11, 3, 40, 8), random(11, 3, 30, 8), random(11, 3, 30, 8)
CALLS: dict[str, Callable[[], object]] = {
    "head_average": lambda: [smk.head_average(ATTN)],
    "attention_map": lambda: [smk.attention_map(Q, K)],
    "attention_with_map": lambda: smk.attention_with_map(Q, K, V),
    "topk_mask": lambda: smk.topk_mask(random(700, 64), k=20),
    "sync_topk_mask": lambda: smk.sync_topk_mask(ATTN, VALID, token_score="dual"),
    "sync_topk_mask_qk": lambda: smk.sync_topk_mask_qk(Q, K, VALID, v=V, token_score="dual"),
    "max_similarity": lambda: [smk.max_similarity(Q[:, 0], K[:, 0])],
}


@pytest.mark.parametrize("op", CALLS)
def test_same_bits_with_one_thread_and_with_three(op: str) -> None:
    results = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        results.append(CALLS[op]())
    for one, three in zip(*results, strict=True):
        assert torch.equal(one, three)
