"""Schemas and fakes of the attention room."""

from __future__ import annotations

import torch
from torch import Tensor

SCHEMAS = {
    "head_average": "(Tensor attn, int skip_keys) -> Tensor",
    "attention_map": (
        "(Tensor q, Tensor k, Tensor? key_valid, float scale, int skip_keys) -> Tensor"
    ),
    "attention_with_map": (
        "(Tensor q, Tensor k, Tensor v, Tensor? key_valid, float scale, int skip_keys)"
        " -> (Tensor output, Tensor map)"
    ),
}


def _fake_head_average(attn: Tensor, skip_keys: int) -> Tensor:
    _, batch, _, tokens, keys = attn.shape
    return attn.new_empty((batch, tokens, keys - skip_keys), dtype=torch.float32)


def _fake_attention_map(
    q: Tensor, k: Tensor, key_valid: Tensor | None, scale: float, skip_keys: int
) -> Tensor:
    _, batch, _, tokens, _ = q.shape
    return q.new_empty((batch, tokens, k.shape[3] - skip_keys), dtype=torch.float32)


def _fake_attention_with_map(
    q: Tensor, k: Tensor, v: Tensor, key_valid: Tensor | None, scale: float, skip_keys: int
) -> tuple[Tensor, Tensor]:
    batch, _, tokens, _ = q.shape
    return (
        q.new_empty((*q.shape[:3], v.shape[3])),
        q.new_empty((batch, tokens, k.shape[2] - skip_keys), dtype=torch.float32),
    )


FAKES = {
    "head_average": _fake_head_average,
    "attention_map": _fake_attention_map,
    "attention_with_map": _fake_attention_with_map,
}
