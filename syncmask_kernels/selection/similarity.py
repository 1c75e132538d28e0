"""How close each patch comes to a word of its caption."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from syncmask_kernels import _checks, backends
from syncmask_kernels.attention import wants_grad
from syncmask_kernels.backends.eager import selection as eager


class _MaxSimilarity(torch.autograd.Function):
    """The forward of a backend without autograd; the gradient goes to each patch's best token."""

    @staticmethod
    def forward(ctx: Any, run: Any, token_valid: Any, patches: Tensor, tokens: Tensor) -> Any:
        scores, ids = run(patches, tokens, token_valid)
        ctx.save_for_backward(patches, tokens, ids)
        return scores

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        patches, tokens, ids = ctx.saved_tensors
        return None, None, *eager.max_similarity_backward(patches, tokens, ids, grad)


def max_similarity(patches: Tensor, tokens: Tensor, token_valid: Tensor | None = None) -> Tensor:
    """Each patch's largest inner product with a token of its caption.

    Args:
        patches: ``[B, P, D]`` float16, bfloat16, float32 or float64.
        tokens: ``[B, T, D]``, of the type of `patches`.
        token_valid: ``[B, T]`` bool, False for tokens that are not compared. Default: all are.

    Returns:
        Tensor: ``[B, P]`` float32 (float64 for float64); 0 where no token is valid. Ties go to the
        lower token (on eager those of products that PyTorch rounds alike). The gradient flows to
        `patches` and to each patch's best token. The similarities ``[B, P, T]`` never exist in
        memory (the eager backend holds them).

    Raises:
        TypeError: types differ or are not floating.
        ValueError: shapes or devices do not fit.

    Deterministic on one backend, except that on CUDA the gradients of a token are added up by
    atomics unless `torch.use_deterministic_algorithms` is on.

    Source: SyCoCa (ICML 2024), equation 7; FILIP's late interaction.

    Example:
        >>> import torch, syncmask_kernels as smk
        >>> patches = torch.tensor([[[1.0, 0.0], [0.0, 2.0]]])
        >>> smk.max_similarity(patches, torch.tensor([[[0.5, 0.25], [0.0, -1.0]]]))
        tensor([[0.5000, 0.5000]])
    """
    _checks.floating("patches", patches, "[B, P, D]")
    _checks.rank("tokens", tokens, "[B, T, D]")
    _checks.dtype("tokens", tokens, patches.dtype)
    _checks.same_device("tokens", tokens, "patches", patches)
    batch, _, dim = patches.shape
    words = tokens.shape[1]
    _checks.shape("tokens", tokens, "[B, T, D]", (batch, words, dim))
    _checks.mask("token_valid", token_valid, "[B, T]", (batch, words), "patches", patches)
    run = backends.choose("max_similarity", patches, patches)
    if wants_grad(patches, tokens) and run is not eager.max_similarity:
        scores: Tensor = _MaxSimilarity.apply(run, token_valid, patches, tokens)
        return scores
    result: Tensor = run(patches, tokens, token_valid)[0]
    return result
