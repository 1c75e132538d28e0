"""The row of a backend's table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple


class Kernel(NamedTuple):
    """`run` serves the operator; `refuses` (where given) tells why it cannot serve a call."""

    run: Callable[..., Any]
    refuses: Callable[..., str | None] | None = None
