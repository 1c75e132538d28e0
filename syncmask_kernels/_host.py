"""What the host does before an operator runs: read a ratio, draw a seed, look at values."""

from __future__ import annotations

from fractions import Fraction
from functools import lru_cache

import torch
from torch import Tensor

from syncmask_kernels import _checks


def _as_fraction(share: float) -> tuple[int, int]:
    exact = Fraction(float(share)).limit_denominator(10**6)
    return exact.numerator, exact.denominator


_remembered_fraction = lru_cache(_as_fraction)


def as_fraction(share: float) -> tuple[int, int]:
    """Numerator and denominator of a share, exact where a float would round (0.07 of 100 is 7)."""
    # torch.compile traces the plain function; it would warn about the cache.
    return (_as_fraction if torch.compiler.is_compiling() else _remembered_fraction)(share)


def ids_within(name: str, ids: Tensor, low: int, high: int, of: str) -> None:
    """ValueError where an id is outside ``[low, high)``; `of` is the name of `high`.

    Looks only at what the host sees without waiting: tensors on the CPU, outside torch.compile.
    """
    if ids.device.type != "cpu" or torch.compiler.is_compiling() or ids.numel() == 0:
        return
    smallest, largest = (int(bound) for bound in ids.aminmax())
    if smallest < low or largest >= high:
        wrong = smallest if smallest < low else largest
        raise ValueError(f"{name} must be in [{low}, {of}) = [{low}, {high}), got {wrong}")


def check_seed(
    seed: Tensor | None, generator: torch.Generator | None, device: torch.device
) -> None:
    if seed is not None and generator is not None:
        raise ValueError("at most one of seed and generator must be given, got both")
    if generator is not None and generator.device.type != device.type:
        raise ValueError(f"generator must be on {device}, got {generator.device}")
    if seed is not None:
        _checks.dtype("seed", seed, torch.int64)
        _checks.shape("seed", seed, "two values", (2,))
        if seed.device != device:
            raise ValueError(f"seed must be on {device}, got {seed.device}")


def philox_seed(
    seed: Tensor | None, generator: torch.Generator | None, device: torch.device
) -> Tensor:
    """The caller's seed, checked, or two values drawn on `device` from `generator`."""
    if seed is not None or generator is not None:
        check_seed(seed, generator, device)
    if seed is not None:
        return seed
    return torch.randint(2**32, (2,), device=device, generator=generator)
