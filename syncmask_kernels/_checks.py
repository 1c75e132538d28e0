"""Argument checks of the public functions: name the argument, what came, what is wanted."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from numbers import Real

import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")


def rank(name: str, value: Tensor, *layouts: str) -> None:
    """`layouts` such as "[B, H, T, S]": the tensor must have as many dimensions as one of them."""
    if not isinstance(value, Tensor):
        tensor(name, value)
    dimensions = value.dim()
    for layout in layouts:
        if dimensions == layout.count(",") + 1:
            return
    raise ValueError(f"{name} must be {' or '.join(layouts)}, got shape {tuple(value.shape)}")


def shape(name: str, value: Tensor, layout: str, sizes: Sequence[int]) -> None:
    tensor(name, value)
    if tuple(value.shape) != tuple(sizes):
        raise ValueError(
            f"{name} must be {layout} = {tuple(sizes)}, got shape {tuple(value.shape)}"
        )


def dtype(name: str, value: Tensor, *wanted: torch.dtype) -> None:
    tensor(name, value)
    if value.dtype not in wanted:
        names = " or ".join(str(d).removeprefix("torch.") for d in wanted)
        got = str(value.dtype).removeprefix("torch.")
        raise TypeError(f"{name} must be of type {names}, got {got}")


def floating(name: str, value: Tensor, *layouts: str) -> None:
    """A tensor of floats, and of one of the `layouts` (see `rank`) where any are given."""
    if not isinstance(value, Tensor) or value.dtype not in FLOATS:
        dtype(name, value, *FLOATS)
    if layouts:
        rank(name, value, *layouts)


def same_device(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    if value.device != other.device:
        raise ValueError(
            f"{name} must be on the device of {other_name} ({other.device}), got {value.device}"
        )


def mask(
    name: str,
    value: Tensor | None,
    layout: str,
    sizes: Sequence[int],
    other_name: str,
    other: Tensor,
) -> None:
    """An optional bool tensor beside `other`."""
    if value is not None:
        dtype(name, value, torch.bool)
        shape(name, value, layout, sizes)
        same_device(name, value, other_name, other)


def ids(
    name: str, value: Tensor, layout: str, sizes: Sequence[int], other_name: str, other: Tensor
) -> None:
    """An int64 tensor beside `other`."""
    dtype(name, value, torch.int64)
    shape(name, value, layout, sizes)
    same_device(name, value, other_name, other)


def number(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (Real, torch.SymInt, torch.SymFloat)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")


def finite(name: str, value: float) -> float:
    """A number that a float holds, as a float."""
    number(name, value)
    if not isinstance(value, Real):
        return value  # symbolic
    if not abs(value) <= sys.float_info.max:
        raise ValueError(f"{name} must be finite, got {value}")
    return float(value)


def integer(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")


def count(name: str, value: int) -> None:
    integer(name, value)
    if value < 0:
        raise ValueError(f"{name} must be at least 0, got {value}")
    if value >= 2**63:
        raise ValueError(f"{name} must fit into 64 bits, got {value}")


def fraction(name: str, value: float) -> None:
    number(name, value)
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name} must be in [0, 1], got {value}")


def index(name: str, value: int, size: int, of: str) -> None:
    integer(name, value)
    if not 0 <= value < max(size, 1):
        raise ValueError(f"{name} must be in [0, {of}) = [0, {size}), got {value}")


def choice(name: str, value: object, allowed: Sequence[str]) -> None:
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")
