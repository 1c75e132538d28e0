"""Masking tokens and patches, and moving masked rows, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from syncmask_kernels.backends.eager.philox import philox_grid

Runs = tuple[tuple[int, int], ...]


def token_valid(input_ids: Tensor, special_runs: Runs) -> Tensor:
    """True where a token is in none of the runs of special ids (first, last)."""
    valid = torch.ones_like(input_ids, dtype=torch.bool)
    for first, last in special_runs:
        valid = valid & ((input_ids < first) | (input_ids > last))
    return valid


def mask_tokens(
    input_ids: Tensor,
    token_mask: Tensor,
    mask_id: int,
    words: int,
    special_runs: Runs,
    bounds: tuple[int, int],
    ignore_index: int,
    seed: Tensor,
) -> tuple[Tensor, Tensor]:
    """Token t of row b owns the Philox counter (t, b, 0, 0).

    Its first random word is compared with `bounds` (mask below the first, replace below the
    second), its second one draws one of the `words` ids that are not special.
    """
    (action, _), (draw, _) = philox_grid(seed, *input_ids.shape)
    word = (draw * words) >> 32
    for first, last in special_runs:
        word = torch.where(word >= first, word + (last - first + 1), word)
    replaced = torch.where(action < bounds[1], word, input_ids)
    replaced = torch.where(action < bounds[0], mask_id, replaced)
    masked_ids = torch.where(token_mask, replaced, input_ids)
    return masked_ids, torch.where(token_mask, input_ids, ignore_index)


def mask_patches(patches: Tensor, patch_mask: Tensor, mask_token: Tensor | None) -> Tensor:
    """patches [B, P, D] with mask_token [D], or 0, where patch_mask [B, P] is True."""
    masked = patch_mask.unsqueeze(-1)
    if mask_token is None:
        return patches.masked_fill(masked, 0)
    return torch.where(masked, mask_token.to(patches.dtype), patches)


def masked_sum(x: Tensor, mask: Tensor) -> Tensor:
    """The sum [D] of the rows of x [B, P, D] where mask [B, P] is True, at least in float32."""
    kept = x.masked_fill(~mask.unsqueeze(-1), 0)
    return kept.sum(dim=(0, 1), dtype=torch.promote_types(x.dtype, torch.float32))


def flat_rows(ids: Tensor, positions: int) -> Tensor:
    """ids [B, K] -> [B * K] rows of a tensor [B * positions, ...]; no position is position 0."""
    start = torch.arange(ids.shape[0], device=ids.device).unsqueeze(1) * positions
    return (start + ids.masked_fill(_padding(ids, positions), 0)).flatten()


def _padding(ids: Tensor, positions: int) -> Tensor:
    return (ids < 0) | (ids >= positions)


def _beside(padding: Tensor, x: Tensor) -> Tensor:
    return padding.reshape(*padding.shape, *(1,) * (x.dim() - 2))


def gather_masked(x: Tensor, ids: Tensor, fill: float) -> Tensor:
    """x [B, N, ...], ids [B, K] -> [B, K, ...], `fill` where the id is no position."""
    positions, rest = x.shape[1], x.shape[2:]
    if positions == 0:
        return x.new_full((*ids.shape, *rest), fill)
    # index_select on rows is several times faster on a CPU than gather with an expanded index.
    rows = x.flatten(0, 1).index_select(0, flat_rows(ids, positions)).reshape(*ids.shape, *rest)
    return rows.masked_fill(_beside(_padding(ids, positions), x), fill)


def scatter_masked(x: Tensor, ids: Tensor, positions: int) -> Tensor:
    """x [B, K, ...], ids [B, K] -> [B, positions, ...], zero where no id points."""
    batch, _, *rest = x.shape
    summed = torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype
    out = x.new_zeros(batch * positions, *rest, dtype=summed)
    if positions > 0:
        rows = x.to(summed).masked_fill(_beside(_padding(ids, positions), x), 0).flatten(0, 1)
        out = out.index_add(0, flat_rows(ids, positions), rows)
    return out.to(x.dtype).reshape(batch, positions, *rest)
