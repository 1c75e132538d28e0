"""The adapter of ALBEF: on a stand-in always, on the host itself where SYNCMASK_ALBEF names it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, distributed, nn

from syncmask_kernels.integrations import albef
from tests.accuracy import assert_as_accurate
from tests.hosts.albef import (
    Batch,
    Size,
    drawing,
    make_batch,
    make_draws,
    negatives_of,
    real_albef,
    standin,
)

ALPHA, PAIRS, WORDS, STEPS = 0.4, 8, 12, 50
TINY = Size(
    width=16, heads=2, text_layers=3, fusion_layer=1, vocabulary=120, image=32, embed=8, queue=32
)


class Maker(NamedTuple):
    """`make()` -> a model with the same weights each time, in training mode."""

    size: Size
    build: Callable[[Size], nn.Module]

    def __call__(self, **given: Any) -> nn.Module:
        torch.manual_seed(0)
        return self.build(self.size._replace(**given)).train()

    def batch(self, seed: int, pairs: int = PAIRS) -> Batch:
        return make_batch(self.size, pairs, WORDS, generator(seed))


@pytest.fixture
def group() -> Iterator[None]:
    """One process, which the host does not work without."""
    store = distributed.HashStore()
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.fixture(params=["stand-in", "ALBEF"])
def make(request, tmp_path, group) -> Maker:
    if request.param == "stand-in":
        return Maker(TINY, standin)
    return Maker(Size(), partial(real_albef, tmp_path))


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def host_step(model, batch, draws):
    torch.set_default_dtype(batch.image.dtype)  # the host adds one-hot targets of that type
    with drawing(model, draws):
        losses = model(batch.image, batch.text, alpha=ALPHA)
    torch.set_default_dtype(torch.float32)
    return losses


def patched_step(model, batch, draws):
    negatives, words = negatives_of(draws), draws.words
    return model(batch.image, batch.text, alpha=ALPHA, negatives=negatives, words=words)


def run_step(make: Maker, model: nn.Module, step: Any, i: int) -> dict[str, Tensor]:
    """The i-th step of training: its losses and gradients, and all that it leaves in the model."""
    batch = make.batch(i)
    draws = make_draws(batch, make.size, generator(1000 + i))
    losses = step(model, batch._replace(image=batch.image.to(model.temp.dtype)), draws)
    model.zero_grad()
    sum(losses).backward()
    learned = [p for p in model.parameters() if p.requires_grad]
    torch.optim.SGD(learned, lr=0.05).step()
    left = {f"loss {i}": loss.detach() for i, loss in enumerate(losses)}
    grads = ((f"grad {name}", p.grad) for name, p in model.named_parameters())
    left |= {name: grad for name, grad in grads if grad is not None}
    return left | {name: t.clone() for name, t in model.state_dict().items()}


def test_fifty_steps_are_those_of_the_host(make):
    host, ours = make().double(), make().double()
    albef.patch(ours)
    start = {name: t.clone() for name, t in ours.state_dict().items()}
    for i in range(STEPS):
        wanted, got = run_step(make, host, host_step, i), run_step(make, ours, patched_step, i)
        assert wanted.keys() == got.keys()
        for name in wanted:
            torch.testing.assert_close(
                got[name], wanted[name], rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}"
            )
    learned = {n for n, t in ours.state_dict().items() if not torch.equal(t, start[n])}
    assert {"temp", "image_queue", "text_encoder_m.cls.predictions.decoder.bias"} <= learned
    assert ours.queue_ptr == STEPS * PAIRS % make.size.queue


def test_single_precision_is_as_accurate_as_that_of_the_host(make):
    """From the same state in each step, because differences grow as training goes on."""
    truth, host, ours = make().double(), make(), make()
    albef.patch(ours)
    errors = [[], [], []]
    for i in range(6):
        for model in (host, ours):
            model.load_state_dict(truth.state_dict())
        steps = (ours, patched_step), (host, host_step), (truth, host_step)
        for into, (model, step) in zip(errors, steps, strict=True):
            into.append(run_step(make, model, step, i))
    for kind in ("loss", "grad", "image_queue", "text_queue", "text_encoder_m"):
        flat = (
            torch.cat([t.flatten() for left in run for n, t in left.items() if n.startswith(kind)])
            for run in errors
        )
        assert_as_accurate(*flat)
