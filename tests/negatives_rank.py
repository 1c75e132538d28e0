"""One of two processes that fetch negatives of each other: a module of its own, to start fast."""

from __future__ import annotations

import torch

import syncmask_kernels as smk

CHOSEN = ([5, 3, 0], [1, 1, 4])  # of either rank, among the rows 0 to 2 of rank 0 and 3 to 5


def features(rank: int) -> torch.Tensor:
    return torch.arange(12.0).reshape(3, 2, 2) + 100 * rank


def fetch_of_a_rank(rank: int, folder: str) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2
    )
    rows, ids = features(rank).requires_grad_(), torch.tensor(CHOSEN[rank])
    fetched = smk.gather_negatives(rows, ids)
    slopes = torch.tensor([1.0, 2.0, 4.0])[:, None, None] * 10**rank
    (grad,) = torch.autograd.grad((fetched * slopes).sum(), rows)
    mask = smk.gather_negatives((features(rank) % 3 == 0).transpose(1, 2), ids)
    none = smk.gather_negatives(rows[:0], ids[:0])
    try:
        smk.gather_negatives(rows, ids + 1 - rank)  # the 5 of rank 0 becomes 6
        error = ""
    except ValueError as refused:
        error = str(refused)
    answer = {"fetched": fetched.detach(), "grad": grad, "mask": mask, "none": none.detach()}
    torch.save((answer, error), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()
