"""Linear cross entropy of rows that only the device can count, streamed over the vocabulary.

As in Cut Cross Entropy (arXiv 2411.09009), but without locks: forward sums up parts of the
vocabulary, backward computes the logits of a part again and keeps its gradient for two products.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from syncmask_kernels.backends import overloads
from syncmask_kernels.backends.triton import INTERPRETED
from syncmask_kernels.backends.triton.launch import Launch, run
from syncmask_kernels.backends.triton.losses_kernels import (
    hidden_gradient_kernel,
    slope_kernel,
    stream_kernel,
    weight_gradient_kernel,
)

STREAM_LOGITS = 2**24  # alive at a time
TILES = 4  # blocks of words that a program of the forward pass goes through
PARTS = 4  # of the vocabulary, whose gradients of the hidden states are summed up apart


class Tiles(NamedTuple):
    """Blocks of rows, words and columns, as compile-time constants."""

    BLOCK_R: int
    BLOCK_V: int
    BLOCK_D: int


class Rows(NamedTuple):
    """What every kernel is told that computes logits: the arguments of the operator."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    labels: Tensor
    rows: Tensor  # [K]: ids, and -1 from the first that is none
    soft: Tensor | None
    hidden_t: Tensor | None
    weight_t: Tensor | None
    bias_t: Tensor | None
    alpha: Tensor
    label_smoothing: float

    @property
    def args(self) -> dict[str, Any]:
        given = self._asdict()
        del given["alpha"], given["label_smoothing"]
        return given | {
            "V": self.weight.shape[0],
            "D": self.hidden.shape[1],
            "D_t": 0 if self.hidden_t is None else self.hidden_t.shape[1],
        }


def tiles(call: Rows) -> Tiles:
    # In float32, where there are no tensor cores, threads multiply in registers.
    if call.hidden.dtype == torch.float32:
        return Tiles(32, 64, 16)
    return Tiles(64, 128 if call.soft is None else 64, 32)


def stream_launch(call: Rows, count: Tensor) -> tuple[Tensor, Launch]:
    """Sums [7, parts, K] of parts of the vocabulary, not yet written, and what writes them."""
    blocks = tiles(call)
    parts = triton.cdiv(call.weight.shape[0], blocks.BLOCK_V * TILES)
    rows = call.rows.shape[0]
    sums = torch.empty((7, parts, rows), device=count.device)
    args = call.args | blocks._asdict()
    args |= {"count": count, "sums": sums, "K": rows, "tiles": TILES}
    args |= {"SMOOTHED": call.label_smoothing > 0}
    grid = (triton.cdiv(rows, blocks.BLOCK_R), parts)
    return sums, Launch(stream_kernel, grid, args, 8, True)


