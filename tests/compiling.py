"""One graph for all sizes: what tests ask of an operator under torch.compile."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._dynamo.testing import CompileCounterWithBackend


def assert_compiles_once(
    function: Callable[..., Any], calls: Sequence[tuple[Any, ...]], **tolerance: float
) -> None:
    """`function` is one full graph, for all `calls`, and returns what eager returns.

    The first call may compile more than once (a float becomes a constant), the others not at all.
    """
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, backend=counter, fullgraph=True, dynamic=True)
    compiled(*calls[0])
    graphs = counter.frame_count
    assert graphs > 0
    tolerance = tolerance or {"rtol": 0, "atol": 0}
    for call in calls:
        torch.testing.assert_close(compiled(*call), function(*call), **tolerance, equal_nan=True)
    assert counter.frame_count == graphs
