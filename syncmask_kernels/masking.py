"""Masking tokens and patches, and moving the masked rows."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from syncmask_kernels import _checks, _host, backends
from syncmask_kernels.attention import wants_grad
from syncmask_kernels.backends.eager import masking as eager


class _MaskPatches(torch.autograd.Function):
    """`replace` and `add` are mask_patches and masked_sum of a backend without autograd."""

    @staticmethod
    def forward(
        ctx: Any, replace: Any, add: Any, mask: Tensor, patches: Tensor, token: Tensor | None
    ) -> Any:
        ctx.save_for_backward(mask)
        ctx.kernels, ctx.token_dtype = (replace, add), None if token is None else token.dtype
        return replace(patches, mask, token)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *_, wants_patches, wants_token = ctx.needs_input_grad
        given = *ctx.kernels, *ctx.saved_tensors, grad
        patches = _MaskPatches.apply(*given, None) if wants_patches else None
        token = _MaskedSum.apply(*given).to(ctx.token_dtype) if wants_token else None
        return None, None, None, patches, token


class _MaskedSum(torch.autograd.Function):
    """What `_MaskPatches` does to the gradient of the token."""

    @staticmethod
    def forward(ctx: Any, replace: Any, add: Any, mask: Tensor, x: Tensor) -> Any:
        ctx.save_for_backward(mask)
        ctx.kernels, ctx.shape, ctx.dtype = (replace, add), x.shape, x.dtype
        return add(x, mask)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        zeros = grad.new_zeros((), dtype=ctx.dtype).expand(ctx.shape)
        found = _MaskPatches.apply(*ctx.kernels, *ctx.saved_tensors, zeros, grad)
        return None, None, None, found


class _Gather(torch.autograd.Function):
    """`gather` and `scatter`, of a backend without autograd, are each other's gradient."""

    @staticmethod
    def forward(ctx: Any, gather: Any, scatter: Any, ids: Tensor, fill: float, x: Tensor) -> Any:
        ctx.save_for_backward(ids)
        ctx.kernels, ctx.positions = (gather, scatter), x.shape[1]
        return gather(x, ids, fill)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        found = _Scatter.apply(*ctx.kernels, *ctx.saved_tensors, ctx.positions, grad)
        return None, None, None, None, found


class _Scatter(torch.autograd.Function):
    """The other half of `_Gather`."""

    @staticmethod
    def forward(ctx: Any, gather: Any, scatter: Any, ids: Tensor, N: int, x: Tensor) -> Any:
        ctx.save_for_backward(ids)
        ctx.kernels = gather, scatter
        return scatter(x, ids, N)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        found = _Gather.apply(*ctx.kernels, *ctx.saved_tensors, 0.0, grad)
        return None, None, None, None, found


def _check_token_ids(input_ids: Tensor) -> None:
    _checks.rank("input_ids", input_ids, "[B, T]")
    _checks.dtype("input_ids", input_ids, torch.int64)


def _runs(special_ids: Iterable[int]) -> tuple[tuple[int, int], ...]:
    """Sorted runs (first, last) of consecutive ids: a comparison each, and no copy to a GPU."""
    ids = sorted(set(special_ids))
    for value in ids:
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"special_ids must hold ints, got {type(value).__name__}")
    firsts = [i for i in ids if i - 1 not in ids]
    lasts = [i for i in ids if i + 1 not in ids]
    return tuple(zip(firsts, lasts, strict=True))


def _bounds(probs: Sequence[float]) -> tuple[int, int]:
    """The 32-bit random integers below which a token is masked, and below which it is replaced."""
    if len(probs) != 3 or min(probs) < 0 or abs(sum(probs) - 1) > 1e-6:
        raise ValueError(f"probs must be three shares that sum to 1, got {tuple(probs)}")
    (mask, mask_den), (replace, replace_den) = (
        _host.as_fraction(probs[0]),
        _host.as_fraction(probs[1]),
    )
    both = mask * replace_den + replace * mask_den
    return (mask << 32) // mask_den, (both << 32) // (mask_den * replace_den)


