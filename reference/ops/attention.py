"""Attention maps, straight from their definition. Everything stays differentiable."""

from __future__ import annotations

import torch
from torch import Tensor


def head_average(layers: list[Tensor], skip_keys: int = 1) -> Tensor:
    """Layers of attn [B, H, T, S] -> [B, T, S - skip_keys]."""
    maps = [layer[:, head, :, skip_keys:] for layer in layers for head in range(layer.shape[1])]
    return torch.stack(maps).sum(dim=0) / len(maps)


def attention(
    q: Tensor, k: Tensor, key_valid: Tensor | None = None, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """q [B, H, T, D], k [B, H, S, D] -> probabilities [B, H, T, S] and log-sum-exp [B, H, T].

    A row without a valid key has probabilities 0.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    logits = scale * torch.einsum("bhtd,bhsd->bhts", q, k)
    allowed = torch.ones_like(logits, dtype=torch.bool)
    if key_valid is not None:
        allowed = allowed & key_valid[:, None, None, :]
    weights = torch.where(allowed, logits.exp(), 0.0)
    total = weights.sum(dim=-1, keepdim=True)
    return weights / torch.where(total > 0, total, 1.0), total.squeeze(-1).log()


def attention_map(
    q: Tensor,
    k: Tensor,
    key_valid: Tensor | None = None,
    scale: float | None = None,
    skip_keys: int = 1,
) -> Tensor:
    """q [B, H, T, D], k [B, H, S, D] -> [B, T, S - skip_keys]."""
    return head_average([attention(q, k, key_valid, scale)[0]], skip_keys)


def attention_with_map(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_valid: Tensor | None = None,
    scale: float | None = None,
    skip_keys: int = 1,
) -> tuple[Tensor, Tensor]:
    """q [B, H, T, D], k [B, H, S, D], v [B, H, S, E] -> [B, H, T, E], [B, T, S - skip_keys]."""
    weights, _ = attention(q, k, key_valid, scale)
    output = torch.einsum("bhts,bhse->bhte", weights, v)
    return output, head_average([weights], skip_keys)
