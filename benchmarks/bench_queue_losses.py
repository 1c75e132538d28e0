"""queue_contrastive_loss, forward and backward, and enqueue_, against ALBEF's form."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import syncmask_kernels as smk
from benchmarks.checks import as_accurate
from benchmarks.measure import rotation
from benchmarks.report import Case

BATCH, DIM, QUEUE, ALPHA = 64, 256, 65_536, 0.4

Inputs = tuple[Tensor, ...]


def features(generator: torch.Generator) -> Inputs:
    """Features, keys and queues of both sides, and the temperature."""

    def normal(rows: int) -> Tensor:
        return F.normalize(torch.randn(rows, DIM, generator=generator), dim=1)

    queues = [normal(QUEUE).T.contiguous() for _ in range(2)]
    return *(normal(BATCH) for _ in range(4)), *queues, torch.tensor(0.07)


def plain_loss(
    image_feat: Tensor,
    text_feat: Tensor,
    image_key: Tensor,
    text_key: Tensor,
    image_queue: Tensor,
    text_queue: Tensor,
    temperature: Tensor,
) -> Tensor:
    with torch.no_grad():
        images = torch.cat([image_key.t(), image_queue.clone()], dim=1)
        texts = torch.cat([text_key.t(), text_queue.clone()], dim=1)
        own = torch.eye(text_key.shape[0], images.shape[1], dtype=images.dtype).to(images.device)
        i2t = ALPHA * (image_key @ texts / temperature).softmax(dim=1) + (1 - ALPHA) * own
        t2i = ALPHA * (text_key @ images / temperature).softmax(dim=1) + (1 - ALPHA) * own
    sim_i2t, sim_t2i = image_feat @ texts / temperature, text_feat @ images / temperature
    loss_i2t = -torch.sum(sim_i2t.log_softmax(dim=1) * i2t, dim=1).mean()
    loss_t2i = -torch.sum(sim_t2i.log_softmax(dim=1) * t2i, dim=1).mean()
    return (loss_i2t + loss_t2i) / 2


def loss_of_library(*inputs: Tensor) -> Tensor:
    return smk.queue_contrastive_loss(*inputs, alpha=ALPHA)[0]


def products(inputs: Inputs) -> None:
    """The six products that no form can do without."""
    image_feat, text_feat, image_key, text_key, image_queue, text_queue, _ = inputs
    for feat, key, queue in (
        (image_feat, image_key, text_queue),
        (text_feat, text_key, image_queue),
    ):
        logits = feat @ queue
        key @ queue
        logits @ queue.T


def with_gradients(loss: Callable[..., Tensor]) -> Callable[[Inputs], Inputs]:
    """Forward and backward: the loss, the gradients of the features and of the temperature."""

    def call(inputs: Inputs) -> Inputs:
        with torch.enable_grad():
            given = [x.detach() for x in inputs]
            leaves = [given[i].requires_grad_() for i in (0, 1, 6)]
            value = loss(*given)
            return value.detach(), *torch.autograd.grad(value, leaves)

    return call


def bench_queue_contrastive_loss(
    compare: Callable[..., None], compiled: Callable[..., Any]
) -> None:
    inputs = rotation(features)
    plain = with_gradients(plain_loss)
    own, truth = plain(inputs[0]), plain(tuple(x.double() for x in inputs[0]))
    compare(
        Case(
            "queue_contrastive_loss",
            (BATCH, DIM, QUEUE),
            torch.float32,
            "soft targets, forward and backward",
        ),
        {
            "the six products": products,
            "ALBEF": plain,
            **{name: with_gradients(f) for name, f in compiled(plain_loss).items()},
            "this library": with_gradients(loss_of_library),
        },
        inputs,
        as_accurate(own, truth),
    )


def plain_enqueue(inputs: Inputs) -> Tensor:
    """Where nothing wraps around; the host waits for the pointer."""
    queue, pointer, keys = inputs
    start = int(pointer)
    queue[:, start : start + len(keys)] = keys.T
    pointer[0] = (start + len(keys)) % queue.shape[1]
    return queue


def enqueue(inputs: Inputs) -> Tensor:
    smk.enqueue_(*inputs)
    return inputs[0]


@pytest.mark.parametrize("batch", [BATCH, 512])
def bench_enqueue_(compare: Callable[..., None], batch: int) -> None:
    inputs = rotation(
        lambda generator: (
            torch.zeros(DIM, QUEUE),
            torch.zeros(1, dtype=torch.int64),
            torch.randn(batch, DIM, generator=generator),
        )
    )
    queue, pointer, keys = inputs[0]

    def check(got: Tensor) -> None:
        wanted = torch.zeros_like(queue)
        wanted[:, :batch] = keys.T
        assert torch.equal(got, wanted)
        assert pointer.tolist() == [batch]
        queue.zero_()
        pointer.zero_()

    compare(
        Case("enqueue_", (batch, DIM, QUEUE), torch.float32),
        {
            "keys.T.contiguous()": lambda x: x[2].T.contiguous(),
            "ALBEF": plain_enqueue,
            "this library": enqueue,
        },
        inputs,
        check,
    )
