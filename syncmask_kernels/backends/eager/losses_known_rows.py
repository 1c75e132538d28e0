"""Linear cross entropy where the host knows the labelled rows: loss and gradients in one go.

Logits are kept word by word, [V, K], at the end of the memory that becomes the gradient of the
weight, [V, D]. Where K <= D, the gradient of a block of words never reaches the logits of later
words, so three matrix products need no room but for a block of the softmax gradient. That forward
has the gradients ready is the method of Liger Kernel.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from syncmask_kernels.backends.eager.losses_softmax import LogSum, Shares, SoftBlock, Softmax
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
    """The teacher's part in the targets."""

    block: Callable[[slice], SoftBlock]
    mass: Tensor  # [K], the sums of the probabilities: 1 as a rule


def serves(student: Head, targets: Targets) -> bool:
    """Whether all products are taken in one type, which can also hold sums."""
    heads = [student] if targets.teacher is None else [student, targets.teacher]
    types = {tensor.dtype for head in heads for tensor in head if tensor is not None}
    return types in ({torch.float32}, {torch.float64}) and not torch.is_autocast_enabled("cpu")


def summed_loss(
    student: Head, targets: Targets, rows: Tensor, scale: float, softmax: Softmax, plain: Plain
) -> Tensor:
    """`scale` times the sum of the losses of `rows` [K > 0], all labelled.

    `plain` is the same in operations that can be differentiated again.
    """
    recorded = torch.is_grad_enabled()
    wanted = [recorded and x is not None and x.requires_grad for x in student]
    loss: Tensor = _SummedLoss.apply(*student, targets, rows, scale, wanted, softmax, plain)
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
        softmax: Softmax,
        plain: Plain,
    ) -> Tensor:
        ctx.save_for_backward(hidden, weight, bias)
        ctx.rows, ctx.plain = rows, plain
        student = Head(hidden.index_select(0, rows), weight, bias)
        loss, ctx.gradients = _loss_and_gradients(student, targets, rows, scale, wanted, softmax)
        return loss

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        student = Head(*ctx.saved_tensors)
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None or torch.is_grad_enabled():
            return (*_plain_gradients(ctx, student, slope), *[None] * 6)
        for gradient in gradients:
            if gradient is not None and slope != 1:
                gradient.mul_(slope)
        of_hidden = gradients.hidden
        if of_hidden is not None:
            of_hidden = torch.zeros_like(student.hidden).index_copy_(0, ctx.rows, of_hidden)
        return (of_hidden, gradients.weight, gradients.bias, *[None] * 6)


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
    student: Head,
    targets: Targets,
    rows: Tensor,
    scale: float,
    wanted: list[bool],
    softmax: Softmax,
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
        loss += _add_part(head, targets, rows[part], scale, softmax, room, mine, part.start > 0)
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
    most = max(1, SPARE_LOGITS // (vocabulary * heads))
    parts = math.ceil((rows - done) / most)
    size = math.ceil((rows - done) / max(parts, 1))
    spare = hidden.new_empty(vocabulary * heads * size)
    while done < rows:
        part = slice(done, min(done + size, rows))
        columns = heads * (part.stop - part.start)
        yield part, spare[: vocabulary * columns].view(vocabulary, columns)
        done = part.stop


def _add_part(
    student: Head,
    targets: Targets,
    rows: Tensor,
    scale: float,
    softmax: Softmax,
    room: Tensor,
    gradients: Gradients,
    onto: bool,
) -> Tensor:
    """The loss of `rows`; their gradients are added, `onto` the weight's or in its place."""
    count, vocabulary = rows.shape[0], room.shape[0]
    blocks = _blocks(vocabulary, count)
    logits = room[:, :count]
    sums = _project(student, logits, blocks, softmax)
    soft = _soft(targets, rows, room[:, count:], blocks, softmax)
    alpha = 0.0 if soft is None else float(targets.alpha)
    labelled, alpha = scale * (1 - alpha), scale * alpha
    hard = labelled * (1 - targets.label_smoothing)
    even = labelled * targets.label_smoothing / vocabulary
    mass = torch.full_like(sums.top, labelled)
    if soft is not None:
        mass += alpha * soft.mass
    shares = Shares(mass, hard, even, alpha)
    labels = targets.labels.index_select(0, rows)
    picked = logits.gather(0, labels.unsqueeze(0)).squeeze(0)
    loss = hard * (sums.log_total - (picked - sums.top)).sum()
    for words in blocks:
        chosen = None if soft is None else soft.block(words)
        slopes, part = softmax.slopes(logits[words], sums, labels - words.start, shares, chosen)
        loss += part
        _add_gradients(slopes, student, words, gradients, onto)
    return loss


def _blocks(vocabulary: int, rows: int) -> list[slice]:
    size = max(WORDS, BLOCK // rows)
    return [slice(v, min(v + size, vocabulary)) for v in range(0, vocabulary, size)]


def _project(head: Head, logits: Tensor, blocks: list[slice], softmax: Softmax) -> LogSum:
    """Writes the logits [V, K] of the head."""
    # A word may have no chance at all, a logit of -inf, and so may all of a block.
    top = torch.full_like(logits[0], torch.finfo(logits.dtype).min)
    total = torch.zeros_like(top)
    for words in blocks:
        torch.mm(head.weight[words], head.hidden.t(), out=logits[words])
        softmax.add_block(
            logits[words], None if head.bias is None else head.bias[words], top, total
        )
    return LogSum(top, total.log_())


def _soft(
    targets: Targets, rows: Tensor, room: Tensor, blocks: list[slice], softmax: Softmax
) -> _Soft | None:
    if targets.teacher is not None:
        hidden, weight, bias = targets.teacher
        sums = _project(Head(hidden.index_select(0, rows), weight, bias), room, blocks, softmax)
        return _Soft(lambda words: SoftBlock(room[words], sums), torch.ones_like(sums.top))
    soft = targets.soft
    if soft is None:
        return None

    def block(words: slice) -> SoftBlock:
        return SoftBlock(soft[:, words].index_select(0, rows).t().to(room.dtype), None)

    masses = [block(words).values.sum(dim=0) for words in blocks]
    return _Soft(block, torch.stack(masses).sum(dim=0))


def _add_gradients(
    slopes: Tensor, student: Head, words: slice, gradients: Gradients, onto: bool
) -> None:
    """From the slopes [words, K] of the loss by the logits of a block of words."""
    if gradients.hidden is not None:
        gradients.hidden.addmm_(slopes.t(), student.weight[words])
    if gradients.weight is not None:
        gradients.weight[words].addmm_(slopes, student.hidden, beta=int(onto))
    if gradients.bias is not None:
        gradients.bias[words] += slopes.sum(dim=1)
