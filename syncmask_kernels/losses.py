"""Losses that look at masked positions only."""

from __future__ import annotations

import torch
from torch import Tensor

from syncmask_kernels import _checks, _host, backends
from syncmask_kernels.backends.loss_request import REDUCTIONS, Head, Targets

Teacher = tuple[Tensor, Tensor, Tensor | None]


def _check_head(suffix: str, head: Head, labels: Tensor, vocabulary: int | None = None) -> None:
    """The linear layer of the student (suffix "") or of the teacher ("_t"), not yet flat."""
    hidden, weight, bias = (f"{name}{suffix}" for name in Head._fields)
    _checks.floating(hidden, head.hidden)
    if head.hidden.shape[:-1] != labels.shape or head.hidden.dim() == 0:
        raise ValueError(
            f"{hidden} must be [*labels.shape, D] with labels of shape {tuple(labels.shape)}, "
            f"got shape {tuple(head.hidden.shape)}"
        )
    _checks.rank(weight, head.weight, "[V, D]")
    _checks.floating(weight, head.weight)
    size = head.weight.shape[0] if vocabulary is None else vocabulary
    _checks.shape(weight, head.weight, "[V, D]", (size, head.hidden.shape[-1]))
    _checks.same_device(hidden, head.hidden, "labels", labels)
    _checks.same_device(weight, head.weight, "labels", labels)
    if head.bias is not None:
        _checks.floating(bias, head.bias)
        _checks.shape(bias, head.bias, "[V]", (size,))
        _checks.same_device(bias, head.bias, "labels", labels)


def _check_alpha(alpha: float | Tensor, distilled: bool, labels: Tensor) -> None:
    if isinstance(alpha, Tensor):
        _checks.floating("alpha", alpha)
        _checks.shape("alpha", alpha, "one value", ())
        _checks.same_device("alpha", alpha, "labels", labels)
    else:
        _checks.fraction("alpha", alpha)
    if not distilled and (isinstance(alpha, Tensor) or alpha > 0):
        raise ValueError(f"alpha needs soft_labels or teacher, got alpha={alpha} alone")


def _check_ids(ids: Tensor, labels: Tensor) -> None:
    _checks.dtype("ids", ids, torch.int64)
    if ids.dim() != labels.dim() or ids.shape[:-1] != labels.shape[:-1]:
        raise ValueError(
            f"ids must be [B, K] (or [K]) beside labels of shape {tuple(labels.shape)}, "
            f"got shape {tuple(ids.shape)}"
        )
    _checks.same_device("ids", ids, "labels", labels)
    _host.ids_within("ids", ids, -1, labels.shape[-1], "T")


def _flat_ids(ids: Tensor | None, labels: Tensor) -> Tensor | None:
    """ids [B, K] of each row of labels -> ids [B * K] of labels.flatten()."""
    if ids is None or labels.dim() == 1:
        return ids
    start = torch.arange(labels.shape[0], device=ids.device).unsqueeze(1) * labels.shape[1]
    return torch.where(ids < 0, -1, ids + start).flatten()


def _flat(head: Head, rows: int) -> Head:
    return head._replace(hidden=head.hidden.reshape(rows, head.hidden.shape[-1]))


def _targets(
    labels: Tensor,
    vocabulary: int,
    soft_labels: Tensor | None,
    teacher: Teacher | None,
    alpha: float | Tensor,
    ignore_index: int,
    label_smoothing: float,
) -> Targets:
    """Checked and flat; the teacher is a constant."""
    if not torch.compiler.is_compiling() and labels.device.type == "cpu":
        _host.ids_within("labels", labels[labels != ignore_index], 0, vocabulary, "V")
    _checks.fraction("label_smoothing", label_smoothing)
    _check_alpha(alpha, soft_labels is not None or teacher is not None, labels)
    rows, soft, head = labels.numel(), None, None
    if soft_labels is not None:
        if teacher is not None:
            raise ValueError("at most one of soft_labels and teacher must be given, got both")
        _checks.floating("soft_labels", soft_labels)
        _checks.shape("soft_labels", soft_labels, "[*labels.shape, V]", (*labels.shape, vocabulary))
        _checks.same_device("soft_labels", soft_labels, "labels", labels)
        soft = soft_labels.detach().reshape(rows, vocabulary)
    if teacher is not None:
        if len(teacher) != 3:
            raise ValueError(
                f"teacher must be (hidden_t, weight_t, bias_t), got {len(teacher)} values"
            )
        _check_head("_t", Head(*teacher), labels, vocabulary)
        hidden_t, weight_t, bias_t = teacher
        bias_t = None if bias_t is None else bias_t.detach()
        head = _flat(Head(hidden_t.detach(), weight_t.detach(), bias_t), rows)
    return Targets(labels.flatten(), soft, head, alpha, ignore_index, label_smoothing)


