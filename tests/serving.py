"""A backend for tests that leaves gradients to the library."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

from syncmask_kernels import backends
from syncmask_kernels.backends.eager import KERNELS
from syncmask_kernels.backends.kernel import Kernel


@contextmanager
def backend_without_autograd() -> Iterator[None]:
    """A backend of eager's forwards, float64 too, whose gradients are the library's own."""

    def opaque(kernel: Kernel) -> Kernel:
        def run(*arguments: Any) -> Any:
            return kernel.run(*arguments)

        return Kernel(run)

    module = SimpleNamespace(
        KERNELS={op: opaque(kernel) for op, kernel in KERNELS.items()},
        unavailable=lambda device_type: None,
    )
    with (
        mock.patch.dict(backends.BACKENDS, {"without autograd": module}),
        backends.use_backend("without autograd"),
    ):
        yield
