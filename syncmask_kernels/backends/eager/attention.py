"""Head-mean attention maps in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def head_average(attn: Tensor, skip_keys: int) -> Tensor:
    """attn [L, B, H, T, S] -> the mean over layers and heads [B, T, P], at least float32."""
    wide = torch.promote_types(attn.dtype, torch.float32)
    return attn[..., skip_keys:].mean(dim=(0, 2), dtype=wide)


def product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` in the type of its arguments, under autocast too."""
    if not torch.amp.is_autocast_available(a.device.type):
        return a @ b
    with torch.autocast(a.device.type, enabled=False):
        return a @ b


def attention_logits(q: Tensor, k: Tensor, key_valid: Tensor | None, scale: float) -> Tensor:
    """q [..., B, H, T, D], k [..., B, H, S, D] -> logits [..., B, H, T, S], at least float32."""
    wide = torch.promote_types(q.dtype, torch.float32)
    logits = product(q.to(wide) * scale, k.to(wide).mT)
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


def attention_with_map(
    q: Tensor, k: Tensor, v: Tensor, key_valid: Tensor | None, scale: float, skip_keys: int
) -> tuple[Tensor, Tensor]:
    """q [B, H, T, D], k [B, H, S, D], v [B, H, S, E] -> output [B, H, T, E], mean map [B, T, P]."""
    weights = softmax(attention_logits(q, k, key_valid, scale))
    output = product(weights, v.to(weights.dtype)).to(q.dtype)
    return output, head_average(weights.unsqueeze(0), skip_keys)


def attention_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    key_valid: Tensor | None,
    scale: float,
    grad_map: Tensor,
    grad_output: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of q, k [L, B, H, ...] and v [1, B, H, S, E], of the map over all S keys and of the
    output, for the backends without autograd. Holds the probabilities of one head at a time.
    """
    layers, _, heads, _, _ = q.shape
    wide = torch.promote_types(q.dtype, torch.float32)
    grad_q, grad_k = torch.empty_like(q), torch.empty_like(k)
    grad_v = None if v is None else torch.empty_like(v)
    for layer in range(layers):
        for head in range(heads):
            queries, keys = q[layer, :, head].to(wide), k[layer, :, head].to(wide)
            logits = attention_logits(queries[:, None], keys[:, None], key_valid, scale)
            weights = softmax(logits).squeeze(1)
            grad_weights = grad_map / (layers * heads)
            if v is not None and grad_output is not None and grad_v is not None:
                grad = grad_output[:, head].to(wide)
                grad_v[layer, :, head] = product(weights.mT, grad).to(v.dtype)
                grad_weights = grad_weights + product(grad, v[layer, :, head].to(wide).mT)
            inner = (weights * grad_weights).sum(dim=-1, keepdim=True)
            grad_logits = weights * (grad_weights - inner) * scale
            grad_q[layer, :, head] = product(grad_logits, keys).to(q.dtype)
            grad_k[layer, :, head] = product(grad_logits.mT, queries).to(k.dtype)
    return grad_q, grad_k, grad_v
