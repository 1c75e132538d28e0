"""Calls of masked_linear_cross_entropy, forward and backward, that tests and budgets run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import syncmask_kernels as smk

HEAD = ("hidden", "weight", "bias")


def loss_and_gradients(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    hidden_t: Tensor | None = None,
    weight_t: Tensor | None = None,
    times: float = 1.0,
    **options: Any,
) -> tuple[Tensor, ...]:
    """Of a loss that is multiplied, as a gradient scaler does."""
    leaves = [x.detach().requires_grad_() for x in (hidden, weight, bias)]
    if hidden_t is not None:
        options["teacher"] = hidden_t, weight_t, None
    loss = smk.masked_linear_cross_entropy(*leaves[:2], bias=leaves[2], **options)
    return loss.detach(), *torch.autograd.grad(times * loss, leaves)


def cross_entropy(
    rows: int,
    width: int,
    vocabulary: int,
    dtype: torch.dtype = torch.float32,
    weights: torch.dtype | None = None,
    *,
    gathered: bool = False,
    teacher: str = "",
    smoothing: float = 0.0,
    times: float = 3.0,
) -> tuple[Callable[..., Any], dict[str, Any]]:
    """A third of the rows is labelled; a teacher is a "head" or "soft" labels."""
    generator = torch.Generator().manual_seed(rows)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def head() -> tuple[Tensor, ...]:
        hidden, weight = normal(rows, width).to(dtype), normal(vocabulary, width)
        return hidden, weight.to(weights or dtype), normal(vocabulary).to(weights or dtype)

    given: dict[str, Any] = dict(zip(HEAD, head(), strict=True))
    given["labels"] = torch.randint(vocabulary, (rows,), generator=generator)
    order = torch.randperm(rows, generator=generator)
    given["labels"][order[rows // 3 :]] = -100
    given |= {"label_smoothing": smoothing, "times": times}
    if gathered:
        given["ids"] = torch.cat([order[: rows // 2], torch.tensor([-1])])
    if teacher == "soft":
        given["soft_labels"] = normal(rows, vocabulary).softmax(dim=-1)
    if teacher == "head":
        given["hidden_t"], given["weight_t"], _ = head()
    if teacher:
        given["alpha"] = 0.4
    return loss_and_gradients, given
