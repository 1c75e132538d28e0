"""Schemas and fakes of the losses room.

Gradients are those of hidden, weight and bias that are `wanted`, in this order.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

_CALL = (
    "Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, Tensor rows, Tensor? soft,"
    " Tensor? hidden_t, Tensor? weight_t, Tensor? bias_t, Tensor alpha, float label_smoothing"
)
SCHEMAS = {
    "linear_cross_entropy_rows": (
        f"({_CALL}, Tensor? slopes, bool[] wanted) -> (Tensor losses, Tensor[] gradients)"
    ),
    "linear_cross_entropy_stream": f"({_CALL}) -> (Tensor losses, Tensor sums)",
    "linear_cross_entropy_stream_backward": (
        f"({_CALL}, Tensor sums, Tensor slopes, bool[] wanted) -> Tensor[]"
    ),
    "linear_cross_entropy_add_block": (
        "(Tensor(a!) logits, Tensor? bias, Tensor(b!) top, Tensor(c!) total) -> ()"
    ),
    "linear_cross_entropy_slopes": (
        "(Tensor logits, Tensor top, Tensor log_total, Tensor labels, Tensor mass, float hard,"
        " float even, float alpha, Tensor? soft, Tensor? soft_top, Tensor? soft_log_total)"
        " -> (Tensor slopes, Tensor loss)"
    ),
}


def _fake_gradients(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, wanted: list[bool]
) -> list[Tensor]:
    head = zip((hidden, weight, bias), wanted, strict=True)
    return [x.new_empty(x.shape) for x, wants in head if wants and x is not None]


def _fake_rows(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, rows: Tensor, *rest: Any
) -> tuple[Tensor, list[Tensor]]:
    *_, slopes, wanted = rest
    gradients = [] if slopes is None else _fake_gradients(hidden, weight, bias, wanted)
    return rest[4].new_empty(rows.shape), gradients


def _fake_stream(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, rows: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    alpha = rest[4]
    return alpha.new_empty(rows.shape), alpha.new_empty((5, *rows.shape))


def _fake_stream_backward(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any
) -> list[Tensor]:
    return _fake_gradients(hidden, weight, bias, rest[-1])


def _fake_add_block(*call: Tensor | None) -> None:
    """It writes what it is given."""


def _fake_slopes(logits: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return logits.new_empty(logits.shape), logits.new_empty(())


FAKES = {
    "linear_cross_entropy_rows": _fake_rows,
    "linear_cross_entropy_stream": _fake_stream,
    "linear_cross_entropy_stream_backward": _fake_stream_backward,
    "linear_cross_entropy_add_block": _fake_add_block,
    "linear_cross_entropy_slopes": _fake_slopes,
}
