"""Triton kernels of linear cross entropy.

`row_kernel` turns rows of logits into losses and, in place, into the gradient by the logits. The
others never hold a row of logits: `stream_kernel` sums up parts of the vocabulary, `slope_kernel`
computes the logits of a part again, and two products take the gradients from it. How many rows
there are is known to the device alone; programs of rows that are none leave at once.
"""
# mypy: disable-error-code="no-untyped-def, assignment"

from __future__ import annotations

import triton
import triton.language as tl

from syncmask_kernels.backends.triton.attention_kernels import finite_or_zero


@triton.jit
def load_logits(row, words, V):
    return tl.load(row + words, words < V, float("-inf")).to(tl.float32)


@triton.jit
def raised(top, total, logits):
    """The maximum, and the sum of exponentials below it, of a row of logits that goes on."""
    higher = tl.maximum(top, tl.max(logits, 0))
    shift = finite_or_zero(higher)
    return higher, total * tl.exp(top - shift) + tl.sum(tl.exp(logits - shift), 0)


@triton.jit
def row_kernel(
    logits, teacher_logits, soft, rows, labels, slopes, alpha, losses, smoothing, V,
    SMOOTHED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The loss of one row of logits; with `slopes` its gradient takes the place of the logits.

    Where there is no row to count both are 0.
    """
    place = tl.program_id(0).to(tl.int64)
    row = logits + place * V
    source = tl.load(rows + place)
    columns = tl.arange(0, BLOCK)
    if source < 0:
        tl.store(losses + place, 0.0)
        if slopes is not None:
            for start in range(0, V, BLOCK):
                tl.store(row + start + columns, 0.0, start + columns < V)
    else:
        label = tl.load(labels + place)
        share = tl.load(alpha)
        inside = (label >= 0) & (label < V)
        picked = tl.load(row + label, inside, 0.0).to(tl.float32)
        top, total, top_t, total_t, mass = float("-inf"), 0.0, float("-inf"), 0.0, 1.0
        if soft is not None:
            mass = 0.0
        for start in range(0, V, BLOCK):
            words = start + columns
            top, total = raised(top, total, load_logits(row, words, V))
            if teacher_logits is not None:
                logits_t = load_logits(teacher_logits + place * V, words, V)
                top_t, total_t = raised(top_t, total_t, logits_t)
            if soft is not None:
                mass += tl.sum(tl.load(soft + source * V + words, words < V, 0.0).to(tl.float32), 0)
        log_total = tl.log(total)
        hard = (1 - share) * (1 - smoothing)
        even = (1 - share) * smoothing / V
        loss = hard * (log_total - (picked - top))
        for start in range(0, V, BLOCK):
            words = start + columns
            valid = words < V
            log_p = tl.where(valid, load_logits(row, words, V) - top - log_total, 0.0)
            wanted = tl.where(words == label, hard, 0.0)
            if SMOOTHED:
                loss -= even * tl.sum(log_p, 0)
                wanted += even
            if teacher_logits is not None:
                logits_t = load_logits(teacher_logits + place * V, words, V)
                chosen = share * tl.exp(logits_t - top_t - tl.log(total_t))
                loss -= tl.sum(chosen * log_p, 0)
                wanted += chosen
            if soft is not None:
                chosen = share * tl.load(soft + source * V + words, valid, 0.0).to(tl.float32)
                loss -= tl.sum(chosen * log_p, 0)
                wanted += chosen
            if slopes is not None:
                weight = tl.exp(log_p) * (1 - share + share * mass)
                tl.store(row + words, tl.load(slopes + place) * (weight - wanted), valid)
        tl.store(losses + place, loss)


@triton.jit
def scale_kernel(values, slope, N, BLOCK: tl.constexpr):
    """values [N] *= slope, unless that is 1: then nothing is read."""
    factor = tl.load(slope)
    if factor != 1:
        place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        scaled = tl.load(values + place, place < N, 0.0).to(tl.float32) * factor
        tl.store(values + place, scaled, place < N)


@triton.jit
def tile_of_logits(
    hidden, weight, bias, sources, counted, words, V, D,
    BLOCK_R: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Logits [rows, words] of rows of `hidden`; 0 at words beyond the vocabulary."""
    inside = words < V
    left = hidden + sources[:, None] * D
    right = weight + words.to(tl.int64)[None, :] * D
    logits = tl.zeros((BLOCK_R, BLOCK_V), tl.float32)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        states = tl.load(left + d[None, :], counted[:, None] & (d < D)[None, :], 0.0)
        columns = tl.load(right + d[:, None], inside[None, :] & (d < D)[:, None], 0.0)
        logits = tl.dot(states, columns, logits, input_precision="ieee")
    if bias is not None:
        logits += tl.load(bias + words, inside, 0.0).to(tl.float32)[None, :]
    return logits


@triton.jit
def raised_rows(top, total, logits):
    """As `raised`, for rows of logits; also what earlier sums are to be multiplied by."""
    higher = tl.maximum(top, tl.max(logits, 1))
    shift = finite_or_zero(higher)
    kept, weights = tl.exp(top - shift), tl.exp(logits - shift[:, None])
    return higher, total * kept + tl.sum(weights, 1), kept, weights


@triton.jit
def sum_of_products(left, right, inside):
    """Sums of left * right over the columns inside.

    The choice keeps products from being fused into the sum, which lanes would then round each in
    its own way.
    """
    return tl.sum(tl.where(inside, left * right, 0.0), 1)


@triton.jit(do_not_specialize=["tiles"])
def stream_kernel(
    hidden, weight, bias, hidden_t, weight_t, bias_t, soft, rows, labels, count, sums,
    K, V, D, D_t,
    tiles, SMOOTHED: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A block of rows against a part of the vocabulary, `tiles` blocks of words.

    Writes to sums [7, parts, K]: the maximum of the logits, the sum of exponentials below it, the
    logit of the label, the sum of all logits, and of the teacher the maximum, the sum (or that of
    soft labels) and the sum of the logits that these weight.
    """
    place = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    counted = place < tl.load(count)
    if tl.program_id(0) * BLOCK_R < tl.load(count):
        sources = tl.load(rows + place, counted, 0)
        label = tl.load(labels + place, counted, -1)
        top = tl.full((BLOCK_R,), float("-inf"), tl.float32)
        top_t = tl.full((BLOCK_R,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK_R,), tl.float32)
        total_t = tl.zeros((BLOCK_R,), tl.float32)
        picked = tl.zeros((BLOCK_R,), tl.float32)
        every = tl.zeros((BLOCK_R,), tl.float32)
        weighted = tl.zeros((BLOCK_R,), tl.float32)
        for tile in range(tiles):
            words = (tl.program_id(1) * tiles + tile) * BLOCK_V + tl.arange(0, BLOCK_V)
            inside = (words < V)[None, :]
            logits = tile_of_logits(
                hidden, weight, bias, sources, counted, words, V, D, BLOCK_R, BLOCK_V, BLOCK_D
            )
            top, total, _, _ = raised_rows(top, total, tl.where(inside, logits, float("-inf")))
            picked += tl.sum(tl.where(words[None, :] == label[:, None], logits, 0.0), 1)
            if SMOOTHED:
                every += tl.sum(logits, 1)
            if hidden_t is not None:
                logits_t = tile_of_logits(
                    hidden_t, weight_t, bias_t, sources, counted, words, V, D_t,
                    BLOCK_R, BLOCK_V, BLOCK_D,
                )  # fmt: skip
                logits_t = tl.where(inside, logits_t, float("-inf"))
                top_t, total_t, kept, weights = raised_rows(top_t, total_t, logits_t)
                weighted = weighted * kept + sum_of_products(weights, logits, inside)
            if soft is not None:
                chosen = load_soft(soft, sources, counted, words, V)
                total_t += tl.sum(chosen, 1)
                weighted += sum_of_products(chosen, logits, inside)
        stride = tl.num_programs(1).to(tl.int64) * K
        out = sums + tl.program_id(1).to(tl.int64) * K + place
        tl.store(out, top, counted)
        tl.store(out + stride, total, counted)
        tl.store(out + 2 * stride, picked, counted)
        tl.store(out + 3 * stride, every, counted)
        tl.store(out + 4 * stride, top_t, counted)
        tl.store(out + 5 * stride, total_t, counted)
        tl.store(out + 6 * stride, weighted, counted)


@triton.jit
def load_soft(soft, sources, counted, words, V):
    """Soft labels [rows, words], 0 where there are none."""
    chosen = soft + sources[:, None] * V + words[None, :]
    return tl.load(chosen, counted[:, None] & (words < V)[None, :], 0.0).to(tl.float32)


@triton.jit(do_not_specialize=["first"])
def slope_kernel(
    hidden, weight, bias, hidden_t, weight_t, bias_t, soft, rows, labels, count,
    tops, log_totals, tops_t, log_totals_t, mass, slopes, alpha, out, smoothing, first, stride,
    V, D, D_t,
    BLOCK_R: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A tile of the gradient by the logits of words from the first on, out [K, stride].

    The stride is a multiple of the block: columns beyond the vocabulary are 0.
    """
    place = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    counted = place < tl.load(count)
    if tl.program_id(0) * BLOCK_R < tl.load(count):
        sources = tl.load(rows + place, counted, 0)
        label = tl.load(labels + place, counted, -1)
        column = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
        words = first + column
        share = tl.load(alpha)
        logits = tile_of_logits(
            hidden, weight, bias, sources, counted, words, V, D, BLOCK_R, BLOCK_V, BLOCK_D
        )
        log_p = logits - tl.load(tops + place, counted, 0.0)[:, None]
        log_p -= tl.load(log_totals + place, counted, 0.0)[:, None]
        slope = tl.exp(log_p) * tl.load(mass + place, counted, 0.0)[:, None]
        hard = (1 - share) * (1 - smoothing)
        slope -= tl.where(words[None, :] == label[:, None], hard, 0.0)
        slope -= (1 - share) * smoothing / V
        if hidden_t is not None:
            logits_t = tile_of_logits(
                hidden_t, weight_t, bias_t, sources, counted, words, V, D_t,
                BLOCK_R, BLOCK_V, BLOCK_D,
            )  # fmt: skip
            log_p = logits_t - tl.load(tops_t + place, counted, 0.0)[:, None]
            log_p -= tl.load(log_totals_t + place, counted, 0.0)[:, None]
            slope -= share * tl.exp(log_p)
        if soft is not None:
            slope -= share * load_soft(soft, sources, counted, words, V)
        slope *= tl.load(slopes + place, counted, 0.0)[:, None]
        slope = tl.where((words < V)[None, :], slope, 0.0)
        tile = out + place.to(tl.int64)[:, None] * stride + column[None, :]
        tl.store(tile, slope, counted[:, None])


@triton.jit(do_not_specialize=["first"])
def weight_gradient_kernel(
    slopes, hidden, rows, count, of_weight, of_bias, first, stride, V, D,
    BLOCK_R: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A tile of the gradients of the weight [V, D] and the bias [V], from slopes [K, stride]."""
    column = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros((BLOCK_V, BLOCK_D), tl.float32)
    total_bias = tl.zeros((BLOCK_V,), tl.float32)
    for start in range(0, tl.load(count), BLOCK_R):
        place = start + tl.arange(0, BLOCK_R)
        counted = place < tl.load(count)
        tile = slopes + place.to(tl.int64)[None, :] * stride + column[:, None]
        slope = tl.load(tile, counted[None, :], 0.0)
        sources = tl.load(rows + place, counted, 0)
        states = hidden + sources[:, None] * D + d[None, :]
        states = tl.load(states, counted[:, None] & (d < D)[None, :], 0.0)
        total = tl.dot(slope, states, total, input_precision="ieee")
        total_bias += tl.sum(slope.to(tl.float32), 1)
    word = (first + column).to(tl.int64)
    inside = (word < V)[:, None] & (d < D)[None, :]
    if of_weight is not None:
        tl.store(of_weight + word[:, None] * D + d[None, :], total, inside)
    if of_bias is not None:
        once = tl.where(tl.program_id(1) == 0, word < V, False)
        tl.store(of_bias + word, total_bias, once)


@triton.jit(do_not_specialize=["first", "tiles"])
def hidden_gradient_kernel(
    slopes, weight, rows, count, of_hidden, first, stride, tiles, N, V, D,
    BLOCK_R: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Adds to a tile of a part of the gradient of the hidden states, of_hidden [parts, N, D].

    A part takes `tiles` blocks of words of the slopes [K, stride].
    """
    place = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    counted = place < tl.load(count)
    if tl.program_id(0) * BLOCK_R < tl.load(count):
        sources = tl.load(rows + place, counted, 0)
        d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        inside = counted[:, None] & (d < D)[None, :]
        out = of_hidden + (tl.program_id(2) * N + sources)[:, None] * D + d[None, :]
        total = tl.load(out, inside, 0.0)
        for tile in range(tiles):
            column = (tl.program_id(2) * tiles + tile) * BLOCK_V + tl.arange(0, BLOCK_V)
            word = (first + column).to(tl.int64)
            inner = column < stride
            slope = slopes + place.to(tl.int64)[:, None] * stride + column[None, :]
            slope = tl.load(slope, counted[:, None] & inner[None, :], 0.0)
            words = weight + word[:, None] * D + d[None, :]
            words = tl.load(words, (inner & (word < V))[:, None] & (d < D)[None, :], 0.0)
            total = tl.dot(slope, words, total, input_precision="ieee")
        tl.store(out, total, inside)