def masked_linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    ids: Tensor | None = None,
    capacity: int | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    soft_labels: Tensor | None = None,
    teacher: Teacher | None = None,
    alpha: float | Tensor = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """Cross entropy of a linear head over a vocabulary, projecting labelled rows only.

    Serves masked language modelling, masked image modelling over codes, and captioning.

    Args:
        hidden: ``[B, T, D]`` or ``[N, D]`` floating input of the head. Rows without a label are
            never used: they may hold NaN.
        weight: ``[V, D]`` floating, tied or not; the product is taken in the type of `hidden` (or
            of autocast), everything after it in float32 (float64 for float64).
        labels: ``[B, T]`` or ``[N]`` int64 in ``[0, V)``, or `ignore_index`.
        bias: ``[V]``. Default: none.
        ids: ``[B, K]`` (``[K]`` for ``[N, D]``) int64, -1 for none: only these rows are looked at,
            each at most once. What `sync_topk_mask` returns gives fixed shapes without a sync.
        capacity: the most labelled rows there can be, which gives fixed shapes where there are no
            ids. Where there are more the loss and its gradients are NaN, never silently wrong.
        ignore_index: label of rows that do not count, default -100.
        label_smoothing: share of the labels spread evenly over the vocabulary, default 0.
        soft_labels: ``[B, T, V]`` or ``[N, V]`` probabilities of a teacher.
        teacher: ``(hidden_t, weight_t, bias_t or None)`` instead of `soft_labels`: a head that
            computes them at the labelled rows.
        alpha: weight of the teacher in ``(1 - alpha) CE(labels) + alpha CE(teacher)``, a float or a
            tensor of one value (a schedule without recompiling); default 0.
        reduction: ``"mean"`` over labelled rows (default), ``"sum"``, or ``"none"``.

    Returns:
        Tensor: the loss, float32 (float64 for float64 input): one value, or the shape of `labels`
        with 0 where a row does not count. Over no rows the loss is 0 with zero gradients. Gradients
        flow to `hidden`, `weight` and `bias`; the teacher is a constant.

    Raises:
        TypeError: types do not fit.
        ValueError: shapes, devices or options do not fit, both `soft_labels` and `teacher` or both
            `ids` and `capacity` are given, or (on the CPU) a label or an id is out of range.

    Deterministic, as far as torch's own matrix product is. Without `ids` and `capacity` the CPU
    looks up the labelled rows (shapes depend on the data). A GPU is never waited for: Triton
    streams over the vocabulary, and rows without a label cost next to nothing; `ids` or `capacity`
    are faster where few rows are labelled, for they allow PyTorch's products. There a label beyond
    the vocabulary makes the loss NaN. Plain PyTorch goes through all rows, a part at a time.

    Source: the MLM loss of ALBEF `models/xbert.py` (with momentum distillation, over the vocabulary
    axis), which projects every row.

    Example:
        >>> import torch, syncmask_kernels as smk
        >>> hidden, weight = torch.zeros(1, 3, 4), torch.zeros(10, 4)
        >>> smk.masked_linear_cross_entropy(hidden, weight, torch.tensor([[-100, 7, -100]]))
        tensor(2.3026)
    """
    _checks.rank("labels", labels, "[B, T]", "[N]")
    _checks.dtype("labels", labels, torch.int64)
    student = Head(hidden, weight, bias)
    _check_head("", student, labels)
    vocabulary = weight.shape[0]
    if vocabulary == 0:
        raise ValueError(f"weight must be [V, D] with V > 0, got shape {tuple(weight.shape)}")
    if ids is not None:
        _check_ids(ids, labels)
    if capacity is not None:
        _checks.count("capacity", capacity)
        if ids is not None:
            raise ValueError(f"capacity must come without ids, got capacity={capacity} and ids")
    _checks.choice("reduction", reduction, REDUCTIONS)
    targets = _targets(
        labels, vocabulary, soft_labels, teacher, alpha, ignore_index, label_smoothing
    )
    run = backends.choose("masked_linear_cross_entropy", hidden, student, targets, reduction)
    flat = _flat(student, labels.numel())
    loss = run(flat, targets, _flat_ids(ids, labels), capacity, reduction)
    return loss.reshape(labels.shape) if reduction == "none" else loss
