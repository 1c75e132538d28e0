"""The contrast with a queue: PyTorch's matrix products, and what lies between them.

With float32 keys and 64 queries the products are far more work than the memory they touch. So the
logits stay in one buffer, and unlike in a softmax that follows the keys, student and teacher share
the last product: three of B rows in the place of four, each in the float32 that PyTorch is set to.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
from torch import Tensor

from syncmask_kernels.backends import overloads
from syncmask_kernels.backends.eager.attention import product
from syncmask_kernels.backends.queue_losses_request import Keys
from syncmask_kernels.backends.triton import INTERPRETED
from syncmask_kernels.backends.triton.launch import Launch, block, contiguous, run, warps
from syncmask_kernels.backends.triton.queue_losses_kernels import slope_kernel, sums_kernel

COLUMNS = 4096  # of a row of logits that one program holds
CAST_COLUMNS = 16384  # of a queue of another type that are cast at a time
SUMS = 7  # that `sums_kernel` leaves of a part


def slope_launches(
    logits: Tensor,
    own_ids: Tensor,
    queue_ids: Tensor | None,
    columns: int,
    distilled: bool,
    alpha: float,
    alpha_at: Tensor | None,
) -> tuple[Tensor, list[Launch]]:
    """Row losses [B], and the launches that write them, and the gradient over the logits.

    `logits` are flat: [R, Q] with the queue, [R, B] with the batch's own keys, of the student and,
    where it is distilled, as many rows of the teacher; the gradient takes the student's place.
    """
    batch = own_ids.shape[0]
    size = min(block(max(batch, columns)), COLUMNS)
    own_parts = triton.cdiv(batch, size)
    parts = own_parts + triton.cdiv(columns, size)
    losses = torch.empty((batch,), device=logits.device)
    both = {
        "logits": logits,
        "own_ids": own_ids.contiguous(),
        "queue_ids": contiguous(queue_ids),
        "sums": torch.empty((SUMS, batch, parts), device=logits.device),
        "B": batch,
        "Q": columns,
        "own_parts": own_parts,
        "parts": parts,
        "TEACHER": distilled,
        "BLOCK": size,
    }
    slope = {"losses": losses, "alpha": alpha, "alpha_at": alpha_at, "PARTS": block(parts)}
    grid, threads = (batch * parts,), warps(size, 16)
    return losses, [
        Launch(sums_kernel, grid, both, threads),
        Launch(slope_kernel, grid, both | slope, threads),
    ]


def _parts(queue: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """The columns of a queue in `dtype`: all at once or, where they must be cast, a few."""
    size = queue.shape[1] if queue.dtype == dtype else CAST_COLUMNS
    for start in range(0, queue.shape[1], max(size, 1)):
        part = slice(start, start + size)
        yield part, queue[:, part].to(dtype)


def contrast(
    queries: Tensor,
    teacher: Tensor | None,
    own_keys: Tensor,
    queue: Tensor,
    own_ids: Tensor,
    queue_ids: Tensor | None,
    alpha: float,
    alpha_at: Tensor | None,
    wanted: bool,
) -> tuple[Tensor, Tensor]:
    """Row losses [B] and, where it is wanted, their gradient [B, D], by one buffer of logits."""
    rows = queries if teacher is None else torch.cat((queries, teacher))
    sizes = [rows.shape[0] * n for n in (queue.shape[1], own_keys.shape[0])]
    logits = torch.empty((sum(sizes),), device=queries.device)
    queued, own = (part.view(rows.shape[0], -1) for part in logits.split(sizes))
    torch.mm(rows, own_keys.T, out=own)
    for part, keys in _parts(queue, queries.dtype):
        torch.mm(rows, keys, out=queued[:, part])
    losses, launches = slope_launches(
        logits, own_ids, queue_ids, queue.shape[1], teacher is not None, alpha, alpha_at
    )
    run(launches, queries)
    batch = queries.shape[0]
    if not wanted:
        return losses, queries.new_empty((0, queries.shape[1]))
    slope = product(own[:batch], own_keys)
    for part, keys in _parts(queue, queries.dtype):
        slope.addmm_(queued[:batch, part], keys.T)
    return losses, slope


_queue_contrastive_loss = overloads.define("queue_contrastive_loss", "triton")

for _device in ("cpu", "cuda") if INTERPRETED else ("cuda",):
    torch.library.impl("syncmask::queue_contrastive_loss.triton", _device, contrast)


def queue_contrastive_loss(
    queries: Tensor, teacher: Tensor | None, keys: Keys, alpha: float | Tensor, wanted: bool
) -> tuple[Tensor, Tensor | None]:
    """queries and teacher [B, D] -> row losses [B] and, where it is wanted, their gradient."""
    number, tensor = (0.0, alpha) if isinstance(alpha, Tensor) else (float(alpha), None)
    own, queued = (keys.batch, keys.queue), (keys.batch_ids, keys.queue_ids)
    losses, slope = _queue_contrastive_loss(queries, teacher, *own, *queued, number, tensor, wanted)
    return losses, slope if wanted else None
