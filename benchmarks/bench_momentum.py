"""ema_update_ of ViT-B and BERT-base against torch._foreach_lerp_ and ALBEF's loop."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import syncmask_kernels as smk
from benchmarks.measure import DEVICE
from benchmarks.report import Case

WIDTH, LAYERS, VOCABULARY, PATCHES, MOMENTUM = 768, 12, 30522, 256, 0.995

Models = tuple[list[Tensor], list[Tensor]]


def shapes() -> list[tuple[int, ...]]:
    """Of the parameters: embeddings, and layers of attention and feed-forward with their norms."""
    matrices = [(WIDTH, WIDTH)] * 4 + [(4 * WIDTH, WIDTH), (WIDTH, 4 * WIDTH)]
    layer = [*matrices, *((rows,) for rows, _ in matrices), *[(WIDTH,)] * 4]
    image = [(WIDTH, 3, 16, 16), (WIDTH,), (1, PATCHES + 1, WIDTH), (1, 1, WIDTH)]
    words = [(VOCABULARY, WIDTH), (512, WIDTH), (2, WIDTH)]
    return [*image, *words, *[(WIDTH,)] * 4, *layer * (2 * LAYERS)]


def models() -> Models:
    generator = torch.Generator().manual_seed(0)
    teacher, student = (
        [torch.randn(shape, generator=generator).to(DEVICE) for shape in shapes()] for _ in range(2)
    )
    return teacher, student


def albef(inputs: Models) -> list[Tensor]:
    for teacher, student in zip(*inputs, strict=True):
        teacher.data = teacher.data * MOMENTUM + student.data * (1.0 - MOMENTUM)
    return inputs[0]


def foreach(inputs: Models) -> list[Tensor]:
    torch._foreach_lerp_(*inputs, 1.0 - MOMENTUM)
    return inputs[0]


def ours(inputs: Models) -> list[Tensor]:
    smk.ema_update_(*inputs, MOMENTUM)
    return inputs[0]


def copied(inputs: Models) -> None:
    """Half of the traffic that an update needs, and one write."""
    torch._foreach_copy_(inputs[0], inputs[1])


def bench_ema_update_(compare: Callable[..., None]) -> None:
    inputs = models()
    before = [t.clone() for t in inputs[0][-20:]]

    def check(teacher: list[Tensor]) -> None:
        """One update further than at the check before."""
        for moved, old, student in zip(teacher[-20:], before, inputs[1][-20:], strict=True):
            wanted = MOMENTUM * old.double() + (1 - MOMENTUM) * student.double()
            torch.testing.assert_close(moved.double(), wanted, rtol=1e-6, atol=1e-6)
            old.copy_(moved)

    count = sum(t.numel() for t in inputs[0])
    compare(
        Case("ema_update_", (len(inputs[0]), count), torch.float32, "ViT-B and BERT-base"),
        {"a copy": copied, "ALBEF": albef, "foreach": foreach, "this library": ours},
        [inputs],
        check,
    )
