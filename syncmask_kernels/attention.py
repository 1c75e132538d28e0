"""Attention maps: the mean over heads, from probabilities or straight from queries and keys."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from syncmask_kernels import _checks, backends
from syncmask_kernels.backends.eager import attention as eager


class AttentionWithMap(NamedTuple):
    """``output [B, H, T, E]`` of attention and its head-mean ``map [B, T, P]``."""

    output: Tensor
    map: Tensor


class _HeadAverage(torch.autograd.Function):
    """The forward of a backend without autograd; the gradient is the same for every head."""

    @staticmethod
    def forward(ctx: Any, run: Any, skip_keys: int, attn: Tensor) -> Any:
        ctx.shape, ctx.dtype, ctx.skip_keys = attn.shape, attn.dtype, skip_keys
        return run(attn, skip_keys)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad = torch.nn.functional.pad(grad, (ctx.skip_keys, 0)) / (ctx.shape[0] * ctx.shape[2])
        return None, None, grad[None, :, None].to(ctx.dtype).expand(ctx.shape)


class _Attention(torch.autograd.Function):
    """The forward of a backend without autograd, of `attention_map` and `attention_with_map`."""

    @staticmethod
    def forward(
        ctx: Any, run: Any, scale: float, skip_keys: int, key_valid: Any, *tensors: Tensor
    ) -> Any:
        ctx.save_for_backward(key_valid, *tensors)
        ctx.scale, ctx.skip_keys = scale, skip_keys
        result = run(*tensors, key_valid, scale, skip_keys)
        return result if isinstance(result, Tensor) else tuple(result)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        key_valid, q, k, *values = ctx.saved_tensors
        grad_map = torch.nn.functional.pad(grads[-1], (ctx.skip_keys, 0))
        if not values:
            grad_q, grad_k, _ = eager.attention_backward(
                q, k, None, key_valid, ctx.scale, grad_map, None
            )
            return None, None, None, None, grad_q, grad_k
        layered = (tensor.unsqueeze(0) for tensor in (q, k, *values))
        q, k, v = layered
        found = eager.attention_backward(q, k, v, key_valid, ctx.scale, grad_map, grads[0])
        return None, None, None, None, *(grad.squeeze(0) for grad in found if grad is not None)


def wants_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd has to record what is computed from these."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


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
    _checks.integer("skip_keys", skip_keys)
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

    Deterministic: the same bits run after run and, but on eager, in any batch, on one backend.

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
    run = backends.choose("head_average", stacked, stacked)
    if wants_grad(stacked) and run is not eager.head_average:
        average: Tensor = _HeadAverage.apply(run, skip_keys, stacked)
        return average
    result: Tensor = run(stacked, skip_keys)
    return result


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
    if dim == 0:
        raise ValueError(f"q must have D of at least 1, got shape {tuple(queries.shape)}")
    if scale is not None:
        scale = _checks.finite("scale", scale)
    _checks.shape("k", keys, "[(L,) B, H, S, D]", (layers, batch, heads, keys.shape[3], dim))
    check_skip_keys(skip_keys, keys.shape[3])
    _checks.mask("key_valid", key_valid, "[B, S]", (batch, keys.shape[3]), "q", queries)
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

    Deterministic: the same bits run after run and, but on eager (whose products are PyTorch's), in
    any batch, on one backend. The probabilities ``[L, B, H, T, S]`` never exist in memory (the
    eager backend holds them; the backward of the others holds those of one head at a time).

    Source: BERT/ALBEF cross-attention without dropout.

    Example:
        >>> import torch, syncmask_kernels as smk
        >>> q, k = torch.zeros(1, 2, 3, 8), torch.randn(1, 2, 5, 8)
        >>> smk.attention_map(q, k)[0, 0]  # zero queries look everywhere alike
        tensor([0.2000, 0.2000, 0.2000, 0.2000])
    """
    queries, keys, factor = check_qk(q, k, key_valid, scale, skip_keys)
    run = backends.choose("attention_map", queries, queries)
    if wants_grad(queries, keys) and run is not eager.attention_map:
        found: Tensor = _Attention.apply(run, factor, skip_keys, key_valid, queries, keys)
        return found
    result: Tensor = run(queries, keys, key_valid, factor, skip_keys)
    return result


def attention_with_map(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    key_valid: Tensor | None = None,
    scale: float | None = None,
    skip_keys: int = 1,
) -> AttentionWithMap:
    """Attention output and head-mean map from one pass, without dropout.

    For a teacher, or evaluation, of a model that would otherwise have to choose between
    `scaled_dot_product_attention` and attention maps.

    Args:
        q: ``[B, H, T, D]`` text queries.
        k: ``[B, H, S, D]`` image keys, of the type of `q`.
        v: ``[B, H, S, E]`` values, of the type of `q`.
        key_valid: ``[B, S]`` bool, False for keys outside the softmax. Default: all are valid.
        scale: factor of the logits, default ``D ** -0.5``.
        skip_keys: key columns left out of the map (not of the output), default 1: the image CLS.

    Returns:
        AttentionWithMap: ``output [B, H, T, E]`` in the type of `q`, and ``map [B, T,
        S - skip_keys]`` as `attention_map` returns it. A row without a valid key is 0 in both
        (`v` has to be finite: the values of all keys are read). Gradients flow to `q`, `k` and `v`
        from both.

    Raises:
        TypeError: types differ or are not floating.
        ValueError: shapes, devices or `skip_keys` do not fit.

    Deterministic, and without probabilities in memory, as `attention_map`.

    Source: BERT/ALBEF cross-attention without dropout.

    Example:
        >>> import torch, syncmask_kernels as smk
        >>> q, k, v = torch.zeros(1, 2, 3, 8), torch.randn(1, 2, 5, 8), torch.ones(1, 2, 5, 8)
        >>> output, attn = smk.attention_with_map(q, k, v)
        >>> output.shape, attn.shape
        (torch.Size([1, 2, 3, 8]), torch.Size([1, 3, 4]))
    """
    for name, tensor, layout in (("q", q, "T, D"), ("k", k, "S, D"), ("v", v, "S, E")):
        _checks.rank(name, tensor, f"[B, H, {layout}]")
    _, _, factor = check_qk(q, k, key_valid, scale, skip_keys)
    _checks.dtype("v", v, q.dtype)
    _checks.shape("v", v, "[B, H, S, E]", (*k.shape[:3], v.shape[3]))
    _checks.same_device("v", v, "q", q)
    run = backends.choose("attention_with_map", q, q)
    if wants_grad(q, k, v) and run is not eager.attention_with_map:
        return AttentionWithMap(*_Attention.apply(run, factor, skip_keys, key_valid, q, k, v))
    return AttentionWithMap(*run(q, k, v, key_valid, factor, skip_keys))