def token_valid(input_ids: Tensor, special_ids: Iterable[int]) -> Tensor:
    """Which tokens are words: everything but padding, CLS, SEP and other special tokens.

    Args:
        input_ids: ``[B, T]`` int64.
        special_ids: ids of special tokens (`tokenizer.all_special_ids`).

    Returns:
        Tensor: ``[B, T]`` bool, False at special tokens.

    Raises:
        TypeError: `input_ids` is not int64 or a special id is no int.
        ValueError: `input_ids` is not ``[B, T]``.

    Deterministic; no host sync.

    Example:
        >>> import torch, syncmask_kernels as smk
        >>> smk.token_valid(torch.tensor([[101, 7592, 2088, 102, 0]]), special_ids=[0, 101, 102])
        tensor([[False,  True,  True, False, False]])
    """
    _check_token_ids(input_ids)
    return backends.choose("token_valid", input_ids)(input_ids, _runs(special_ids))


def mask_tokens(
    input_ids: Tensor,
    token_mask: Tensor,
    *,
    mask_id: int,
    vocab_size: int,
    special_ids: Iterable[int] = (),
    probs: Sequence[float] = (0.8, 0.1, 0.1),
    ignore_index: int = -100,
    generator: torch.Generator | None = None,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """BERT's replacement of chosen tokens: a mask token, a random word or the token itself.

    Args:
        input_ids: ``[B, T]`` int64.
        token_mask: ``[B, T]`` bool, the tokens to predict, as `sync_topk_mask` chooses them. It is
            taken as it is: special tokens it names are masked too.
        mask_id: id of the mask token.
        vocab_size: random words are drawn from ``[0, vocab_size)`` without `special_ids` and
            `mask_id`.
        special_ids: ids of special tokens (`tokenizer.all_special_ids`). Default: none.
        probs: shares (mask token, random word, unchanged), which sum to 1. Each chosen token draws
            for itself. Default 0.8, 0.1, 0.1.
        ignore_index: label of the tokens that are not chosen, default -100.
        generator: where `seed` is drawn from, on the device of `input_ids`. Default: torch's own.
        seed: int64 ``[2]`` on the device, instead of a generator; compiled code passes it.

    Returns:
        tuple: ``masked_ids [B, T]``, the model's input, and ``labels [B, T]`` (the input id where
        chosen, `ignore_index` elsewhere), both int64.

    Raises:
        TypeError: types do not fit.
        ValueError: shapes, devices, `probs`, `mask_id` or `vocab_size` do not fit, or both
            `generator` and `seed` are given.

    Deterministic given `seed`: token t of row b uses the Philox4x32-10 counter (t, b, 0, 0), so the
    result is the same on every backend and device. No host sync.

    Source: BERT, as in ALBEF `models/model_pretrain.py` `mask()`; unlike there, a random word is
    never a special token.

    Example:
        >>> import torch, syncmask_kernels as smk
        >>> ids = torch.tensor([[101, 7592, 2088, 102]])
        >>> chosen = torch.tensor([[False, True, True, False]])
        >>> smk.mask_tokens(ids, chosen, mask_id=103, vocab_size=30522, probs=(1, 0, 0))
        (tensor([[101, 103, 103, 102]]), tensor([[-100, 7592, 2088, -100]]))
    """
    _check_token_ids(input_ids)
    _checks.tensor("token_mask", token_mask)
    layout = "the shape of input_ids"
    _checks.mask("token_mask", token_mask, layout, input_ids.shape, "input_ids", input_ids)
    _checks.integer("vocab_size", vocab_size)
    if not 0 < vocab_size < 2**31:
        raise ValueError(f"vocab_size must be in [1, 2^31), got {vocab_size}")
    _checks.index("mask_id", mask_id, vocab_size, "vocab_size")
    never = {mask_id, *(i for i in special_ids if 0 <= i < vocab_size)}
    words = vocab_size - len(never)
    bounds = _bounds(probs)
    if words == 0 and bounds[0] < bounds[1]:
        raise ValueError(f"special_ids must leave a word to draw, got all {vocab_size} ids")
    run = backends.choose("mask_tokens", input_ids)
    drawn = _host.philox_seed(seed, generator, input_ids.device)
    return run(input_ids, token_mask, mask_id, words, _runs(never), bounds, ignore_index, drawn)


def mask_patches(patches: Tensor, patch_mask: Tensor, mask_token: Tensor) -> Tensor:
    """Put the mask token in the place of masked patches.

    Args:
        patches: ``[B, P, D]`` floating patch embeddings.
        patch_mask: ``[B, P]`` bool, True where a patch is masked.
        mask_token: ``[D]`` floating; it is cast to the type of `patches`.

    Returns:
        Tensor: ``[B, P, D]`` of the type of `patches`. Gradients flow to `patches` (zero where
        masked) and to `mask_token` (a sum in float32); masked patches may hold NaN.

    Raises:
        TypeError: types do not fit.
        ValueError: shapes or devices do not fit.

    Deterministic; no host sync. Source: BEiT and SIMLA `models/vit.py`.

    Example:
        >>> import torch, syncmask_kernels as smk
        >>> mask = torch.tensor([[True, False]])
        >>> smk.mask_patches(torch.ones(1, 2, 3), mask, torch.zeros(3))
        tensor([[[0., 0., 0.],
                 [1., 1., 1.]]])
    """
    _checks.floating("patches", patches, "[B, P, D]")
    _checks.tensor("patch_mask", patch_mask)
    _checks.mask("patch_mask", patch_mask, "[B, P]", patches.shape[:2], "patches", patches)
    _checks.floating("mask_token", mask_token)
    _checks.shape("mask_token", mask_token, "[D]", patches.shape[2:])
    _checks.same_device("mask_token", mask_token, "patches", patches)
    run = backends.choose("mask_patches", patches, patches)
    result: Tensor
    if wants_grad(patches, mask_token) and run is not eager.mask_patches:
        add = backends.choose("masked_sum", patches, patches)
        result = _MaskPatches.apply(run, add, patch_mask, patches, mask_token)
    else:
        result = run(patches, patch_mask, mask_token)
    return result


def _rows(x: Tensor) -> Tensor:
    """x [B, N, ...] -> [B, N, D]."""
    return x.unsqueeze(2).flatten(2)


def _check_fill(fill: float, dtype: torch.dtype) -> None:
    _checks.number("fill", fill)
    if dtype.is_floating_point or dtype.is_complex:
        fits = not math.isfinite(fill) or abs(fill) <= torch.finfo(dtype).max
    elif dtype == torch.bool:
        fits = fill in (0, 1)
    else:
        bounds = torch.iinfo(dtype)
        # Backends are handed a float.
        exact = bounds.min <= fill <= bounds.max and float(fill) == fill
        fits = exact and float(fill).is_integer()
    if not fits:
        raise ValueError(f"fill must be a value of {str(dtype).removeprefix('torch.')}, got {fill}")


def _check_ids(x: Tensor, ids: Tensor, positions: int, of: str) -> None:
    _checks.rank("ids", ids, "[B, K]")
    _checks.dtype("ids", ids, torch.int64)
    _checks.same_device("ids", ids, "x", x)
    if ids.shape[0] != x.shape[0]:
        raise ValueError(f"ids must have the {x.shape[0]} rows of x, got shape {tuple(ids.shape)}")
    _host.ids_within("ids", ids, -1, positions, of)


def gather_masked(x: Tensor, ids: Tensor, *, fill: float = 0) -> Tensor:
    """The rows of `x` at the chosen positions, at a width that is fixed.

    Args:
        x: ``[B, N, ...]`` of any type: embeddings ``[B, N, D]``, labels ``[B, N]``.
        ids: ``[B, K]`` int64 positions, -1 for none, as `topk_mask` and `sync_topk_mask` give them.
        fill: value of the rows of id -1, default 0; for labels pass their `ignore_index`.

    Returns:
        Tensor: ``[B, K, ...]`` of the type of `x`. The gradient flows to `x`.

    Raises:
        TypeError: types do not fit.
        ValueError: shapes or devices do not fit, the type of `x` has no such `fill`, or (on the
            CPU) an id is outside ``[-1, N)``.

    Deterministic, and so is the gradient (eager on CUDA adds up rows of equal id by atomics unless
    `torch.use_deterministic_algorithms` is on). No host sync on a GPU, where, as in compiled code,
    nobody looks at the ids: one out of range counts as -1.

    Source: MAE `models_mae.py` (`torch.gather` of the kept patches).

    Example:
        >>> import torch, syncmask_kernels as smk
        >>> smk.gather_masked(torch.tensor([[5, 6, 7]]), torch.tensor([[0, 2, -1]]), fill=-100)
        tensor([[   5,    7, -100]])
    """
    _checks.tensor("x", x)
    if x.dim() < 2:
        raise ValueError(f"x must be [B, N, ...], got shape {tuple(x.shape)}")
    _check_ids(x, ids, x.shape[1], "N")
    _check_fill(fill, x.dtype)
    run = backends.choose("gather_masked", x, x)
    if wants_grad(x) and run is not eager.gather_masked:
        scatter = backends.choose("scatter_masked", x, x)
        rows = _Gather.apply(run, scatter, ids, fill, _rows(x))
    else:
        rows = run(_rows(x), ids, fill)
    return rows.reshape(*ids.shape, *x.shape[2:])


def scatter_masked(x: Tensor, ids: Tensor, N: int) -> Tensor:
    """Put rows back to their positions, the inverse and the adjoint of `gather_masked`.

    Args:
        x: ``[B, K, D]`` (or ``[B, K, ...]``) of any type but bool.
        ids: ``[B, K]`` int64 positions, -1 for rows to drop. Rows of equal id are summed.
        N: number of positions.

    Returns:
        Tensor: ``[B, N, D]`` of the type of `x`, zero where no id points. The gradient flows to
        `x` (zero for dropped rows, which may hold NaN).

    Raises:
        TypeError: types do not fit.
        ValueError: shapes or devices do not fit, or (on the CPU) an id is outside ``[-1, N)``.

    Deterministic: rows of equal id are added up in ascending order, those of half types in float32
    (eager on CUDA adds by atomics unless `torch.use_deterministic_algorithms` is on). No host sync
    on a GPU, where, as in compiled code, nobody looks at the ids: one out of range counts as -1.

    Source: the decoder input of masked autoencoders.

    Example:
        >>> import torch, syncmask_kernels as smk
        >>> smk.scatter_masked(torch.tensor([[[1.0], [2.0]]]), torch.tensor([[2, -1]]), 3)
        tensor([[[0.],
                 [0.],
                 [1.]]])
    """
    _checks.tensor("x", x)
    if x.dim() < 2 or x.dtype == torch.bool:
        raise ValueError(f"x must be [B, K, D] and not bool, got {x.dtype} {tuple(x.shape)}")
    if N < 0:
        raise ValueError(f"N must be at least 0, got {N}")
    _check_ids(x, ids, N, "N")
    if ids.shape[1] != x.shape[1]:
        raise ValueError(f"ids must be [B, K] = {tuple(x.shape[:2])}, got {tuple(ids.shape)}")
    run = backends.choose("scatter_masked", x, x)
    if wants_grad(x) and run is not eager.scatter_masked:
        gather = backends.choose("gather_masked", x, x)
        rows = _Scatter.apply(gather, run, ids, N, _rows(x))
    else:
        rows = run(_rows(x), ids, N)
    return rows.reshape(x.shape[0], N, *x.shape[2:])
