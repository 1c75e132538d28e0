"""One of two processes that fill a queue: a module of its own, so that they start fast."""

from __future__ import annotations

import torch

import syncmask_kernels as smk


def enqueue_of_a_rank(rank: int, folder: str) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2
    )
    queue, pointer = torch.zeros(2, 5, dtype=torch.bfloat16), torch.tensor([3])
    queue_ids = torch.full((5,), -100)
    keys = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).T + 10 * rank  # a view
    smk.enqueue_(queue, pointer, keys, torch.tensor([6, 7]) + 10 * rank, queue_ids)
    torch.save((queue.tolist(), pointer.tolist(), queue_ids.tolist()), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()
