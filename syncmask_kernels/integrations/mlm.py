"""The masked-word loss of BERT's prediction head, over the labelled rows alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from syncmask_kernels import _checks
from syncmask_kernels.losses import masked_linear_cross_entropy
from syncmask_kernels.masking import gather_masked
from syncmask_kernels.selection import topk_mask

Teacher = tuple[Any, Tensor]


def _check_head(name: str, head: Any, hidden: Tensor, labels: Tensor) -> None:
    for part in ("transform", "decoder"):
        if not isinstance(getattr(head, part, None), nn.Module):
            raise TypeError(
                f"{name} must be BERT's prediction head (`model.cls.predictions`): "
                f"{type(head).__name__} has no {part}"
            )
    if not isinstance(head.decoder, nn.Linear):
        raise TypeError(
            f"{name}.decoder must be a torch.nn.Linear, got {type(head.decoder).__name__}"
        )
    _checks.shape(
        "hidden" if name == "head" else "hidden of teacher",
        hidden,
        "[B, T, D]",
        (*labels.shape, head.decoder.in_features),
    )


def _rows(labels: Tensor, ids: Tensor | None, capacity: int | None, ignore: int) -> Tensor | None:
    """Positions of labels [B, T], flattened, that are looked at (-1: none); None: all of them."""
    flat = labels.flatten()
    if ids is not None:
        start = torch.arange(labels.shape[0], device=ids.device).unsqueeze(1) * labels.shape[1]
        return torch.where(ids < 0, -1, ids + start).flatten()
    if capacity is not None:
        ties = torch.zeros_like(flat, dtype=torch.float32)
        return topk_mask(ties, k=capacity, valid=flat != ignore).ids
    if labels.device.type == "cpu" and not torch.compiler.is_compiling():
        return (flat != ignore).nonzero().squeeze(1)
    return None


def _taken(x: Tensor, rows: Tensor | None, fill: float = 0) -> Tensor:
    """The rows of x [B, T, ...]."""
    x = x.flatten(0, 1)
    return x if rows is None else gather_masked(x[None], rows[None], fill=fill)[0]


def _logits_of(head: Any) -> tuple[Tensor, Tensor | None]:
    """The weight and the bias of its logits: of LXMERT and BridgeTower the head adds the bias."""
    decoder = head.decoder
    return decoder.weight, getattr(head, "bias", None) if decoder.bias is None else decoder.bias


def masked_lm_loss(
    head: Any,
    hidden: Tensor,
    labels: Tensor,
    *,
    ids: Tensor | None = None,
    capacity: int | None = None,
    teacher: Teacher | None = None,
    alpha: float | Tensor = 0.0,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> Tensor:
    """What ``model(..., labels=labels).loss`` is, but the head sees the labelled rows alone.

    Args:
        head: BERT's prediction head, ``model.cls.predictions``: a module `transform` and a linear
            layer `decoder`, tied to the word embeddings or not, with a bias of its own, one of the
            head, or none. BERT's, BLIP's and LXMERT's of `transformers`, ALBEF's `xbert.py` and its
            copies have it.
        hidden: ``[B, T, D]`` the last hidden state of the encoder.
        labels: ``[B, T]`` int64, `ignore_index` where there is nothing to predict.
        ids: ``[B, K]`` int64, -1 for none: only these positions are looked at. What
            `sync_topk_mask` returns gives fixed shapes without waiting for a GPU.
        capacity: the most labelled rows there can be, where there are no ids. Where there are more
            the loss is NaN.
        teacher: ``(head, hidden)`` of a momentum model, whose softmax at the labelled rows becomes
            a soft target: a constant.
        alpha: weight of the teacher, ``(1 - alpha) CE(labels) + alpha CE(teacher)``.
        ignore_index: default -100.
        label_smoothing: share of the labels spread evenly over the vocabulary, default 0.

    Returns:
        Tensor: the mean over labelled rows, one value, float32 (float64 for float64 input). Over no
        rows it is 0 with zero gradients, where hosts return NaN. Gradients flow to `hidden` and to
        the parameters of `head`.

    Raises:
        TypeError: `head` has not these parts, or types do not fit.
        ValueError: shapes or options do not fit.

    Deterministic, as far as torch's own matrix product is. Without `ids` and `capacity` the CPU
    looks up the labelled rows; a GPU is not waited for: there, `transform` runs on every row and
    the vocabulary is streamed.

    Example:
        >>> import torch
        >>> from syncmask_kernels.integrations.mlm import masked_lm_loss
        >>> head = torch.nn.Module()
        >>> head.transform, head.decoder = torch.nn.Tanh(), torch.nn.Linear(4, 10)
        >>> _ = torch.nn.init.zeros_(head.decoder.weight), torch.nn.init.zeros_(head.decoder.bias)
        >>> labels = torch.tensor([[-100, 7, -100]])
        >>> masked_lm_loss(head, torch.randn(1, 3, 4), labels).item()  # log 10
        2.302585...
    """
    _checks.rank("labels", labels, "[B, T]")
    _check_head("head", head, hidden, labels)
    if capacity is not None and ids is not None:
        raise ValueError(f"capacity must come without ids, got both (capacity={capacity})")
    rows = _rows(labels, ids, capacity, ignore_index)
    taken = _taken(labels, rows, ignore_index)
    distilled = None
    if teacher is not None:
        _check_head("head of teacher", teacher[0], teacher[1], labels)
        with torch.no_grad():
            distilled = (teacher[0].transform(_taken(teacher[1], rows)), *_logits_of(teacher[0]))
    weight, bias = _logits_of(head)
    loss = masked_linear_cross_entropy(
        head.transform(_taken(hidden, rows)),
        weight,
        taken,
        bias=bias,
        ids=None if rows is None else torch.arange(rows.shape[0], device=rows.device),
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        teacher=distilled,
        alpha=alpha,
    )
    if capacity is not None:
        loss = loss * torch.where((labels != ignore_index).sum() > capacity, float("nan"), 1.0)
    return loss
