"""What queue_contrastive_loss does between its products, a block of logits at a time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from syncmask_kernels import backends
from syncmask_kernels.backends import cpu
from syncmask_kernels.backends.eager.queue_losses import PLAIN_PASSES, Passes, Sums
from syncmask_kernels.backends.overloads.queue_losses import TILE_KEYS
from syncmask_kernels.backends.queue_losses_request import Keys
from tests.accuracy import assert_as_accurate

B = 3
# Around the edges of vectors and of tiles.
KEYS = [1, 7, 8, 9, TILE_KEYS - 1, TILE_KEYS, TILE_KEYS + 1, 2 * TILE_KEYS + 13]
OWN = torch.tensor([4, 2**33 + 1, 4])


def fused() -> Passes:
    reason = cpu.unavailable("cpu")
    if reason is not None:
        pytest.skip(reason)
    from syncmask_kernels.backends.cpu import queue_losses

    return queue_losses.PASSES


@pytest.fixture(params=["eager", "cpu"])
def passes(request: pytest.FixtureRequest) -> Passes:
    return PLAIN_PASSES if request.param == "eager" else fused()


def logits(keys: int, teacher: bool) -> Tensor:
    generator = torch.Generator().manual_seed(keys)
    return 4 * torch.randn(2 * B if teacher else B, keys, generator=generator)


def ids(keys: int) -> Tensor:
    """A third of the first row's id, a third of an id that equals the second's in 32 bits only."""
    return torch.tensor([4, 1, 2**33 + 1]).repeat(keys)[:keys]


def columns(passes: Passes, keys: int) -> list[slice]:
    size = keys if passes is PLAIN_PASSES else TILE_KEYS
    return [slice(start, min(start + size, keys)) for start in range(0, keys, size)]


def true_sums(values: Tensor, of: Tensor | None, tiles: list[slice]) -> Sums:
    """Tile by tile what `Sums` promises."""
    same = torch.zeros(B, values.shape[1], dtype=torch.bool)
    if of is not None:
        same = OWN.unsqueeze(1) == of
    found = []
    for tile in tiles:
        part, positive = values[:, tile], same[:, tile]
        student, teacher = part[:B], part[B:]
        top = part.amax(dim=1)
        powers = (part - top.unsqueeze(1)).exp()
        mixed = (powers[B:] * student).sum(dim=1) if len(teacher) else values.new_zeros(B)
        chosen = student.where(positive, 0.0).sum(dim=1)
        found.append(Sums(top, powers.sum(dim=1), mixed, chosen, positive.sum(dim=1)))
    return Sums(*(torch.stack(each, dim=1) for each in zip(*found, strict=True)))


@pytest.mark.parametrize("positives", [False, True])
@pytest.mark.parametrize("teacher", [False, True])
@pytest.mark.parametrize("keys", KEYS)
@pytest.mark.parametrize("shift", [0.0, -500.0, 500.0])
def test_exponentials(
    passes: Passes, keys: int, teacher: bool, positives: bool, shift: float
) -> None:
    values = logits(keys, teacher) + shift
    of, tiles = ids(keys) if positives else None, columns(passes, keys)
    plain, truth = (true_sums(x, of, tiles) for x in (values, values.double()))
    got = values.clone()
    sums = passes.exponentials_(got, OWN, of)
    for tile, top in zip(tiles, plain.top.T, strict=True):
        below = values[:, tile] - top.unsqueeze(1)
        assert_as_accurate(got[:, tile], below.exp(), below.double().exp(), 2.0)
    assert torch.equal(sums.top, plain.top)
    assert torch.equal(
        sums.positive_count.expand_as(plain.positive_count), plain.positive_count.float()
    )
    for name in ("total", "mixed", "positive"):
        true = getattr(truth, name)
        wide = getattr(sums, name).expand_as(true)
        assert_as_accurate(wide, getattr(plain, name), true)


@pytest.mark.parametrize("positives", [False, True])
@pytest.mark.parametrize("teacher", [False, True])
@pytest.mark.parametrize("keys", KEYS)
def test_slopes(passes: Passes, keys: int, teacher: bool, positives: bool) -> None:
    weights, tiles = logits(keys, teacher), columns(passes, keys)
    before, of = weights.clone(), ids(keys) if positives else None
    scales = torch.arange(1.0, len(weights) * len(tiles) + 1).view(len(weights), -1)
    share = torch.tensor([0.5, 0.25, -3.0])
    passes.slopes_(weights, scales, OWN, of, share)
    factors = torch.cat(
        [x.expand(-1, t.stop - t.start) for t, x in zip(tiles, scales.split(1, 1), strict=True)], 1
    )
    want = before[:B] * factors[:B]
    if teacher:
        want += before[B:] * factors[B:]
        assert torch.equal(weights[B:], before[B:])
    if of is not None:
        want -= (OWN.unsqueeze(1) == of) * share.unsqueeze(1)
    torch.testing.assert_close(weights[:B], want, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("row", [1, 4])
def test_nan_stays_in_its_row(passes: Passes, row: int) -> None:
    values = logits(20, True)
    values[row, 17] = float("nan")
    sums = passes.exponentials_(values, OWN, None)
    for found in (sums.top, sums.total, values.sum(dim=1, keepdim=True)):
        assert found.isnan().any(dim=1).tolist() == [i == row for i in range(2 * B)]
    assert sums.mixed.isnan().flatten().tolist() == [False, True, False]


def test_same_bits_with_one_thread_and_with_three() -> None:
    passes, before, found = fused(), torch.get_num_threads(), []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        values = logits(5000, True)
        sums = passes.exponentials_(values, OWN, ids(5000))
        passes.slopes_(values, sums.total, OWN, ids(5000), sums.mixed[:, 0].contiguous())
        found.append((values, *sums))
    torch.set_num_threads(before)
    for one, three in zip(*found, strict=True):
        assert torch.equal(one, three)


def test_opcheck() -> None:
    fused()
    ops = torch.ops.syncmask
    for of in (None, ids(TILE_KEYS + 1)):
        for teacher in (False, True):
            values, rows = logits(TILE_KEYS + 1, teacher), 2 * B if teacher else B
            torch.library.opcheck(ops.queue_contrast_exponentials_.cpu, (values, OWN, of))
            slopes = (values, torch.ones(rows, 2), OWN, of, torch.ones(B))
            torch.library.opcheck(ops.queue_contrast_slopes_.cpu, slopes)
    room = ops.queue_contrast_room.cpu
    assert room(values, 12).shape == (12,)
    torch.library.opcheck(room, (values, 12), test_utils=("test_schema", "test_faketensor"))


def test_a_block_that_is_not_contiguous_is_refused() -> None:
    with pytest.raises(RuntimeError, match="contiguous"):
        fused().exponentials_(logits(4, False).T.contiguous().T, OWN, None)


def test_what_the_cpu_backend_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    fused()

    def refusal(dtype: torch.dtype) -> str | None:
        keys = Keys(torch.zeros(B, 2, dtype=dtype), torch.zeros(2, 4), OWN, None)
        return backends.refusal("cpu", "queue_contrastive_loss", "cpu", (keys,))

    assert refusal(torch.float32) is None
    assert "float64" in str(refusal(torch.float64))
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert "torch.compile" in str(refusal(torch.float32))
