"""vote_keywords: the words that most heads look at."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import syncmask_kernels as smk
from reference.ops import selection as oracle
from tests.selection_cases import adversarial, positions


@pytest.mark.parametrize(("votes", "keep"), [(4, 5), (1, 1), (0, 3), (3, 0), (40, 40), (2, 12)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_matches_counting(backend: str, dtype: torch.dtype, votes: int, keep: int) -> None:
    if backend != "eager" and dtype == torch.float64:
        pytest.skip("float64 is served by eager")
    attn_row = adversarial(7 * 12, 30).reshape(7, 12, 30).to(dtype)
    for valid in (None, positions(7, 30, 0.4)):
        got = smk.vote_keywords(attn_row, votes=votes, keep=keep, valid=valid)
        assert torch.equal(got, oracle.vote_keywords(attn_row, votes, keep, valid))


def test_ties_go_to_the_lower_word(backend: str) -> None:
    """Head 0 votes for 0 and 1 of equal ones; 1 and 3 have two votes, 0 and 2 one."""
    heads = [[0.3, 0.3, 0.3, 0.1], [0.0, 0.5, 0.0, 0.5], [0.0, 0.0, 0.4, 0.6]]
    attn_row = torch.tensor([heads])
    assert smk.vote_keywords(attn_row, votes=2, keep=2).tolist() == [[1, 3]]
    assert smk.vote_keywords(attn_row, votes=2, keep=3).tolist() == [[0, 1, 3]]


def test_a_word_without_a_vote_is_not_kept(backend: str) -> None:
    attn_row = torch.tensor([[[0.9, 0.05, 0.05]], [[0.1, 0.1, 0.8]]])
    valid = torch.tensor([[True, True, True], [False, False, False]])
    kept = smk.vote_keywords(attn_row, votes=1, keep=2, valid=valid)
    assert kept.tolist() == [[0, -1], [-1, -1]]


@pytest.mark.parametrize("shape", [(0, 2, 3), (2, 0, 3), (2, 3, 0)])
def test_empty(backend: str, shape: tuple[int, ...]) -> None:
    kept = smk.vote_keywords(torch.ones(shape), votes=2, keep=4)
    assert kept.tolist() == [[-1] * 4] * shape[0]


def test_nothing_is_recorded(backend: str) -> None:
    attn_row = torch.rand(2, 3, 4, requires_grad=True)
    assert not smk.vote_keywords(attn_row, votes=1, keep=2).requires_grad


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"attn_row": torch.ones(2, 3)}, ValueError, r"attn_row must be \[B, H, T\], got shape"),
        ({"attn_row": torch.ones(2, 3, 4).long()}, TypeError, "attn_row must be of type float16"),
        ({"votes": -1}, ValueError, "votes must be at least 0, got -1"),
        ({"keep": -2}, ValueError, "keep must be at least 0, got -2"),
        ({"votes": 1.5}, TypeError, "votes must be an int, got float"),
        ({"keep": True}, TypeError, "keep must be an int, got bool"),
        ({"valid": torch.ones(2, 3).bool()}, ValueError, r"valid must be \[B, T\] = \(2, 4\)"),
        ({"valid": torch.ones(2, 4)}, TypeError, "valid must be of type bool, got float32"),
        ({"valid": torch.ones(2, 4, device="meta").bool()}, ValueError, "device of attn_row"),
    ],
)
def test_bad_input(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"attn_row": torch.ones(2, 3, 4), "votes": 1, "keep": 2, **change}
    with pytest.raises(error, match=message):
        smk.vote_keywords(**arguments)
