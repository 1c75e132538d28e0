"""Calls of sample_negatives whose PTX runs on the CPU, and those that are counted."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

import syncmask_kernels as smk

Call = tuple[Callable[..., Any], dict[str, Any]]
SEED = torch.tensor([-3, 2**40 + 5])


def negatives(rows: int, columns: int, dtype: torch.dtype = torch.float32, **options: Any) -> Call:
    """Similarities with ties, NaN and infinities, and everything that bars a column."""
    generator = torch.Generator().manual_seed(columns)
    sim = (8 * torch.randn(rows, columns, generator=generator)).round() / 8
    sim[:, ::9], sim[:, 1::13], sim[:, 2::29] = float("nan"), -float("inf"), float("inf")
    bars = {
        "positive": torch.randint(columns, (rows,), generator=generator),
        "exclude": torch.rand(rows, columns, generator=generator) < 0.2,
        "row_ids": torch.arange(rows),
        "col_ids": torch.randint(2 * rows, (columns,), generator=generator),
    }
    return smk.sample_negatives, {"sim": sim.to(dtype), **bars, **options}


def noise(rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(1))


CALLS: dict[str, Callable[[], Call]] = {
    "negatives": lambda: (smk.sample_negatives, {"sim": noise(5, 5), "seed": SEED}),
    "negatives-long": partial(negatives, 2, 4100, seed=SEED),
    "negatives-noise": lambda: negatives(3, 70, noise=noise(3, 70)),
    "negatives-hardest-bf16": partial(negatives, 3, 300, torch.bfloat16, mode="hardest"),
    "negatives-semi-hard": partial(
        negatives, 2, 2100, mode="semi_hard", margin=0.125, quantile=0.3
    ),
    "negatives-semi-hard-f16": partial(negatives, 3, 60, torch.float16, mode="semi_hard"),
}


def counted() -> dict[str, Call]:
    def plain(rows: int, columns: int, **options: Any) -> Call:
        own = torch.arange(rows)
        return smk.sample_negatives, {"sim": noise(rows, columns), "positive": own, **options}

    return {
        "sample_negatives [64, 64]": plain(64, 64, seed=SEED),
        "sample_negatives [4, 4096]": plain(4, 4096, seed=SEED),
        "sample_negatives [4, 4096], semi_hard": plain(4, 4096, mode="semi_hard", quantile=0.5),
    }
