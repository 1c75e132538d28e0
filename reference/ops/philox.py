"""Philox4x32-10 with Python integers (Salmon et al., SC 2011, algorithm of Random123)."""

from __future__ import annotations

import math

Words = tuple[int, int, int, int]


def philox(key: tuple[int, int], counter: Words) -> Words:
    """Four random words in [0, 2^32) for a key of two words and a counter of four."""
    k0, k1 = key
    c0, c1, c2, c3 = counter
    for _ in range(10):
        first, second = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1 = (second >> 32) ^ c1 ^ k0, second % 2**32
        c2, c3 = (first >> 32) ^ c3 ^ k1, first % 2**32
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c0, c1, c2, c3


def seed_key(seed: list[int]) -> tuple[int, int]:
    """The key of an operator's seed: the low 32 bits of its two values."""
    first, second = seed
    return first % 2**32, second % 2**32


def gumbel(word: int) -> float:
    """Standard Gumbel noise from a random word, of which the upper 23 bits count."""
    u = (word // 2**9 + 0.5) / 2**23
    return -math.log(-math.log(u))
