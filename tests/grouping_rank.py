"""One of two processes with a sampler each: a module of its own, so that they start fast."""

from __future__ import annotations

import torch

import syncmask_kernels as smk


def clusters(size: int) -> torch.Tensor:
    """Features [size, 8] of eight kinds of examples."""
    return torch.eye(8)[torch.arange(size) % 8]


def sample_of_a_rank(rank: int, folder: str) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2
    )
    feat, epochs = clusters(67), []
    for drop_last in (False, True):
        sampler = smk.GroupedBatchSampler(67, 4, search_space=32, drop_last=drop_last)
        for _ in range(3):
            epochs.append(list(sampler))
            assert len(epochs[-1]) == len(sampler)
            for batch in epochs[-1]:
                sampler.record(torch.tensor(batch), feat[batch], feat[batch])
    torch.save(epochs, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()
