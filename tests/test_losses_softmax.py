"""The softmax between the products of masked_linear_cross_entropy, a block of logits at a time."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from syncmask_kernels import backends
from syncmask_kernels.backends import cpu
from syncmask_kernels.backends.eager.losses_softmax import (
    PLAIN_SOFTMAX,
    LogSum,
    Shares,
    SoftBlock,
    Softmax,
)
from syncmask_kernels.backends.loss_request import Head, Targets
from tests.accuracy import assert_as_accurate

INF, NAN = float("inf"), float("nan")
# Words and columns around the edges of tiles, of chunks and of vectors.
SIZES = [(1, 1), (31, 7), (33, 64), (16, 65), (70, 131), (17, 8)]


@pytest.fixture(params=["eager", "cpu"])
def softmax(request: pytest.FixtureRequest) -> Softmax:
    if request.param == "eager":
        return PLAIN_SOFTMAX
    reason = cpu.unavailable("cpu")
    if reason is not None:
        pytest.skip(reason)
    return fused()


def fused() -> Softmax:
    from syncmask_kernels.backends.cpu import losses

    return losses.SOFTMAX


def random(*shape: int, seed: int = 0) -> Tensor:
    return 4 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def within_room(values: Tensor) -> Tensor:
    """The same as a view of columns of a wider room, of which the rest is NaN."""
    room = torch.full((values.shape[0], values.shape[1] + 5), NAN, dtype=values.dtype)
    room[:, 2:-3] = values
    return room[:, 2:-3]


def log_sum(softmax: Softmax, logits: Tensor, bias: Tensor | None, cut: int) -> LogSum:
    """Of the logits, in two blocks; the bias is added to them."""
    top = torch.full_like(logits[0], torch.finfo(logits.dtype).min)
    total = torch.zeros_like(top)
    for words in (slice(0, cut), slice(cut, None)):
        softmax.add_block(logits[words], None if bias is None else bias[words], top, total)
    return LogSum(top, total.log())


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("shift", [0.0, -500.0, 500.0])
def test_sums(softmax: Softmax, size: tuple[int, int], biased: bool, shift: float) -> None:
    before = random(size[0] + 3, size[1]) + shift
    bias = random(size[0] + 3, seed=1) if biased else None
    logits = within_room(before)
    sums = log_sum(softmax, logits, bias, size[0])
    summed = before if bias is None else before + bias.unsqueeze(1)
    assert torch.equal(logits, summed)
    assert torch.equal(sums.top, summed.amax(dim=0))
    truth = (summed.double() - sums.top).logsumexp(dim=0)
    assert_as_accurate(sums.log_total, (summed - sums.top).logsumexp(dim=0), truth, 2.0)
    logits_and_rest = logits.as_strided((size[0] + 3, size[1] + 5), (size[1] + 5, 1), 0)
    assert logits_and_rest.isnan().sum() == 5 * (size[0] + 3)


def test_sums_of_what_is_not_finite(softmax: Softmax) -> None:
    """Of columns, in two blocks: words without a chance, none with one, and NaN or inf anywhere."""
    logits = random(50, 8)
    logits[:40, 1] = -INF
    logits[40:, 2] = -INF
    logits[:, 3] = -INF
    logits[7, 4] = logits[45, 5] = logits[:, 6] = NAN
    logits[9, 7] = INF
    top, log_total = log_sum(softmax, logits.clone(), None, 40)
    truth = logits.double().logsumexp(dim=0)
    torch.testing.assert_close((top + log_total)[:4], truth.float()[:4], rtol=1e-6, atol=1e-6)
    assert log_total[4:].isnan().all()


class Block(NamedTuple):
    """The arguments of `slopes`."""

    logits: Tensor
    sums: LogSum
    labels: Tensor
    shares: Shares
    soft: SoftBlock | None


def block(size: tuple[int, int], smoothing: bool, soft: str, dtype: torch.dtype) -> Block:
    words, columns = size
    logits, soft_logits = (random(words, columns, seed=seed) for seed in (2, 3))
    sums, soft_sums = (
        # There are other words beside those of the block.
        LogSum(x.amax(dim=0).to(dtype) + 0.5, (x - x.amax(dim=0)).logsumexp(dim=0).to(dtype))
        for x in (logits, soft_logits)
    )
    mass = random(columns, seed=6).abs().to(dtype)
    values: dict[str, SoftBlock | None] = {
        "": None,
        "probabilities": SoftBlock(random(columns, words, seed=7).to(dtype).softmax(1).t(), None),
        "logits": SoftBlock(within_room(soft_logits.to(dtype)), soft_sums),
    }
    labels = torch.arange(columns) * 5 % (2 * words + 3) - words // 2 - 1
    return Block(
        within_room(logits.to(dtype)),
        sums,
        labels,
        Shares(mass, 0.7, 0.02 if smoothing else 0.0, 0.4 if soft else 0.0),
        values[soft],
    )


def true_slopes(given: Block) -> tuple[Tensor, Tensor]:
    """Word by word what `Softmax.slopes` promises."""
    logits, sums, labels, shares, soft = given
    log_p = (logits - sums.top) - sums.log_total
    chosen = torch.zeros_like(log_p)
    if soft is not None:
        chosen = soft.values
        if soft.sums is not None:
            chosen = ((chosen - soft.sums.top) - soft.sums.log_total).exp()
    targets = shares.even + shares.alpha * chosen
    hard = shares.hard * (labels == torch.arange(len(logits)).unsqueeze(1))
    loss = -(targets * log_p).sum() if shares.even or soft is not None else log_p.new_zeros(())
    return shares.mass * log_p.exp() - targets - hard, loss


@pytest.mark.parametrize("soft", ["", "probabilities", "logits"])
@pytest.mark.parametrize("smoothing", [False, True])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_slopes(softmax: Softmax, size: tuple[int, int], smoothing: bool, soft: str) -> None:
    given = block(size, smoothing, soft, torch.float32)
    plain = true_slopes(given)
    truth = true_slopes(block(size, smoothing, soft, torch.float64))
    slopes, loss = softmax.slopes(*given)
    assert_as_accurate(slopes, plain[0], truth[0], 2.0)
    assert_as_accurate(loss, plain[1], truth[1])


@pytest.mark.parametrize("soft", ["", "probabilities", "logits"])
@pytest.mark.parametrize("smoothing", [False, True])
def test_slopes_of_what_is_not_finite(softmax: Softmax, smoothing: bool, soft: str) -> None:
    """As in PyTorch: without a chance, certain, and NaN."""
    for value in (-INF, NAN):
        given = block((20, 9), smoothing, soft, torch.float32)
        given.logits[3] = value
        given.logits[7, 8] = value
        if soft:
            assert given.soft is not None
            given.soft.values[5] = -INF if soft == "logits" else 0
        torch.testing.assert_close(
            softmax.slopes(*given), true_slopes(given), rtol=1e-5, atol=1e-6, equal_nan=True
        )
    given = block((20, 9), smoothing, soft, torch.float32)
    given.sums.log_total[2] = NAN
    slopes, _ = softmax.slopes(*given)
    assert torch.equal(slopes.isnan().any(dim=0), torch.arange(9) == 2)


def test_same_bits_with_one_thread_and_with_three() -> None:
    if cpu.unavailable("cpu"):
        pytest.skip("the CPU library is not built")
    before, found = torch.get_num_threads(), []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        given = block((170, 333), True, "logits", torch.float32)
        bias = random(170, seed=9)
        found.append((*fused().slopes(*given), *log_sum(fused(), given.logits, bias, 90)))
    torch.set_num_threads(before)
    for one, three in zip(*found, strict=True):
        assert torch.equal(one, three)


def test_opcheck() -> None:
    if cpu.unavailable("cpu"):
        pytest.skip("the CPU library is not built")
    logits, top, total = random(20, 9), torch.zeros(9), torch.zeros(9)
    add_block = torch.ops.syncmask.linear_cross_entropy_add_block.cpu
    slopes = torch.ops.syncmask.linear_cross_entropy_slopes.cpu
    for bias in (None, random(20)):
        torch.library.opcheck(add_block, (logits, bias, top, total))
    for soft in ("", "probabilities", "logits"):
        given = block((20, 9), True, soft, torch.float32)
        values, sums = given.soft or (None, None)
        arguments = given.logits, *given.sums, given.labels, *given.shares, values
        torch.library.opcheck(slopes, (*arguments, *(sums or (None, None))))


def refusal(student: Head, reduction: str = "mean", **given: Any) -> str | None:
    targets = Targets(torch.arange(6), None, None, 0.4, -100, 0.0)._replace(**given)
    op = "masked_linear_cross_entropy"
    return backends.refusal("cpu", op, "cpu", (student, targets, reduction))


def test_what_the_cpu_backend_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    reason = cpu.unavailable("cpu")
    if reason is not None:
        pytest.skip(reason)
    head = Head(random(6, 5), random(7, 5), random(7))
    for served in (refusal(head), refusal(head, "sum", teacher=head), refusal(head, soft=head[1])):
        assert served is None
    wide = Head(*(x.double() for x in head if x is not None))
    half = head._replace(weight=head.weight.bfloat16())
    for refused in (refusal(wide), refusal(half), refusal(head, teacher=half)):
        assert "float32" in str(refused)
    with torch.autocast("cpu"):
        assert "autocast" in str(refusal(head))
    assert "not summed" in str(refusal(head, "none"))
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert "torch.compile" in str(refusal(head))
