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


def _pair(values: tuple[int, int], like: Tensor) -> Tensor:
    """Two constants along the first of the dimensions of `like`, made on its device."""
    first, second = values
    pair = torch.arange(2, device=like.device) * (second - first) + first
    return pair.reshape(2, *(1,) * (like.dim() - 1))


def philox(seed: Tensor, even: Tensor, odd: Tensor) -> tuple[Tensor, Tensor]:
    """The random words 0 and 2 and the random words 1 and 3 of each counter.

    Words are int64 in [0, 2^32). `even` [2, ...] holds the counters' words 0 and 2, `odd` [2, ...]
    their words 1 and 3; the key is the low 32 bits of each of the two values of `seed`.
    """
    factor = _pair(MULTIPLIERS, even)
    factor_high, factor_low = factor >> 16, factor & 0xFFFF
    key = (seed & LOW_32).reshape(factor.shape)
    step = _pair(KEY_STEPS, even)
    for _ in range(ROUNDS):
        # The 64 bits of even * factor from products of 32 and 16 bits: int64 never overflows.
        upper, lower = even * factor_high, even * factor_low
        high = (upper + (lower >> 16)) >> 16
        low = (((upper & 0xFFFF) << 16) + lower) & LOW_32
        even, odd = high.flip(0) ^ odd ^ key, low.flip(0)
        key = (key + step) & LOW_32
    return even, odd


def philox_grid(seed: Tensor, rows: int, blocks: int) -> tuple[Tensor, Tensor]:
    """Words 0 and 2, and 1 and 3, of the counters (block, row, 0, 0): two of [2, rows, blocks]."""
    block = torch.arange(blocks, device=seed.device).expand(rows, blocks)
    row = torch.arange(rows, device=seed.device).unsqueeze(1).expand(rows, blocks)
    zero = torch.zeros_like(block)
    return philox(seed, torch.stack([block, zero]), torch.stack([row, zero]))


def philox_cells(seed: Tensor, rows: int, columns: int) -> Tensor:
    """int64 [rows, columns]: cell (row, n) is word n % 4 of the counter (n // 4, row, 0, 0)."""
    even, odd = philox_grid(seed, rows, (columns + 3) // 4)
    words = torch.stack([even[0], odd[0], even[1], odd[1]], dim=-1)
    return words.flatten(1)[:, :columns]


def gumbel(words: Tensor) -> Tensor:
    """Standard Gumbel noise, float32: ``-log(-log(u))`` with ``u = (word >> 9 + 1/2) / 2^23``.

    u is exact in float32 and inside (0, 1), so that the noise is finite.
    """
    u = ((words >> 9).to(torch.float32) + 0.5) * 2.0**-23
    return -torch.log(-torch.log(u))
