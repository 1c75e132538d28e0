"""masked_linear_cross_entropy, forward and backward, against PyTorch and its matrix products."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import syncmask_kernels as smk
from benchmarks.checks import as_accurate
from benchmarks.measure import DEVICE, rotation
from benchmarks.report import Case

# Batch, positions, width, vocabulary and labelled rows: words as in ALBEF, 15 % of them masked,
# and codes of patches, 75 of 256 masked.
SHAPES = [(64, 30, 768, 30_522, 288), (16, 256, 768, 8192, 1200)]
DTYPES = [torch.float32] if DEVICE == "cpu" else [torch.float32, torch.bfloat16]
ALPHA = 0.4
# Kernels of others take all rows, and need a GPU and half types: package, and what to call.
PEERS = {
    "Cut Cross Entropy": ("cut_cross_entropy", "linear_cross_entropy"),
    "Liger Kernel": ("liger_kernel.transformers.functional", "liger_fused_linear_cross_entropy"),
}

Inputs = tuple[
    Tensor, ...
]  # hidden, weight, bias, labels and, to distil, the teacher's first three


def drawn(
    generator: torch.Generator,
    shape: tuple[int, ...],
    distilled: bool,
    dtype: torch.dtype = torch.float32,
) -> Inputs:
    batch, positions, width, vocabulary, labelled = shape

    def head() -> Inputs:
        hidden = torch.randn(batch, positions, width, generator=generator)
        weight = torch.randn(vocabulary, width, generator=generator) / width**0.5
        return hidden.to(dtype), weight.to(dtype), torch.zeros(vocabulary, dtype=dtype)

    labels = torch.full((batch * positions,), -100)
    rows = torch.randperm(batch * positions, generator=generator)[:labelled]
    labels[rows] = torch.randint(vocabulary, (labelled,), generator=generator)
    return *head(), labels.view(batch, positions), *(head() if distilled else ())


def all_rows(
    hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, *teacher: Tensor
) -> Tensor:
    """As ALBEF does."""
    logits, flat = F.linear(hidden, weight, bias).flatten(0, 1), labels.flatten()
    loss = F.cross_entropy(logits, flat)
    if not teacher:
        return loss
    with torch.no_grad():
        soft = F.linear(*teacher).flatten(0, 1).softmax(dim=1)
    distilled = -(logits.log_softmax(dim=1) * soft).sum(dim=1)[flat != -100].mean()
    return (1 - ALPHA) * loss + ALPHA * distilled


def gathered(inputs: Inputs) -> Inputs:
    """The same with the labelled rows alone."""
    hidden, weight, bias, labels, *teacher = inputs
    keep = labels != -100
    student = hidden[keep].unsqueeze(0), weight, bias, labels[keep].unsqueeze(0)
    return (*student, teacher[0][keep].unsqueeze(0), *teacher[1:]) if teacher else student


def gather_first(*inputs: Tensor) -> Tensor:
    return all_rows(*gathered(inputs))


def linear_cross_entropy(*inputs: Tensor) -> Tensor:
    hidden, weight, bias, labels = gathered(inputs)
    return F.linear_cross_entropy(hidden[0], weight, labels[0], linear_bias=bias)


def with_gradients(loss: Callable[..., Tensor]) -> Callable[[Inputs], Inputs]:
    """Forward and backward: the loss, and the gradients of hidden, weight and bias."""

    def call(inputs: Inputs) -> Inputs:
        with torch.enable_grad():
            given = [x.detach() for x in inputs]
            leaves = [x.requires_grad_() for x in given[:3]]
            value = loss(*given)
            return value.detach(), *torch.autograd.grad(value, leaves)

    return call


def peers(dtype: torch.dtype) -> dict[str, Callable[[Inputs], Inputs]]:
    """What others fuse, where it is installed."""
    found = {}
    for name, (module, function) in PEERS.items() if dtype == torch.bfloat16 else ():
        package = module.partition(".")[0]
        if find_spec(package) is None:
            warnings.warn(f"{name} is left out: {package} is not installed", stacklevel=2)
            continue
        fused = getattr(import_module(module), function)

        def loss(hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
            value: Tensor = fused(hidden.flatten(0, 1), weight, labels.flatten(), bias=bias)  # noqa: B023
            return value

        found[name] = with_gradients(loss)
    return found


def products(inputs: Inputs) -> Inputs:
    """The matrix products on the labelled rows that no form can do without."""
    hidden, weight, _, _, *teacher = (x.squeeze(0) for x in gathered(inputs))
    logits = hidden @ weight.T
    found = logits @ weight, logits.T @ hidden
    return (*found, teacher[0] @ teacher[1].T) if teacher else found


@pytest.mark.parametrize("distilled", [False, True], ids=["labels", "teacher"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def bench_masked_linear_cross_entropy(
    compare: Callable[..., None],
    compiled: Callable[..., Any],
    shape: tuple[int, ...],
    dtype: torch.dtype,
    distilled: bool,
) -> None:
    inputs = rotation(lambda generator: drawn(generator, shape, distilled, dtype))

    def library(
        hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, *teacher: Tensor
    ) -> Tensor:
        options: dict[str, Any] = {"teacher": teacher, "alpha": ALPHA} if teacher else {}
        return smk.masked_linear_cross_entropy(
            hidden, weight, labels, bias=bias, capacity=shape[-1], **options
        )

    plain, ours = with_gradients(gather_first), with_gradients(library)
    own, truth = plain(inputs[0]), plain(tuple(_double(x) for x in inputs[0]))
    as_accurate(own, truth, 2.0)(ours(inputs[0]))
    contenders = {
        "four products" if distilled else "three products": products,
        "gather, then F.cross_entropy": plain,
        **{name: with_gradients(f) for name, f in compiled(gather_first).items()},
    }
    if not distilled:
        contenders["all rows, as ALBEF"] = with_gradients(all_rows)
        contenders["gather, then F.linear_cross_entropy"] = with_gradients(linear_cross_entropy)
        contenders |= peers(dtype)
    contenders["this library"] = ours
    note = ("teacher" if distilled else "labels") + ", forward and backward"
    compare(
        Case("masked_linear_cross_entropy", shape, dtype, note),
        contenders,
        inputs,
        # Inductor sums up the gradient of the bias one by one: 7 times the error of PyTorch.
        as_accurate(own, truth, 16.0),
    )


def _double(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor
