"""Triton kernels of patch losses: a program takes one patch, whose values it holds at once."""
# mypy: disable-error-code="no-untyped-def, assignment"

from __future__ import annotations

import triton
import triton.language as tl

# What may change from call to call must not compile anew.
VARYING = ["width", "rows", "entries"]


@triton.jit
def load_pair(
    pred, target, b, row, patch, C, across,
    pred_b, pred_p, pred_c, target_b, target_c, target_h, target_w,
    NORM_PIX: tl.constexpr, SIDE: tl.constexpr, CHANNELS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A row of pred [B, P, C], and a patch of an image in the order of row, column, channel.

    Features [B, P, C] are an image, too: of P rows, one column and C channels, with SIDE 1.
    """
    values = tl.arange(0, BLOCK)
    inside = values < C
    at = pred + b * pred_b + row * pred_p + values.to(tl.int64) * pred_c
    given = tl.load(at, inside, 0.0).to(tl.float32)
    y, x, channel = patch // across * SIDE, patch % across * SIDE, values
    if SIDE > 1:
        y += values // (SIDE * CHANNELS)
        x += values // CHANNELS % SIDE
        channel = values % CHANNELS
    at = target + b * target_b + y * target_h + x * target_w + channel.to(tl.int64) * target_c
    want = tl.load(at, inside, 0.0).to(tl.float32)
    if NORM_PIX:
        want = tl.where(inside, want - tl.div_rn(tl.sum(want), tl.cast(C, tl.float32)), 0.0)
        variance = tl.div_rn(tl.sum(want * want), tl.cast(C - 1, tl.float32))
        want = tl.div_rn(want, tl.sqrt_rn(variance + 1e-6))
    return given, want


@triton.jit
def norm(values):
    return tl.maximum(tl.sqrt_rn(tl.sum(values * values)), 1e-8)


@triton.jit
def loss_of(given, want, C, KIND: tl.constexpr):
    if KIND == "cosine":
        products = tl.div_rn(given, norm(given)) * tl.div_rn(want, norm(want))
        return 1.0 - tl.sum(products)
    error = given - want
    size = tl.abs(error)
    if KIND == "l1":
        losses = size
    elif KIND == "mse":
        losses = error * error
    else:
        losses = tl.where(size < 1, 0.5 * error * error, size - 0.5)
    return tl.div_rn(tl.sum(losses), tl.cast(C, tl.float32))


@triton.jit
def gradient_of(given, want, slope, divisor, C, KIND: tl.constexpr):
    """The gradient by `given` of slope / divisor * loss_of."""
    if KIND == "cosine":
        length = norm(given)
        direction, wanted = tl.div_rn(given, length), tl.div_rn(want, norm(want))
        away = direction * tl.sum(direction * wanted) - wanted
        return tl.div_rn(away, length) * tl.div_rn(slope, divisor)
    error = given - want
    if KIND == "l1":
        slopes = tl.where(error > 0, 1.0, tl.where(error < 0, -1.0, 0.0))
    elif KIND == "mse":
        slopes = 2 * error
    else:
        slopes = tl.where(error < -1, -1.0, tl.where(error > 1, 1.0, error))
    return slopes * tl.div_rn(slope, divisor * C)


@triton.jit
def chosen_patch(ids_or_mask, entry, width, BY_MASK: tl.constexpr):
    """The patch of an entry of ids or mask [B, width], -1 for none."""
    if BY_MASK:
        return tl.where(tl.load(ids_or_mask + entry), entry % width, -1)
    else:
        return tl.load(ids_or_mask + entry)


@triton.jit(do_not_specialize=VARYING)
def patch_loss_kernel(
    pred, target, ids_or_mask, losses,
    width, C, across, pred_b, pred_p, pred_c, target_b, target_c, target_h, target_w,
    KIND: tl.constexpr, NORM_PIX: tl.constexpr, BY_MASK: tl.constexpr, GATHER_PRED: tl.constexpr,
    SIDE: tl.constexpr, CHANNELS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The loss of one entry of ids or mask [B, width], 0 where it is none."""
    entry = tl.program_id(0).to(tl.int64)
    patch = chosen_patch(ids_or_mask, entry, width, BY_MASK)
    if patch < 0:
        tl.store(losses + entry, 0.0)
    else:
        given, want = load_pair(
            pred, target, entry // width, patch if GATHER_PRED else entry % width, patch, C, across,
            pred_b, pred_p, pred_c, target_b, target_c, target_h, target_w,
            NORM_PIX, SIDE, CHANNELS, BLOCK,
        )  # fmt: skip
        tl.store(losses + entry, loss_of(given, want, C, KIND))


@triton.jit(do_not_specialize=VARYING)
def reduce_losses_kernel(
    losses, ids_or_mask, loss, divisor, entries,
    BY_MASK: tl.constexpr, MEAN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The sum or the mean of all entries, and by what it was divided; one program."""
    totals = tl.zeros((BLOCK,), tl.float32)
    counts = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, entries, BLOCK):
        entry = start + tl.arange(0, BLOCK)
        totals += tl.load(losses + entry, entry < entries, 0.0)
        if BY_MASK:
            counts += tl.load(ids_or_mask + entry, entry < entries, 0).to(tl.int32)
        else:
            counts += (tl.load(ids_or_mask + entry, entry < entries, -1) >= 0).to(tl.int32)
    divided = tl.cast(tl.maximum(tl.sum(counts), 1) if MEAN else 1, tl.float32)
    tl.store(loss, tl.div_rn(tl.sum(totals), divided))
    tl.store(divisor, divided)


@triton.jit
def named_slope(grad, ids, b, patch, width, EACH: tl.constexpr, CHUNK: tl.constexpr):
    """How many of the ids [B, width] name a patch, and the sum of the slopes of their losses."""
    slopes = tl.zeros((CHUNK,), tl.float32)
    counts = tl.zeros((CHUNK,), tl.int32)
    for start in range(0, width, CHUNK):
        k = start + tl.arange(0, CHUNK)
        named = tl.load(ids + b * width + k, k < width, -1) == patch
        counts += named.to(tl.int32)
        slopes += tl.load(grad + (b * width + k if EACH else k * 0), named, 0.0)
    return tl.sum(counts), tl.sum(slopes)


@triton.jit(do_not_specialize=VARYING)
def patch_gradient_kernel(
    grad, divisor, pred, target, ids_or_mask, grad_pred,
    rows, width, C, across, pred_b, pred_p, pred_c, target_b, target_c, target_h, target_w,
    KIND: tl.constexpr, NORM_PIX: tl.constexpr, BY_MASK: tl.constexpr, GATHER_PRED: tl.constexpr,
    EACH: tl.constexpr, SIDE: tl.constexpr, CHANNELS: tl.constexpr, BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """One row of the gradient of pred [B, rows, C]; EACH entry has a slope, or all have one."""
    index = tl.program_id(0).to(tl.int64)
    b, row = index // rows, index % rows
    if GATHER_PRED:
        patch = row
        count, slope = named_slope(grad, ids_or_mask, b, row, width, EACH, CHUNK)
        used = count > 0
    else:
        patch = chosen_patch(ids_or_mask, index, width, BY_MASK)
        slope = tl.load(grad + (index if EACH else 0))
        used = patch >= 0
    values = tl.arange(0, BLOCK)
    to = grad_pred + index * C + values
    if used:
        given, want = load_pair(
            pred, target, b, row, patch, C, across,
            pred_b, pred_p, pred_c, target_b, target_c, target_h, target_w,
            NORM_PIX, SIDE, CHANNELS, BLOCK,
        )  # fmt: skip
        gradient = gradient_of(given, want, slope, tl.load(divisor), C, KIND)
        tl.store(to, gradient.to(grad_pred.dtype.element_ty), values < C)
    else:
        tl.store(to, tl.zeros((BLOCK,), grad_pred.dtype.element_ty), values < C)
