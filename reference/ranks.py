"""Training in several processes, started by ``torchrun``: who they are and what they share.

Every process knows the whole data set and takes its rows of each global batch. Gradients are
averaged by DistributedDataParallel; what a loss needs beyond that from other ranks is here.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, distributed


def size() -> int:
    """The number of processes."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def rank() -> int:
    """The number of this process."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def device() -> torch.device:
    """The device of this process."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("cpu")


@contextmanager
def process_group() -> Iterator[None]:
    """The group of the processes that ``torchrun`` started; of none where it did not."""
    if "WORLD_SIZE" not in os.environ or distributed.is_initialized():
        yield
        return
    own = device()
    if own.type == "cuda":
        torch.cuda.set_device(own)
    distributed.init_process_group("nccl" if own.type == "cuda" else "gloo")
    try:
        yield
    finally:
        distributed.destroy_process_group()


def wait() -> None:
    """For all ranks to come here."""
    if size() > 1:
        distributed.barrier()


class _OfAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(size())]
        distributed.all_gather(parts, x)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        grad = grad.contiguous()
        distributed.all_reduce(grad)
        return grad.chunk(size())[rank()]


def of_all(x: Tensor) -> Tensor:
    """``[B, ...]`` of all ranks, in their order; gradients flow back to the rank of each row."""
    if size() == 1:
        return x
    gathered: Tensor = _OfAll.apply(x.contiguous())
    return gathered


def mean(x: Tensor) -> Tensor:
    """The mean of a tensor over the ranks, without gradient."""
    if size() == 1:
        return x
    total = x.detach().clone()
    distributed.all_reduce(total)
    return total / size()


def gathered(value: Any) -> list[Any] | None:
    """The values of all ranks, in their order, on the first rank."""
    if size() == 1:
        return [value]
    values = [None] * size() if rank() == 0 else None
    distributed.gather_object(value, values)
    return values


def share(loss: Tensor, count: Tensor) -> Tensor:
    """`loss`, the mean over `count` positions of this rank, as its part of the mean over all ranks.

    The gradients of ranks are averaged, so the mean of the parts is what counts.
    """
    if size() == 1:
        return loss
    count = count.to(loss.dtype)
    return loss * count / mean(count).clamp(min=1)
