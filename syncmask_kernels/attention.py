"""Attention maps: the mean over heads, from probabilities or straight from queries and keys."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from syncmask_kernels import _checks, backends


def stack_layers(name: str, attn: Tensor | Sequence[Tensor], layout: str) -> Tensor:
    """One layer `[B, ...]`, stacked `[L, B, ...]` or a sequence of layers -> `[L, B, ...]`."""
    if isinstance(attn, (list, tuple)):
        if not attn:
            raise ValueError(f"{name} must hold at least one layer, got an empty sequence")
        for i, layer in enumerate(attn):
            _checks.rank(f"{name}[{i}]", layer, f"[{layout}]")
            _checks.shape(f"{name}[{i}]", layer, f"the shape of {name}[0]", attn[0].shape)
            _checks.dtype(f"{name}[{i}]", layer, attn[0].dtype)
            _checks.same_device(f"{name}[{i}]", layer, f"{name}[0]", attn[0])
        return torch.stack(tuple(attn)) if len(attn) > 1 else attn[0].unsqueeze(0)
    _checks.rank(name, attn, f"[{layout}]", f"[L, {layout}]")  # type: ignore[arg-type]
    stacked: Tensor = attn.unsqueeze(0) if attn.dim() == layout.count(",") + 1 else attn  # type: ignore[union-attr,assignment]
    if stacked.shape[0] == 0:
        raise ValueError(f"{name} must hold at least one layer, got shape {tuple(stacked.shape)}")
    return stacked


def check_skip_keys(skip_keys: int, keys: int) -> None:
    if not 0 <= skip_keys <= keys:
        raise ValueError(f"skip_keys must be in [0, S] = [0, {keys}], got {skip_keys}")


def check_heads(name: str, stacked: Tensor) -> None:
    if stacked.shape[2] == 0:
        raise ValueError(f"{name} must have at least one head, got shape {tuple(stacked.shape)}")


def head_average(attn: Tensor | Sequence[Tensor], *, skip_keys: int = 1) -> Tensor:
    """Mean of attention probabilities over heads (and layers), without the first key columns.

    Args:
        attn: ``[B, H, T, S]`` softmaxed attention (text queries, image keys), a sequence of such
            layers, or stacked layers ``[L, B, H, T, S]``; float16, bfloat16, float32 or float64.
        skip_keys: key columns left out of the map, default 1: the image CLS. They are part of the
            softmax, so a row of the map sums to less than 1.

    Returns:
        Tensor: ``[B, T, S - skip_keys]``, float32 (float64 for float64 input). Sums are taken in
        that type. The gradient flows to `attn`.

    Raises:
        TypeError: `attn` is no floating tensor.
        ValueError: wrong rank, no head or layer, or `skip_keys` outside ``[0, S]``.

    Deterministic: the same bits run after run and in any batch, on one backend.

    Source: ALBEF reads its maps so for Grad-CAM (`attention_map`, before dropout).

    Example:
        >>> import torch, syncmask_kernels as smk
        >>> attn = torch.tensor([[[[0.2, 0.8]], [[0.6, 0.4]]]])  # B=1, H=2, T=1, S=2
        >>> smk.head_average(attn)
        tensor([[[0.6000]]])
    """
    stacked = stack_layers("attn", attn, "B, H, T, S")
    _checks.floating("attn", stacked)
    check_heads("attn", stacked)
    check_skip_keys(skip_keys, stacked.shape[-1])
    return backends.choose("head_average", stacked)(stacked, skip_keys)


def check_qk(
    q: Tensor | Sequence[Tensor],
    k: Tensor | Sequence[Tensor],
    key_valid: Tensor | None,
    scale: float | None,
    skip_keys: int,
) -> tuple[Tensor, Tensor, float]:
    """Validated queries and keys with a layer axis, and the scale."""
    queries, keys = stack_layers("q", q, "B, H, T, D"), stack_layers("k", k, "B, H, S, D")
    _checks.floating("q", queries)
    _checks.dtype("k", keys, queries.dtype)
    _checks.same_device("k", keys, "q", queries)
    check_heads("q", queries)
    layers, batch, heads, _, dim = queries.shape
    _checks.shape("k", keys, "[(L,) B, H, S, D]", (layers, batch, heads, keys.shape[3], dim))
    check_skip_keys(skip_keys, keys.shape[3])
    if key_valid is not None:
        _checks.dtype("key_valid", key_valid, torch.bool)
        _checks.shape("key_valid", key_valid, "[B, S]", (batch, keys.shape[3]))
        _checks.same_device("key_valid", key_valid, "q", queries)
    return queries, keys, dim**-0.5 if scale is None else scale


def attention_map(
    q: Tensor | Sequence[Tensor],
    k: Tensor | Sequence[Tensor],
    *,
    key_valid: Tensor | None = None,
    scale: float | None = None,
    skip_keys: int = 1,
) -> Tensor:
    """Head mean of ``softmax(q kᵀ · scale)`` from queries and keys.

    Args:
        q: ``[B, H, T, D]`` text queries, a sequence of layers or ``[L, B, H, T, D]``.
        k: ``[B, H, S, D]`` image keys, likewise; type and layers of `q`.
        key_valid: ``[B, S]`` bool, False for keys outside the softmax. Default: all are valid.
        scale: factor of the logits, default ``D ** -0.5``.
        skip_keys: key columns left out of the map (not of the softmax), default 1: the image CLS.

    Returns:
        Tensor: ``[B, T, S - skip_keys]``, float32 (float64 for float64 input); the mean over layers
        too. A row without a valid key is 0. Gradients flow to `q` and `k`.

    Raises:
        TypeError: types differ or are not floating.
        ValueError: shapes, devices or `skip_keys` do not fit.

    Deterministic on one backend. Today's eager backend holds the probabilities
    ``[L, B, H, T, S]`` in memory.

    Source: BERT/ALBEF cross-attention without dropout.

    Example:
        >>> import torch, syncmask_kernels as smk
        >>> q, k = torch.zeros(1, 2, 3, 8), torch.randn(1, 2, 5, 8)
        >>> smk.attention_map(q, k)[0, 0]  # zero queries look everywhere alike
        tensor([0.2000, 0.2000, 0.2000, 0.2000])
    """
    queries, keys, factor = check_qk(q, k, key_valid, scale, skip_keys)
    run = backends.choose("attention_map", queries)
    return run(queries, keys, key_valid, factor, skip_keys)
