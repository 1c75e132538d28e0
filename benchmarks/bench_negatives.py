"""sample_negatives against ALBEF's loop, and against one draw of the whole batch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import syncmask_kernels as smk
from benchmarks.measure import rotation
from benchmarks.report import Case

Pair = tuple[Tensor, Tensor]
Ids = Callable[[Tensor], Tensor]

SHAPES = [(64, 64), (256, 2048)]  # a batch, and a batch with the keys of eight ranks


def similarities(generator: torch.Generator, shape: tuple[int, int]) -> Pair:
    """Of images to texts and of texts to images: a step needs negatives of both.

    Of features that are little alike, divided by a temperature of 0.07.
    """
    i2t, t2i = (0.2 * torch.randn(shape, generator=generator) / 0.07 for _ in range(2))
    return i2t, t2i


def both_ways(choose: Ids) -> Callable[[Pair], Pair]:
    """The negatives of a step."""

    def call(pair: Pair) -> Pair:
        return choose(pair[0]), choose(pair[1])

    return call


def drawn_at_once(sim: Tensor) -> Tensor:
    """One torch.multinomial, with the positives masked; fails where all negatives underflow."""
    own = torch.eye(*sim.shape, dtype=torch.bool, device=sim.device)
    return torch.multinomial(sim.softmax(dim=1).masked_fill(own, 0.0), 1).squeeze(1)


def loop(sim: Tensor) -> Tensor:
    """ALBEF's: the host waits for each row."""
    weights = sim.softmax(dim=1).fill_diagonal_(0)
    return torch.tensor([torch.multinomial(row, 1).item() for row in weights])


def hardest_by_argmax(sim: Tensor) -> Tensor:
    own = torch.eye(*sim.shape, dtype=torch.bool, device=sim.device)
    return sim.masked_fill(own, -torch.inf).argmax(dim=1)


def semi_hard_by_argmax(sim: Tensor) -> Tensor:
    own = sim.diagonal().unsqueeze(1)
    easier = sim.masked_fill(sim >= own, -torch.inf)
    masked = torch.eye(*sim.shape, dtype=torch.bool, device=sim.device)
    easiest = sim.masked_fill(masked, torch.inf).argmin(dim=1)
    return torch.where((sim < own).any(dim=1), easier.argmax(dim=1), easiest)


def library(sim: Tensor, **options: Any) -> Tensor:
    return smk.sample_negatives(sim, **options).ids


def library_of_ranks(sim: Tensor, **options: Any) -> Tensor:
    """With the keys of other ranks the positives are no diagonal of a square."""
    return library(sim, positive=torch.arange(sim.shape[0], device=sim.device), **options)


LIBRARY = {SHAPES[0]: library, SHAPES[1]: library_of_ranks}


def weights(sim: Tensor) -> Tensor:
    """The softmax over the negatives, in float64."""
    own = torch.eye(*sim.shape, dtype=torch.bool, device=sim.device)
    return sim.double().masked_fill(own, -torch.inf).softmax(dim=1)


def check_draws(pair: Pair, found: Pair) -> None:
    """No positive, and columns as likely as softmax makes them, within 6 standard deviations."""
    for sim, ids in zip(pair, found, strict=True):
        chances = weights(sim)
        chosen = chances.gather(1, ids.unsqueeze(1))
        assert (chosen > 0).all()
        mean = chances.square().sum(dim=1)
        variance = (chances.pow(3).sum(dim=1) - mean.square()).sum()
        assert (chosen.sum() - mean.sum()).abs() <= 6 * variance.sqrt()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def bench_sample_negatives(
    compare: Callable[..., None], compiled: Callable[..., Any], shape: tuple[int, int]
) -> None:
    inputs = rotation(partial(similarities, shape=shape))
    compare(
        Case("sample_negatives", shape, torch.float32),
        {
            "sum of sim": lambda pair: [sim.sum() for sim in pair],
            **({"loop": both_ways(loop)} if shape == SHAPES[0] else {}),
            "multinomial": both_ways(drawn_at_once),
            **compiled(both_ways(drawn_at_once)),
            "this library": both_ways(LIBRARY[shape]),
        },
        inputs,
        partial(check_draws, inputs[0]),
    )


PLAIN_MODES: dict[str, Ids] = {
    "hardest": hardest_by_argmax,
    "semi_hard": semi_hard_by_argmax,
}


@pytest.mark.parametrize("mode", PLAIN_MODES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def bench_without_noise(
    compare: Callable[..., None],
    compiled: Callable[..., Any],
    shape: tuple[int, int],
    mode: str,
) -> None:
    inputs, plain = rotation(partial(similarities, shape=shape)), PLAIN_MODES[mode]
    wanted = both_ways(plain)(inputs[0])

    def check(found: Pair) -> None:
        assert all(map(torch.equal, found, wanted))

    compare(
        Case("sample_negatives", shape, torch.float32, mode),
        {
            "sum of sim": lambda pair: [sim.sum() for sim in pair],
            "argmax": both_ways(plain),
            **compiled(both_ways(plain)),
            "this library": both_ways(partial(LIBRARY[shape], mode=mode)),
        },
        inputs,
        check,
    )
