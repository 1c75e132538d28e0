from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from syncmask_kernels import backends


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Fill what `torch.empty` returns with NaN or the largest integer, also for the C++ kernels.

    An output element that a kernel forgets to write cannot then pass for a right one.
    """
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["eager", "cpu"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once on each backend that serves CPU tensors."""
    reason = backends.BACKENDS[request.param].unavailable("cpu")
    if reason is not None:
        pytest.skip(f"backend {request.param!r}: {reason}")
    with backends.use_backend(request.param):
        yield request.param
