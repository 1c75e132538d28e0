"""A kernel launch as data, so that what is launched can be compiled and looked at without a GPU."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Launch(NamedTuple):
    """One launch: `args` by name, the kernel's compile-time constants among them."""

    kernel: Any
    grid: tuple[int, ...]
    args: dict[str, Any]
    num_warps: int

    @property
    def options(self) -> dict[str, Any]:
        # Without fused multiply-add the device rounds as the interpreter and eager PyTorch do.
        return {"num_warps": self.num_warps, "enable_fp_fusion": False}


def run(launches: list[Launch], tensor: Tensor) -> None:
    """Launch in order, on the current stream of the tensor's device."""
    with torch.cuda.device_of(tensor):
        for launch in launches:
            launch.kernel[launch.grid](**launch.args, **launch.options)
