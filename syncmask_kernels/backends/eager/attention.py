"""Head-mean attention maps in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def head_average(attn: Tensor, skip_keys: int) -> Tensor:
    """attn [L, B, H, T, S] -> the mean over layers and heads [B, T, P], at least float32."""
    wide = torch.promote_types(attn.dtype, torch.float32)
    return attn[..., skip_keys:].mean(dim=(0, 2), dtype=wide)


def attention_logits(q: Tensor, k: Tensor, key_valid: Tensor | None, scale: float) -> Tensor:
    """q [..., B, H, T, D], k [..., B, H, S, D] -> logits [..., B, H, T, S], at least float32."""
    wide = torch.promote_types(q.dtype, torch.float32)
    logits = (q.to(wide) * scale) @ k.to(wide).transpose(-1, -2)
    if key_valid is not None:
        logits = logits.masked_fill(~key_valid[:, None, None, :], float("-inf"))
    return logits


def softmax(logits: Tensor) -> Tensor:
    """Softmax over keys; a row without a valid key is zero, not NaN."""
    empty = (logits == float("-inf")).all(dim=-1, keepdim=True)
    return logits.masked_fill(empty, 0.0).softmax(dim=-1).masked_fill(empty, 0.0)


def attention_map(
    q: Tensor, k: Tensor, key_valid: Tensor | None, scale: float, skip_keys: int
) -> Tensor:
    """q [L, B, H, T, D], k [L, B, H, S, D] -> the mean map [B, T, P]."""
    return head_average(softmax(attention_logits(q, k, key_valid, scale)), skip_keys)
