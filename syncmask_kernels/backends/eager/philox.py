"""Philox4x32-10 in plain PyTorch integers.

Counter-based randomness (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011;
equal to Random123 and to Triton's `tl.philox`): the integers depend on the key and the counter
alone, so every backend reproduces them, in any order and in any batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDS = 10
LOW_32 = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)

Words = tuple[Tensor, Tensor, Tensor, Tensor]


def _multiply(factor: int, word: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a 32 x 32 bit product, no step of which leaves int64."""
    upper, lower = word * (factor >> 16), word * (factor & 0xFFFF)
    high = (upper + (lower >> 16)) >> 16
    low = (((upper & 0xFFFF) << 16) + lower) & LOW_32
    return high, low


def philox(seed: Tensor, counter: Words) -> Words:
    """Four random words for each counter; all words are int64 tensors with values in [0, 2^32).

    The key is the low 32 bits of each of the two values of `seed`.
    """
    c0, c1, c2, c3 = counter
    key = seed & LOW_32
    for round_ in range(ROUNDS):
        k0 = (key[0] + round_ * KEY_STEPS[0]) & LOW_32
        k1 = (key[1] + round_ * KEY_STEPS[1]) & LOW_32
        high_a, low_a = _multiply(MULTIPLIERS[0], c0)
        high_b, low_b = _multiply(MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high_b ^ c1 ^ k0, low_b, high_a ^ c3 ^ k1, low_a
    return c0, c1, c2, c3


def philox_grid(seed: Tensor, rows: int, columns: int) -> Tensor:
    """A word in [0, 2^32) for each cell, int64 [rows, columns].

    Cell (row, column) is word ``column % 4`` of the counter ``(column // 4, row, 0, 0)``.
    """
    block = torch.arange((columns + 3) // 4, device=seed.device).unsqueeze(0)
    row = torch.arange(rows, device=seed.device).unsqueeze(1)
    zero = torch.zeros_like(block)
    words = torch.stack(torch.broadcast_tensors(*philox(seed, (block, row, zero, zero))), dim=-1)
    return words.flatten(1)[:, :columns]


def gumbel(words: Tensor) -> Tensor:
    """Standard Gumbel noise, float32: ``-log(-log(u))`` with ``u = (word >> 9 + 1/2) / 2^23``.

    u is exact in float32 and inside (0, 1), so that the noise is finite.
    """
    u = ((words >> 9).to(torch.float32) + 0.5) * 2.0**-23
    return -torch.log(-torch.log(u))
