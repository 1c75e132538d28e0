"""Linear cross entropy where the host knows the labelled rows: loss and gradients in one go.

Logits are kept word by word, [V, K], at the end of the memory that becomes the gradient of the
weight, [V, D]. Where K <= D, the gradient of a block of words never reaches the logits of later
words, so three matrix products need no room but for a block of the softmax gradient. That forward
has the gradients ready is the method of Liger Kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from syncmask_kernels.backends.loss_request import Head, Targets

SPARE_LOGITS = 2**22  # alive at a time, of rows for which the gradient of the weight has no room
BLOCK = 2**18  # logits of a block of words, which stays in the cache
WORDS = 2**9  # of a block at least, for a fast product

Plain = Callable[[Tensor, Tensor, Tensor | None], Tensor]


class Gradients(NamedTuple):
    """None where not wanted; `hidden` is of the labelled rows alone."""

    hidden: Tensor | None  # [K, D]
    weight: Tensor | None  # [V, D]
    bias: Tensor | None  # [V]


class _Soft(NamedTuple):
    """The teacher's part in the targets: its probabilities, a block of words at a time."""

    block: Callable[[slice], Tensor]  # -> [words, K]
    mass: Tensor  # [K], the sums of the probabilities: 1 as a rule


def serves(student: Head, targets: Targets) -> bool:
    """Whether all products are taken in one type, which can also hold sums."""
    heads = [student] if targets.teacher is None else [student, targets.teacher]
    types = {tensor.dtype for head in heads for tensor in head if tensor is not None}
    return types in ({torch.float32}, {torch.float64}) and not torch.is_autocast_enabled("cpu")


def summed_loss(
    student: Head, targets: Targets, rows: Tensor, scale: float, plain: Plain
) -> Tensor:
    """`scale` times the sum of the losses of `rows` [K > 0], all labelled.

    `plain` is the same in operations that can be differentiated again.
    """
    recorded = torch.is_grad_enabled()
    wanted = [recorded and x is not None and x.requires_grad for x in student]
    loss: Tensor = _SummedLoss.apply(*student, targets, rows, scale, wanted, plain)
    return loss


class _SummedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Targets,
        rows: Tensor,
        scale: float,
        wanted: list[bool],
        plain: Plain,
    ) -> Tensor:
        ctx.save_for_backward(hidden, weight, bias)
        ctx.rows, ctx.plain = rows, plain
        student = Head(hidden.index_select(0, rows), weight, bias)
        loss, ctx.gradients = _loss_and_gradients(student, targets, rows, scale, wanted)
        return loss

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        student = Head(*ctx.saved_tensors)
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None or torch.is_grad_enabled():
            return (*_plain_gradients(ctx, student, slope), *[None] * 5)
        for gradient in gradients:
            if gradient is not None and slope != 1:
                gradient.mul_(slope)
        of_hidden = gradients.hidden
        if of_hidden is not None:
            of_hidden = torch.zeros_like(student.hidden).index_copy_(0, ctx.rows, of_hidden)
        return (of_hidden, gradients.weight, gradients.bias, *[None] * 5)


def _plain_gradients(ctx: Any, student: Head, slope: Tensor) -> list[Tensor | None]:
    """For a second backward pass, or one that is itself differentiated."""
    needed = ctx.needs_input_grad[: len(student)]
    inputs = [x for x, need in zip(student, needed, strict=True) if need and x is not None]
    differentiable = torch.is_grad_enabled()
    with torch.enable_grad():
        loss = ctx.plain(*student)
    found = iter(torch.autograd.grad(loss, inputs, slope, create_graph=differentiable))
    return [next(found) if need else None for need in needed]


def _loss_and_gradients(
    student: Head, targets: Targets, rows: Tensor, scale: float, wanted: list[bool]
) -> tuple[Tensor, Gradients]:
    """`student` has the hidden states of `rows` only; `targets` those of all rows."""
    hidden, weight, _ = student
    gradients = Gradients(
        torch.zeros_like(hidden) if wanted[0] else None,
        weight.new_empty(weight.shape) if wanted[1] else None,
        weight.new_zeros(weight.shape[0]) if wanted[2] else None,
    )
    heads = 1 if targets.teacher is None else 2
    loss = hidden.new_zeros(())
    for part, room in _rooms(hidden, weight, gradients.weight, heads):
        mine = gradients
        if gradients.hidden is not None:
            mine = gradients._replace(hidden=gradients.hidden[part])
        head = student._replace(hidden=hidden[part])
        loss += _add_part(head, targets, rows[part], scale, room, mine, part.start > 0)
    return loss, gradients


