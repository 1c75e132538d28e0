"""topk_mask: bit-exact against sorting each row, on every backend."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import syncmask_kernels as smk
from reference.ops import selection as oracle
from tests.selection_cases import (
    INF,
    KINDS,
    NAN,
    SIZES,
    adversarial,
    assert_chosen,
    flushed_denormals,
    positions,
)

ROWS = len(KINDS)


def check(scores: Tensor, valid: Tensor | None = None, **options: Any) -> None:
    width = options.pop("width", None)
    chosen = smk.topk_mask(scores, valid=valid, width=width, **options)
    assert_chosen(chosen.mask, chosen.ids, scores, valid, **options)
    padded = torch.cat([scores.float(), torch.full((len(scores), 1), -INF)], dim=1)
    expected = padded.gather(1, chosen.ids % padded.shape[1])
    torch.testing.assert_close(chosen.scores, expected, equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize("n", SIZES)
def test_matches_sorting(backend: str, n: int) -> None:
    rows = 2 * ROWS if n < 1024 else ROWS
    scores, valid = adversarial(rows, n), positions(rows, n)
    for k in {0, 1, n // 2, n - 1, n, n + 3}:
        check(scores, valid, k=k)
    check(scores, k=n // 3)
    check(scores, valid, k=n // 3, largest=False)


def test_a_row_of_more_than_a_million(backend: str) -> None:
    n = 2**20 + 9
    scores = torch.zeros(n)
    scores[-5:] = 1.0
    assert smk.topk_mask(scores, k=4).ids.tolist() == [n - 5, n - 4, n - 3, n - 2]
    assert smk.topk_mask(scores, k=7).ids.tolist() == [0, 1, *range(n - 5, n)]


@pytest.mark.parametrize("ratio", [0.0, 0.07, 0.15, 1 / 3, 0.5, 0.75, 1.0])
def test_ratio_is_the_exact_ceiling_of_the_valid_positions(backend: str, ratio: float) -> None:
    scores = adversarial(101, 100)
    valid = torch.arange(100) < torch.arange(101)[:, None]
    check(scores, valid, ratio=ratio)
    check(scores, ratio=ratio, width=3)
    assert smk.topk_mask(scores, ratio=0.07).ids.shape[1] == 7
    numpy_ratio = smk.topk_mask(scores, ratio=np.float32(ratio))
    assert torch.equal(numpy_ratio.ids, smk.topk_mask(scores, ratio=ratio).ids)


def test_smallest_first_keeps_nan_last(backend: str) -> None:
    scores = adversarial(2 * ROWS, 64)
    check(scores, k=20, largest=False)
    check(scores, scores < 0.3, k=20, largest=False)
    check(scores, k=63, largest=False)


@given(
    rows=st.lists(
        st.lists(
            st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5, 1e-45, -1e-45, NAN, INF, -INF]),
            min_size=5,
            max_size=5,
        ),
        min_size=1,
        max_size=4,
    ),
    k=st.integers(0, 6),
    largest=st.booleans(),
    seed=st.integers(0, 9),
)
@settings(max_examples=60, deadline=None)
def test_few_values(rows: list[list[float]], k: int, largest: bool, seed: int) -> None:
    scores = torch.tensor(rows)
    valid = torch.rand(scores.shape, generator=torch.Generator().manual_seed(seed)) < 0.8
    check(scores, valid, k=k, largest=largest)
    with smk.use_backend("eager"):
        check(scores, valid, k=k, largest=largest)


@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("n", [5, 197, 1024])
def test_flushing_denormals_to_zero_changes_nothing(backend: str, n: int, largest: bool) -> None:
    scores, valid = adversarial(ROWS, n), positions(ROWS, n)
    with flushed_denormals():
        chosen = smk.topk_mask(scores, k=n // 2, valid=valid, largest=largest)
    assert_chosen(chosen.mask, chosen.ids, scores, valid, k=n // 2, largest=largest)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_types(backend: str, dtype: torch.dtype) -> None:
    scores = adversarial(ROWS, 197).to(dtype)
    assert smk.topk_mask(scores, k=9).scores.dtype == torch.float32
    check(scores, positions(ROWS, 197), k=80)


def test_float64_is_compared_in_full() -> None:
    scores = torch.tensor([[1.0, 1.0 + 1e-12, 1.0 + 2e-12]], dtype=torch.float64)
    chosen = smk.topk_mask(scores, k=1)
    assert chosen.ids.item() == 2
    assert chosen.scores.dtype == torch.float64


def test_k_of_each_row_and_width(backend: str) -> None:
    scores = adversarial(8, 12)
    ks = torch.tensor([0, 3, 12, 40, -2, 2**40, 5 - 2**32, 7])
    for width in (None, 0, 5, 20):
        check(scores, k=ks, width=width)
        check(scores, positions(8, 12), k=ks, width=width)
    assert smk.topk_mask(scores, k=ks).ids.shape == (8, 12)


def test_a_row_is_chosen_alike_in_any_batch_and_layout(backend: str) -> None:
    scores, valid = adversarial(12, 257), positions(12, 257)
    whole = smk.topk_mask(scores, k=100, valid=valid).mask
    alone = [smk.topk_mask(scores[b], k=100, valid=valid[b]).mask for b in range(12)]
    strided = torch.stack([scores.t(), scores.t()], dim=-1)[..., 0].t()
    assert not strided.is_contiguous()
    assert torch.equal(whole, torch.stack(alone))
    assert torch.equal(whole, smk.topk_mask(strided, k=100, valid=valid.t().clone().t()).mask)
    nested = smk.topk_mask(scores.reshape(3, 4, 257), k=100, valid=valid.reshape(3, 4, 257))
    assert torch.equal(nested.mask.reshape(12, 257), whole)
    repeated = smk.topk_mask(scores[:1].expand(3, 257), k=100).mask
    assert torch.equal(repeated, whole[:1].expand(3, 257))


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0), (2, 0, 4)])
def test_empty(backend: str, shape: tuple[int, ...]) -> None:
    chosen = smk.topk_mask(torch.zeros(shape), k=2)
    assert chosen.mask.shape == shape
    assert chosen.ids.shape == chosen.scores.shape == (*shape[:-1], 2)
    assert (chosen.ids == -1).all()


def test_gradient_reaches_the_chosen_scores(backend: str) -> None:
    scores = torch.tensor([[0.1, 0.9, 0.5], [0.3, 0.2, 0.1]], requires_grad=True)
    valid = torch.tensor([[True, True, True], [True, False, False]])
    chosen = smk.topk_mask(scores, k=2, valid=valid)
    chosen.scores.masked_fill(chosen.ids < 0, 0.0).sum().backward()
    assert scores.grad is not None
    assert scores.grad.tolist() == [[0.0, 1.0, 1.0], [1.0, 0.0, 0.0]]


def test_complement_is_what_mae_keeps(backend: str) -> None:
    scores = adversarial(9, 20)
    chosen = smk.topk_mask(scores, ratio=0.75)
    kept = smk.complement(chosen)
    assert torch.equal(kept.ids, oracle.ids_of(~chosen.mask, 5))
    rows = torch.arange(20.0).expand(9, 20)
    rebuilt = torch.cat([rows.gather(1, kept.ids), torch.full((9, 15), -1.0)], dim=1)
    assert torch.equal(kept.restore.sort().values, torch.arange(20).expand(9, 20))
    assert torch.equal(rebuilt.gather(1, kept.restore), torch.where(chosen.mask, -1.0, rows))


def test_complement_leaves_out_excluded_positions() -> None:
    scores = adversarial(9, 20)
    valid = torch.rand(scores.shape, generator=torch.Generator().manual_seed(2)) < 0.6
    chosen = smk.topk_mask(scores, ratio=0.4, valid=valid)
    kept = smk.complement(chosen, valid=valid)
    assert torch.equal(kept.ids, oracle.ids_of(valid & ~chosen.mask, 12))
    rows = torch.arange(20.0).expand(9, 20)
    rebuilt = torch.cat([rows.gather(1, kept.ids.clamp(min=0)), torch.full((9, 8), -1.0)], dim=1)
    listed = valid & ~chosen.mask
    assert torch.equal(rebuilt.gather(1, kept.restore), torch.where(listed, rows, -1.0))


def test_complement_of_rows_that_keep_less_than_all_positions() -> None:
    """As wide as the rows: one mask token is behind them, and no kept row stands in for it."""
    scores = adversarial(9, 20)
    chosen = smk.topk_mask(scores, k=torch.arange(9))
    kept = smk.complement(chosen, width=20)
    rows = torch.arange(20.0).expand(9, 20)
    rebuilt = torch.cat([rows.gather(1, kept.ids.clamp(min=0)), torch.full((9, 1), -1.0)], dim=1)
    assert torch.equal(rebuilt.gather(1, kept.restore), torch.where(chosen.mask, -1.0, rows))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"topk": torch.ones(2, 3, dtype=torch.bool)},
            TypeError,
            "topk must be a TopK, got Tensor",
        ),
        ({"width": -1}, ValueError, "width must be at least 0, got -1"),
        ({"valid": torch.ones(2, 3)}, TypeError, "valid must be of type bool, got float32"),
        ({"valid": torch.ones(3, dtype=torch.bool)}, ValueError, "valid must be the shape of"),
        (
            {"valid": torch.ones(2, 3, dtype=torch.bool, device="meta")},
            ValueError,
            "valid must be on the device of topk.mask",
        ),
    ],
)
def test_complement_bad_input(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"topk": smk.topk_mask(torch.randn(2, 3), k=1), **change}
    with pytest.raises(error, match=message):
        smk.complement(**arguments)


def test_negated_views_are_chosen_from(backend: str) -> None:
    scores = adversarial(5, 20)
    negated = torch.complex(torch.zeros_like(scores), -scores).conj().imag
    assert negated.is_neg()
    assert torch.equal(smk.topk_mask(negated, k=7).mask, smk.topk_mask(scores, k=7).mask)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"scores": [1.0]}, TypeError, "scores must be a torch.Tensor, got list"),
        ({"scores": torch.tensor(1.0)}, ValueError, r"scores must be \[..., N\], got shape \(\)"),
        ({"scores": torch.ones(2, 3, dtype=torch.int64)}, TypeError, "scores must be of type"),
        (
            {"ratio": 0.5},
            ValueError,
            "exactly one of k and ratio must be given, got k=1, ratio=0.5",
        ),
        ({"k": None}, ValueError, "exactly one of k and ratio"),
        ({"k": -1}, ValueError, "k must be at least 0, got -1"),
        ({"k": 2**63}, ValueError, "k must fit into 64 bits, got 9223372036854775808"),
        ({"largest": "yes"}, TypeError, "largest must be a bool, got str"),
        ({"k": None, "ratio": True}, TypeError, "ratio must be a number, got bool"),
        ({"k": 1.5}, TypeError, "k must be an int or an int64 tensor, got float"),
        (
            {"k": torch.ones(3, dtype=torch.int64)},
            ValueError,
            r"k must be .* \(2,\), got shape \(3,\)",
        ),
        ({"k": torch.ones(2)}, TypeError, "k must be of type int64, got float32"),
        ({"k": None, "ratio": 1.5}, ValueError, r"ratio must be in \[0, 1\], got 1.5"),
        ({"k": None, "ratio": NAN}, ValueError, r"ratio must be in \[0, 1\], got nan"),
        ({"k": None, "ratio": "half"}, TypeError, "ratio must be a number, got str"),
        ({"width": -1}, ValueError, "width must be at least 0, got -1"),
        ({"width": 1.5}, TypeError, "width must be an int, got float"),
        ({"valid": torch.ones(2, 3)}, TypeError, "valid must be of type bool, got float32"),
        (
            {"valid": torch.ones(3, dtype=torch.bool)},
            ValueError,
            "valid must be the shape of scores",
        ),
        (
            {"valid": torch.ones(2, 3, dtype=torch.bool, device="meta")},
            ValueError,
            "device of scores",
        ),
    ],
)
def test_bad_input(change: dict[str, object], error: type[Exception], message: str) -> None:
    arguments: dict[str, object] = {"scores": torch.randn(2, 3), "k": 1, **change}
    with pytest.raises(error, match=message):
        smk.topk_mask(arguments.pop("scores"), **arguments)  # type: ignore[arg-type]
