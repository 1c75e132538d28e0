"""The launch of the Triton kernels that choose negatives, and the operator made of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from syncmask_kernels.backends import overloads
from syncmask_kernels.backends.overloads.negatives import MODES
from syncmask_kernels.backends.triton import INTERPRETED
from syncmask_kernels.backends.triton.launch import Launch, block, contiguous, run, strides, warps
from syncmask_kernels.backends.triton.negatives_kernels import below_kernel, largest_kernel

MIN_COLUMNS = 32  # of a block: a column a thread
MAX_COLUMNS = 2048


def negatives_launches(
    sim: Tensor,
    positive: Tensor | None,
    exclude: Tensor | None,
    row_ids: Tensor | None,
    col_ids: Tensor | None,
    mode: int,
    margin: float,
    num: int,
    den: int,
    seed: Tensor | None,
    noise: Tensor | None,
) -> tuple[tuple[Tensor, Tensor], list[Launch]]:
    """ids and found, not yet written, and the launch that writes them."""
    rows, columns = sim.shape
    ids = torch.empty((rows,), dtype=torch.int64, device=sim.device)
    found = torch.empty((rows,), dtype=torch.bool, device=sim.device)
    size = min(max(block(columns), MIN_COLUMNS), MAX_COLUMNS)
    args: dict[str, Any] = {
        "sim": sim,
        "positive": contiguous(positive),
        "exclude": contiguous(exclude),
        "row_ids": contiguous(row_ids),
        "col_ids": contiguous(col_ids),
        "ids": ids,
        "found": found,
        "N": columns,
        "DIAGONAL": rows == columns,
        "BLOCK": size,
    } | strides("sim", "bn", sim)
    more: dict[str, Any]
    if MODES[mode] == "semi_hard":
        kernel, more = below_kernel, {"margin": float(margin), "num": num, "den": den}
    else:
        drawn = contiguous(seed) if MODES[mode] == "multinomial" else None
        kernel, more = largest_kernel, {"seed": drawn, "noise": contiguous(noise)}
    launch = Launch(kernel, (rows,), args | more, warps(size, 8))
    return (ids, found), [launch] if rows > 0 else []


sample_negatives = overloads.define("sample_negatives", "triton")


def _run_sample_negatives(sim: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    outputs, launches = negatives_launches(sim, *rest)
    run(launches, sim)
    return outputs


for _device in ("cpu", "cuda") if INTERPRETED else ("cuda",):
    torch.library.impl("syncmask::sample_negatives.triton", _device, _run_sample_negatives)
