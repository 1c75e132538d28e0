"""One graph for all sizes: what tests ask of an operator under torch.compile."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._dynamo.testing import CompileCounterWithBackend


def assert_compiles_once(
    function: Callable[..., Any], calls: Sequence[tuple[Any, ...]], exact: bool = True
) -> None:
    """`function` compiles to one full graph with dynamic shapes and equals eager in every call."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, backend=counter, fullgraph=True, dynamic=True)
    for call in calls:
        tolerance = {"rtol": 0, "atol": 0} if exact else {}
        torch.testing.assert_close(compiled(*call), function(*call), **tolerance, equal_nan=True)
    assert counter.frame_count == 1
