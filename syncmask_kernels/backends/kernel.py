"""The row of a backend's table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Kernel(NamedTuple):
    """`run` serves the operator; `refuses` (where given) tells why it cannot serve a call."""

    run: Callable[..., Any]
    refuses: Callable[..., str | None] | None = None


def refuses_float64(*call: Any) -> str | None:
    """What kernels say that compute in float32."""
    for given in call:
        if isinstance(given, Tensor) and given.dtype == torch.float64:
            return "float64 is served by eager only"
    return None


def refuses_compiling() -> str | None:
    """What kernels say that torch.compile gains nothing from, or cannot see through."""
    return "torch.compile traces eager only" if torch.compiler.is_compiling() else None