def gradient_launches(
    call: Rows, count: Tensor, sums: Tensor, slopes: Tensor, wanted: list[bool]
) -> tuple[list[Tensor | None], list[Launch]]:
    """Gradients (of hidden in parts [PARTS, N, D]), not yet written, and what writes them."""
    device, blocks = count.device, tiles(call)
    (rows, width), vocabulary = call.hidden.shape, call.weight.shape[0]
    block_v = blocks.BLOCK_V
    blocks_v = triton.cdiv(vocabulary, block_v)
    most = min(max(STREAM_LOGITS // (rows * block_v), 1), blocks_v)
    parts, of_weight, of_bias = None, None, None
    if wanted[0]:
        parts = torch.zeros((PARTS, rows, width), device=device)
    if wanted[1]:
        of_weight = torch.empty((vocabulary, width), dtype=call.weight.dtype, device=device)
    if wanted[2]:
        of_bias = torch.empty((vocabulary,), dtype=call.weight.dtype, device=device)
    logits = torch.empty((rows, most * block_v), dtype=call.hidden.dtype, device=device)
    tops, log_totals, tops_t, log_totals_t, mass = sums
    row_blocks = triton.cdiv(call.rows.shape[0], blocks.BLOCK_R)
    launches = []
    for block in range(0, blocks_v, most):
        words, columns = min(most, blocks_v - block), triton.cdiv(width, blocks.BLOCK_D)
        both = {"rows": call.rows, "count": count, "first": block * block_v}
        both |= {"stride": logits.shape[1]} | blocks._asdict()
        args = call.args | both | {"tops": tops, "log_totals": log_totals, "mass": mass}
        args |= {"tops_t": tops_t, "log_totals_t": log_totals_t}
        args |= {"slopes": slopes, "alpha": call.alpha, "smoothing": call.label_smoothing}
        args |= {"out": logits}
        launches.append(Launch(slope_kernel, (row_blocks, words), args, 8, True))
        both |= {"slopes": logits, "V": vocabulary, "D": width}
        if of_weight is not None or of_bias is not None:
            args = both | {"hidden": call.hidden, "of_weight": of_weight, "of_bias": of_bias}
            grid = (words, 1 if of_weight is None else columns)
            launches.append(Launch(weight_gradient_kernel, grid, args, 8, True))
        if parts is not None:
            args = both | {"weight": call.weight, "of_hidden": parts, "N": rows}
            args |= {"tiles": triton.cdiv(words, PARTS)}
            places = (row_blocks, columns, PARTS)
            launches.append(Launch(hidden_gradient_kernel, places, args, 8, True))
    return [parts, of_weight, of_bias], launches


def _count(rows: Tensor) -> Tensor:
    return (rows >= 0).sum()


def _run_stream(*arguments: Any) -> tuple[Tensor, Tensor]:
    call = Rows(*arguments)
    parts, launch = stream_launch(call, _count(call.rows))
    run([launch], call.hidden)
    picked, every = parts[2].sum(dim=0), parts[3].sum(dim=0)
    top, total = _whole(*parts[:2])
    log_total = total.log()
    alpha, smoothing = call.alpha, call.label_smoothing
    losses = (1 - smoothing) * (log_total - (picked - top))
    if smoothing > 0:
        losses += smoothing * (log_total - (every / call.weight.shape[0] - top))
    losses *= 1 - alpha
    top_t, log_total_t, mass = torch.zeros_like(top), torch.zeros_like(top), torch.ones_like(top)
    if call.soft is not None:
        mass, weighted = parts[5].sum(dim=0), parts[6].sum(dim=0)
        losses += alpha * (mass * log_total - (weighted - mass * top))
    if call.hidden_t is not None:
        top_t, total_t, weighted = _whole(*parts[4:])
        log_total_t = total_t.log()
        losses += alpha * (log_total - (weighted / total_t - top))
    sums = torch.stack([top, log_total, top_t, log_total_t, 1 - alpha + alpha * mass])
    # Programs of rows that are none left without writing.
    none = call.rows < 0
    return losses.masked_fill(none, 0), sums.masked_fill(none, 0)


def _whole(tops: Tensor, totals: Tensor, *weighted: Tensor) -> tuple[Tensor, ...]:
    """The maximum of parts [parts, K], and their sums below it."""
    top = tops.amax(dim=0)
    kept = (tops - top).exp()
    return top, (totals * kept).sum(dim=0), *((x * kept).sum(dim=0) for x in weighted)


def _run_stream_backward(*arguments: Any) -> list[Tensor]:
    *given, sums, slopes, wanted = arguments
    call = Rows(*given)
    found, launches = gradient_launches(call, _count(call.rows), sums, slopes, wanted)
    run(launches, call.hidden)
    parts, *rest = found
    of_hidden = None if parts is None else parts.sum(dim=0).to(call.hidden.dtype)
    return [gradient for gradient in (of_hidden, *rest) if gradient is not None]


stream_overload = overloads.define("linear_cross_entropy_stream", "triton")
backward_overload = overloads.define("linear_cross_entropy_stream_backward", "triton")
for _device in ("cpu", "cuda") if INTERPRETED else ("cuda",):
    torch.library.impl("syncmask::linear_cross_entropy_stream.triton", _device, _run_stream)
    torch.library.impl(
        "syncmask::linear_cross_entropy_stream_backward.triton", _device, _run_stream_backward
    )
