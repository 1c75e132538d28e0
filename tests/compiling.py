"""One graph for all sizes: what tests ask of an operator under torch.compile."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend


def assert_compiles_once(
    function: Callable[..., Any],
    calls: Sequence[tuple[Any, ...]],
    through: str = "aot_eager",
    **tolerance: float,
) -> None:
    """`function` is one full graph, for all `calls`, and returns what eager returns.

    So are its gradients, where arguments require them. The first call may compile more than once (a
    float becomes a constant), the others not at all. `through` names the compiler's backend.
    """
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(through)
    compiled = torch.compile(function, backend=counter, fullgraph=True, dynamic=True)
    compiled(*calls[0])
    graphs = counter.frame_count
    assert graphs > 0
    tolerance = tolerance or {"rtol": 0, "atol": 0}
    for call in calls:
        got, wanted = compiled(*call), function(*call)
        torch.testing.assert_close(got, wanted, **tolerance, equal_nan=True)
        grads = [_gradients(result, call) for result in (got, wanted)]
        torch.testing.assert_close(*grads, **tolerance, equal_nan=True)
    assert counter.frame_count == graphs


def _gradients(result: Any, call: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """Of all floating results, by the arguments that require gradients."""
    leaves = [x for x in call if isinstance(x, Tensor) and x.requires_grad]
    if not leaves:
        return ()
    results = [result] if isinstance(result, Tensor) else list(result)
    recorded = [part for part in results if part.requires_grad]
    slopes = [torch.arange(part.numel()).reshape(part.shape).to(part) for part in recorded]
    return torch.autograd.grad(recorded, leaves, slopes, materialize_grads=True)
