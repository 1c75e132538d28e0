"""A kernel launch as data, so that what is launched can be compiled and looked at without a GPU."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor


class Launch(NamedTuple):
    """One launch: `args` by name, the kernel's compile-time constants among them."""

    kernel: Any
    grid: tuple[int, ...]
    args: dict[str, Any]
    num_warps: int
    fused: bool = False

    @property
    def options(self) -> dict[str, Any]:
        # Without fused multiply-add the device rounds as the interpreter and eager PyTorch do. A
        # matrix product rounds in its own order anyway, and takes half the instructions with it.
        return {"num_warps": self.num_warps, "enable_fp_fusion": self.fused}


def run(launches: list[Launch], tensor: Tensor) -> None:
    """Launch in order, on the current stream of the tensor's device."""
    with torch.cuda.device_of(tensor):
        for launch in launches:
            launch.kernel[launch.grid](**launch.args, **launch.options)


def block(size: int) -> int:
    """The block that holds `size` positions."""
    return int(triton.next_power_of_2(max(size, 1)))


def warps(values: int, per_thread: int) -> int:
    return min(max(values // (32 * per_thread), 1), 16)


def strides(prefix: str, axes: str, tensor: Tensor) -> dict[str, int]:
    """The strides of a tensor by name: ``strides("q", "lbhtd", q)`` has q_l, q_b, ..."""
    return {f"{prefix}_{axis}": n for axis, n in zip(axes, tensor.stride(), strict=True)}


def contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()