def _rooms(
    hidden: Tensor, weight: Tensor, of_weight: Tensor | None, heads: int
) -> Iterator[tuple[slice, Tensor]]:
    """Parts of the rows of `hidden`, and where their logits go: [V, rows of each head]."""
    (rows, width), vocabulary = hidden.shape, weight.shape[0]
    done = 0
    if of_weight is not None and width >= heads:
        done = min(rows, width // heads)
        size = vocabulary * heads * done
        yield slice(0, done), of_weight.view(-1)[-size:].view(vocabulary, heads * done)
    most = min(rows - done, max(1, SPARE_LOGITS // (vocabulary * heads)))
    spare = hidden.new_empty(vocabulary * heads * most)
    while done < rows:
        part = slice(done, min(done + most, rows))
        columns = heads * (part.stop - part.start)
        yield part, spare[: vocabulary * columns].view(vocabulary, columns)
        done = part.stop


def _add_part(
    student: Head,
    targets: Targets,
    rows: Tensor,
    scale: float,
    room: Tensor,
    gradients: Gradients,
    onto: bool,
) -> Tensor:
    """The loss of `rows`; their gradients are added, `onto` the weight's or in its place."""
    count, vocabulary = rows.shape[0], room.shape[0]
    blocks = _blocks(vocabulary, count)
    logits = room[:, :count]
    top, log_total = _project(student, logits, blocks)
    soft = _soft(targets, rows, room[:, count:], blocks)
    alpha = 0.0 if soft is None else float(targets.alpha)
    labelled, alpha = scale * (1 - alpha), scale * alpha
    hard = labelled * (1 - targets.label_smoothing)
    even = labelled * targets.label_smoothing / vocabulary
    mass = labelled if soft is None else labelled + alpha * soft.mass
    labels = targets.labels.index_select(0, rows)
    picked = logits.gather(0, labels.unsqueeze(0)).squeeze(0)
    loss = hard * (log_total - (picked - top)).sum()
    for words in blocks:
        log_p = (logits[words] - top).sub_(log_total)
        if even > 0:
            loss -= even * log_p.sum()
        chosen = None if soft is None else alpha * soft.block(words)
        if chosen is not None:
            loss -= (chosen * log_p).sum()
        if any(gradient is not None for gradient in gradients):
            slope = log_p.exp_().mul_(mass)
            if even > 0:
                slope -= even
            if chosen is not None:
                slope -= chosen
            _subtract_labels(slope, labels - words.start, hard)
            _add_gradients(slope, student, words, gradients, onto)
    return loss


def _blocks(vocabulary: int, rows: int) -> list[slice]:
    size = max(WORDS, BLOCK // rows)
    return [slice(v, min(v + size, vocabulary)) for v in range(0, vocabulary, size)]


def _project(head: Head, logits: Tensor, blocks: list[slice]) -> tuple[Tensor, Tensor]:
    """Writes the logits [V, K] of the head; their maxima, and the logs of the sums below these.

    The two are kept apart: their sum would round away digits of small differences.
    """
    tops, totals = [], []
    for words in blocks:
        torch.mm(head.weight[words], head.hidden.t(), out=logits[words])
        if head.bias is not None:
            logits[words] += head.bias[words].unsqueeze(1)
        # A word may have no chance at all, a logit of -inf, and so may all of a block.
        tops.append(logits[words].amax(dim=0).clamp_(min=torch.finfo(logits.dtype).min))
        totals.append((logits[words] - tops[-1]).exp_().sum(dim=0))
    top = torch.stack(tops).amax(dim=0)
    kept = (torch.stack(tops) - top).exp_()
    return top, (torch.stack(totals) * kept).sum(dim=0).log_()


def _soft(targets: Targets, rows: Tensor, room: Tensor, blocks: list[slice]) -> _Soft | None:
    if targets.teacher is not None:
        hidden, weight, bias = targets.teacher
        top, log_total = _project(Head(hidden.index_select(0, rows), weight, bias), room, blocks)
        return _Soft(lambda words: (room[words] - top).sub_(log_total).exp_(), torch.ones_like(top))
    soft = targets.soft
    if soft is None:
        return None

    def block(words: slice) -> Tensor:
        return soft[:, words].index_select(0, rows).t().to(room.dtype)

    return _Soft(block, torch.stack([block(words).sum(dim=0) for words in blocks]).sum(dim=0))


def _subtract_labels(slope: Tensor, labels: Tensor, share: float) -> None:
    """slope [words, K] -= share where the label, counted from the first word, is."""
    inside = (labels >= 0) & (labels < slope.shape[0])
    shares = inside.to(slope.dtype) * -share
    slope.scatter_add_(0, labels.clamp(0, slope.shape[0] - 1).unsqueeze(0), shares.unsqueeze(0))


def _add_gradients(
    slope: Tensor, student: Head, words: slice, gradients: Gradients, onto: bool
) -> None:
    """From the slope [words, K] of the loss by the logits of a block of words."""
    if gradients.hidden is not None:
        gradients.hidden.addmm_(slope.t(), student.weight[words])
    if gradients.weight is not None:
        gradients.weight[words].addmm_(slope, student.hidden, beta=int(onto))
    if gradients.bias is not None:
        gradients.bias[words] += slope.sum(dim=1)
