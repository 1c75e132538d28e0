"""Calls of Triton kernels, on a GPU or in Triton's interpreter, whose outputs are guarded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

import syncmask_kernels as smk
from syncmask_kernels.backends import triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if triton.unavailable(DEVICE) is not None:
    pytest.skip("needs a CUDA device or TRITON_INTERPRET=1", allow_module_level=True)

GUARD = 64
POISON = {torch.bool: True, torch.uint8: 249} | dict.fromkeys(
    (torch.int16, torch.int32, torch.int64), -7
)


@contextmanager
def guarded_outputs() -> Iterator[None]:
    """Memory starts out filled with what is wrong, between guards that nothing may write to."""
    buffers = []

    def empty(size: Any, *, dtype: torch.dtype = torch.float32, device: Any = None) -> Tensor:
        count, poison = torch.Size(size).numel(), POISON.get(dtype, float("nan"))
        buffers.append(torch.full((count + 2 * GUARD,), poison, dtype=dtype, device=device))
        return buffers[-1][GUARD : GUARD + count].view(size)

    with mock.patch.object(torch, "empty", empty):
        yield
    for buffer in buffers:
        outside = torch.cat([buffer[:GUARD], buffer[-GUARD:]])
        wanted = torch.full_like(outside, POISON.get(buffer.dtype, float("nan")))
        torch.testing.assert_close(outside, wanted, rtol=0, atol=0, equal_nan=True)


def serve(op: Any, backend: str, arguments: dict[str, Any]) -> Any:
    """The answer on the CPU, to arguments on the CPU."""
    moved = {k: v.to(DEVICE) if isinstance(v, Tensor) else v for k, v in arguments.items()}
    with smk.use_backend(backend):
        if backend == "triton":
            with guarded_outputs():
                answer = op(**moved)
        else:
            answer = op(**moved)
    return answer.cpu() if isinstance(answer, Tensor) else type(answer)(*(t.cpu() for t in answer))


def inside_nan(tensor: Tensor) -> Tensor:
    """The same values as a view of a larger tensor, with NaN all around."""
    around = torch.full([2 * n + 3 for n in tensor.shape], float("nan"), dtype=tensor.dtype)
    view = around[tuple(slice(1, 2 * n + 1, 2) for n in tensor.shape)]
    return view.copy_(tensor)
