"""A chain of similar examples, in plain PyTorch: no step waits for the device."""

from __future__ import annotations

import torch
from torch import Tensor

from syncmask_kernels.backends import overloads
from syncmask_kernels.backends.eager.selection import order_keys


def _next(scores: Tensor, unused: Tensor, apart: Tensor, own: Tensor | None) -> Tensor:
    """The example to take: scores, unused and apart [M], own [1] for semi-hard -> index [1]."""
    keys = order_keys(scores, apart, largest=True)
    if own is not None:
        fits = apart & (scores < own)
        easiest = order_keys(scores, apart, largest=False)
        keys = torch.where(
            fits.any(), keys.masked_fill(~fits, torch.iinfo(keys.dtype).min), easiest
        )
    chosen = keys.argmax(dim=0, keepdim=True)
    last_resort = unused.byte().argmax(dim=0, keepdim=True)
    return torch.where(apart.any(), chosen, last_resort)


def _chain(
    image_feat: Tensor,
    text_feat: Tensor,
    item_ids: Tensor | None,
    start: int,
    semi_hard: bool,
    window: int,
) -> Tensor:
    size = image_feat.shape[0]
    dtype = torch.promote_types(image_feat.dtype, torch.float32)
    sides = (image_feat.to(dtype), text_feat.to(dtype))
    current = torch.full((1,), start, device=image_feat.device)
    unused = torch.ones(size, dtype=torch.bool, device=image_feat.device)
    free_at = torch.zeros(size, dtype=torch.int64, device=image_feat.device)
    order = [current][:size]
    for step in range(1, size):
        unused = unused.index_fill(0, current, False)
        apart = unused
        if item_ids is not None:
            same = item_ids == item_ids.index_select(0, current)
            free_at = free_at.masked_fill(same, step - 1 + window)
            apart = unused & (free_at <= step)
        queries, keys = sides if step % 2 == 1 else sides[::-1]
        scores = keys @ queries.index_select(0, current).squeeze(0)
        own = scores.index_select(0, current) if semi_hard else None
        current = _next(scores, unused, apart, own)
        order.append(current)
    return torch.cat(order) if order else unused.long()


# One operator in a graph: a chain of any length must not unroll while it is traced.
grouped_order = overloads.define("grouped_order", "eager")
torch.library.impl("syncmask::grouped_order.eager", "CompositeExplicitAutograd", _chain)
