"""gather_negatives, alone and in two processes."""

from __future__ import annotations

import pytest
import torch
from torch import multiprocessing

import syncmask_kernels as smk
from tests.compiling import assert_compiles_once
from tests.negatives_rank import CHOSEN, features, fetch_of_a_rank


def test_fetches_the_rows_of_all_ranks(tmp_path):
    multiprocessing.spawn(fetch_of_a_rank, (str(tmp_path),), nprocs=2)
    of_all = torch.cat([features(0), features(1)])
    grads = torch.zeros(6)
    for rank, ids in enumerate(CHOSEN):
        grads.index_add_(0, torch.tensor(ids), torch.tensor([1.0, 2.0, 4.0]) * 10**rank)
    for rank, ids in enumerate(CHOSEN):
        answer, error = torch.load(tmp_path / f"{rank}.pt")
        assert torch.equal(answer["fetched"], of_all[ids])
        assert torch.equal(answer["mask"], (of_all % 3 == 0).transpose(1, 2)[ids])
        assert torch.equal(answer["grad"][:, 0, 0], grads.view(2, 3)[rank])
        assert torch.equal(answer["grad"], answer["grad"][:, :1, :1].expand(3, 2, 2))
        assert answer["none"].shape == (0, 2, 2)
        # Of rank 0; but if rank 1 went on, it would wait for ever.
        assert error == "ids must be in [0, ranks * B) = [0, 6), got 6"


def test_alone():
    rows, ids = torch.randn(4, 3, requires_grad=True), torch.tensor([2, 2, 0, 1, 3])
    fetched = smk.gather_negatives(rows, ids)
    assert torch.equal(fetched, rows[ids])
    (grad,) = torch.autograd.grad(fetched.sum(), rows)
    assert grad[:, 0].tolist() == [1, 1, 2, 1]
    assert smk.gather_negatives(rows > 0, ids).dtype == torch.bool
    calls = [(torch.randn(n, 3), torch.arange(n).flip(0)) for n in (4, 6)]
    assert_compiles_once(smk.gather_negatives, calls, "eager")


ROWS, IDS = torch.zeros(3, 2), torch.tensor([0, 2, 1])


@pytest.mark.parametrize(
    ("rows", "ids", "error", "text"),
    [
        ([1.0], IDS, TypeError, "rows must be a torch.Tensor, got list"),
        (torch.zeros(()), IDS, ValueError, r"rows must be \[B, ...\], got shape \(\)"),
        (ROWS, IDS.float(), TypeError, "ids must be of type int64, got float32"),
        (ROWS, IDS[None], ValueError, r"ids must be \[B\], got shape \(1, 3\)"),
        (ROWS, IDS.to("meta"), ValueError, "ids must be on the device of rows"),
        (ROWS, IDS + 1, ValueError, r"ids must be in \[0, B\) = \[0, 3\), got 3"),
        (ROWS, IDS - 1, ValueError, "ids must be in .* got -1"),
    ],
)
def test_bad_input(rows, ids, error, text):
    with pytest.raises(error, match=text):
        smk.gather_negatives(rows, ids)
