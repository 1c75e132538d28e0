"""Linear cross entropy of gathered rows: PyTorch's products around one kernel in place."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
from torch import Tensor
from torch.nn import functional as F

from syncmask_kernels.backends import overloads
from syncmask_kernels.backends.triton import INTERPRETED
from syncmask_kernels.backends.triton.launch import Launch, block, run
from syncmask_kernels.backends.triton.losses_kernels import row_kernel, scale_kernel

COLUMNS = 4096  # of a row that a program looks at together
SCALED = 4096  # values that a program scales


def row_launch(
    logits: Tensor,
    logits_t: Tensor | None,
    soft: Tensor | None,
    rows: Tensor,
    labels: Tensor,
    slopes: Tensor | None,
    alpha: Tensor,
    losses: Tensor,
    label_smoothing: float,
) -> Launch:
    args = {
        "logits": logits,
        "teacher_logits": logits_t,
        "soft": soft,
        "rows": rows,
        "labels": labels,
        "slopes": slopes,
        "alpha": alpha,
        "losses": losses,
        "smoothing": label_smoothing,
        "V": logits.shape[1],
        "SMOOTHED": label_smoothing > 0,
        "BLOCK": min(block(logits.shape[1]), COLUMNS),
    }
    return Launch(row_kernel, (logits.shape[0],), args, 8)


def scale_launch(gradient: Tensor, slope: Tensor) -> Launch:
    size = gradient.numel()
    args = {"values": gradient, "slope": slope, "N": size, "BLOCK": SCALED}
    return Launch(scale_kernel, (triton.cdiv(size, SCALED),), args, 8)


def scale_(gradients: Sequence[Tensor], slope: Tensor) -> None:
    """gradients *= slope; where that is 1, as a rule, they are not even read."""
    run([scale_launch(x, slope) for x in gradients if x.numel() > 0], slope)


def _gathered(hidden: Tensor, rows: Tensor) -> Tensor:
    """The rows of `hidden`, 0 where there is none: what is not looked at may be NaN."""
    return hidden.index_select(0, rows.clamp(min=0)).masked_fill_((rows < 0).unsqueeze(1), 0)


def _run_rows(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    rows: Tensor,
    soft: Tensor | None,
    hidden_t: Tensor | None,
    weight_t: Tensor | None,
    bias_t: Tensor | None,
    alpha: Tensor,
    label_smoothing: float,
    slopes: Tensor | None,
    wanted: list[bool],
) -> tuple[Tensor, list[Tensor]]:
    count, width = rows.shape[0], hidden.shape[1]
    losses = torch.empty((count,), device=hidden.device)
    asked = [slopes is not None and wants for wants in wanted]
    of_hidden = torch.zeros_like(hidden) if asked[0] else None
    # The first part overwrites it.
    of_weight = torch.zeros_like(weight) if asked[1] and count == 0 else None
    if asked[1] and count > 0:
        of_weight = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    of_bias = weight.new_zeros(weight.shape[0], dtype=torch.float32) if asked[2] else None
    # Logits take no more memory than the gradient of the weight, and with those of a teacher no
    # more than all rows of one head.
    most = max(min(width, count if hidden_t is None else triton.cdiv(count, 2)), 1)
    for start in range(0, count, most):
        part = slice(start, start + most)
        states = _gathered(hidden, rows[part])
        logits = F.linear(states, weight, bias)
        logits_t = None
        if hidden_t is not None and weight_t is not None:
            logits_t = F.linear(_gathered(hidden_t, rows[part]), weight_t, bias_t)
        mine = None if slopes is None else slopes[part]
        launch = row_launch(
            *(logits, logits_t, soft, rows[part], labels[part]),
            *(mine, alpha, losses[part], label_smoothing),
        )
        run([launch], logits)
        if of_hidden is not None:
            of_hidden.index_add_(0, rows[part].clamp(min=0), logits @ weight)
        if of_weight is not None:
            of_weight.addmm_(logits.t(), states, beta=int(start > 0))
        if of_bias is not None:
            of_bias += logits.sum(dim=0, dtype=torch.float32)
    found = (of_hidden, of_weight, None if of_bias is None else of_bias.to(weight.dtype))
    return losses, [gradient for gradient in found if gradient is not None]


rows_overload = overloads.define("linear_cross_entropy_rows", "triton")
for _device in ("cpu", "cuda") if INTERPRETED else ("cuda",):
    torch.library.impl("syncmask::linear_cross_entropy_rows.triton", _device, _run_rows)
