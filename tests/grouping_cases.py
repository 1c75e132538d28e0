"""Features whose products are exact in float32, so that every backend has the same similarities."""

from __future__ import annotations

import torch
from torch import Tensor

INF, NAN = float("inf"), float("nan")
MODES = ["hardest", "semi_hard"]


def whole_numbers(size: int, dim: int, most: int = 3) -> tuple[Tensor, Tensor]:
    """Image and text features [size, dim]; small numbers make many ties."""
    generator = torch.Generator().manual_seed(size + 1000 * dim + most)
    drawn = torch.randint(-most, most + 1, (2, size, dim), generator=generator).float()
    return drawn[0], drawn[1]


def items(size: int, kinds: int) -> Tensor:
    """Ids beyond 32 bits that differ only there."""
    generator = torch.Generator().manual_seed(size)
    return torch.randint(kinds, (size,), generator=generator) << 32


def broken(size: int) -> tuple[Tensor, Tensor]:
    """NaN, infinities, zeros, and rows so large or so small that products overflow or vanish."""
    image, text = whole_numbers(size, 9)
    for side, shift in ((image, 0), (text, 3)):
        side[shift + 1 :: 11, 2] = NAN
        side[shift + 2 :: 13, 0] = INF
        side[shift + 3 :: 13, 1] = -INF
        side[shift::7] = 0.0
        side[shift + 4 :: 17] *= 2.0**60
        side[shift + 5 :: 17] *= 2.0**-60
        side[shift + 6 :: 17] *= 2.0**-10
    return image, text
