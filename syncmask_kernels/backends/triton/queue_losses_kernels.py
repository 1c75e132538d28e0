"""Triton kernels between the matrix products of the queue's contrast.

A row of logits is cut into parts, of the batch's own keys and of the queue's, and a program holds
one part of the student's row and of the teacher's. `sums_kernel` leaves what can be summed before
the row's maximum is known; `slope_kernel` merges that and writes the gradient over the logits.
"""
# mypy: disable-error-code="no-untyped-def, assignment"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def part_of_row(
    logits, own_ids, queue_ids, part, own_parts, b, B, Q,
    TEACHER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Where the part's logits lie, which are inside, the student's, the teacher's, the positives.

    `logits` holds those with the queue, [B, Q] of the student and then of the teacher, and behind
    them those with the batch's own keys, [B, B] each.
    """
    own = part < own_parts
    size, rows = tl.where(own, B, Q), tl.cast(B, tl.int64)
    columns = tl.where(own, part, part - own_parts) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < size
    place = logits + b.to(tl.int64) * size + columns
    place += tl.where(own, (2 if TEACHER else 1) * rows * Q, 0)
    student = tl.load(place, inside, float("-inf"))
    teacher = student
    if TEACHER:
        teacher = tl.load(place + rows * size, inside, float("-inf"))
    item = tl.load(own_ids + b)
    positive = tl.where(own, inside, False)
    positive &= tl.load(own_ids + columns, positive, 0) == item
    if queue_ids is not None:
        queued = tl.where(own, False, inside)
        positive |= queued & (tl.load(queue_ids + columns, queued, 0) == item)
    return place, inside, student, teacher, positive


@triton.jit
def softmax_sums(logits):
    """The maximum of logits, their exponentials below it, and the sum of those."""
    top = tl.max(logits, 0)
    weights = tl.exp(logits - top)
    return top, weights, tl.sum(weights, 0)


@triton.jit
def sums_kernel(
    logits, own_ids, queue_ids, sums, B, Q, own_parts, parts,
    TEACHER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of one part of a row, into `sums` [7, B, parts]: maximum and sum of the student's softmax;
    the same of the teacher's, and the student's logits less their maximum by it; the same logits of
    the positives, and their number.
    """
    b, part = tl.program_id(0) // parts, tl.program_id(0) % parts
    _, inside, student, teacher, positive = part_of_row(
        logits, own_ids, queue_ids, part, own_parts, b, B, Q, TEACHER, BLOCK
    )
    place, stride = sums + b * parts + part, B * parts
    top, _, total = softmax_sums(student)
    tl.store(place, top)
    tl.store(place + stride, total)
    below = tl.where(inside, student, top) - top
    if TEACHER:
        top, weights, total = softmax_sums(teacher)
        tl.store(place + 2 * stride, top)
        tl.store(place + 3 * stride, total)
        tl.store(place + 4 * stride, tl.sum(weights * below, 0))
    tl.store(place + 5 * stride, tl.sum(tl.where(positive, below, 0.0), 0))
    tl.store(place + 6 * stride, tl.sum(positive.to(tl.float32), 0))


@triton.jit
def merged(tops, stride, known):
    """Of a row's parts: their maximum, their exponentials to it, and the sum of the softmax."""
    parts = tl.load(tops, known, float("-inf"))
    top = tl.max(parts, 0)
    weights = tl.exp(parts - top)
    return top, weights, tl.sum(weights * tl.load(tops + stride, known, 0.0), 0)


@triton.jit(do_not_specialize=["alpha"])
def slope_kernel(
    logits, own_ids, queue_ids, sums, losses, alpha, alpha_at, B, Q, own_parts, parts,
    TEACHER: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """One part of a row: the student's softmax less the targets, over its logits; the loss too."""
    b, part = tl.program_id(0) // parts, tl.program_id(0) % parts
    place, inside, student, teacher, positive = part_of_row(
        logits, own_ids, queue_ids, part, own_parts, b, B, Q, TEACHER, BLOCK
    )
    others, stride = tl.arange(0, PARTS), B * parts
    row, known = sums + b * parts + others, others < parts
    top, _, total = merged(row, stride, known)
    shift = tl.where(known, tl.load(row, known, 0.0) - top, 0.0)
    counts = tl.load(row + 6 * stride, known, 0.0)
    count = tl.sum(counts, 0)
    below = tl.sum(tl.load(row + 5 * stride, known, 0.0) + counts * shift, 0) / count
    target = tl.where(positive, 1.0, 0.0) / count
    if TEACHER:
        if alpha_at is not None:
            alpha = tl.load(alpha_at)
        soft_top, weights, soft_total = merged(row + 2 * stride, stride, known)
        soft = tl.load(row + 4 * stride, known, 0.0)
        soft += tl.load(row + 3 * stride, known, 0.0) * shift
        below = (1 - alpha) * below + alpha * (tl.sum(weights * soft, 0) / soft_total)
        target = (1 - alpha) * target + alpha * (tl.exp(teacher - soft_top) / soft_total)
    tl.store(place, tl.exp(student - top) / total - target, inside)
    tl.store(losses + b, tl.log(total) - below, part == 0)
