"""sample_negatives in all modes."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import syncmask_kernels as smk
from reference.ops import negatives as oracle
from syncmask_kernels.backends.eager import philox
from tests.accuracy import chi_square_p
from tests.compiling import assert_compiles_once

NAN, INF = math.nan, math.inf
SEED = torch.tensor([2024, 7])


def choose(*args, **options):
    negatives = smk.sample_negatives(*args, **options)
    assert negatives.ids.dtype == torch.int64
    assert negatives.found.dtype == torch.bool
    return negatives


# Few values, so that ties, NaN and infinities are common.
LOGIT = st.sampled_from([-2.0, -1.0, -0.0, 0.0, 0.5, 1.0, 3.0, NAN, INF, -INF])
MODE = st.one_of(
    st.just({"mode": "hardest"}),
    st.just({"mode": "multinomial"}),
    st.builds(
        lambda margin, quantile: {"mode": "semi_hard", "margin": margin, "quantile": quantile},
        st.sampled_from([0.0, 0.5, 1.0, -1.0]),
        st.sampled_from([None, 0.0, 0.07, 0.25, 1 / 3, 0.5, 0.75, 1.0]),
    ),
)


@settings(max_examples=400, deadline=None)
@given(data=st.data(), rows=st.integers(0, 5), columns=st.integers(1, 7), options=MODE)
def test_every_mode_equals_oracle(data, rows, columns, options):
    def draw(values, size):
        return data.draw(st.lists(values, min_size=size, max_size=size))

    sim = torch.tensor(draw(LOGIT, rows * columns)).reshape(rows, columns)
    options = dict(options)
    if options["mode"] == "multinomial":
        noise = torch.tensor(draw(st.sampled_from([0.0, 0.25, -1.0, 2.0]), rows * columns))
        options["noise"] = noise.reshape(rows, columns)
    if options["mode"] == "semi_hard" or data.draw(st.booleans()):
        options["positive"] = torch.tensor(draw(st.integers(0, columns - 1), rows)).long()
    if data.draw(st.booleans()):
        options["exclude"] = (
            torch.tensor(draw(st.booleans(), rows * columns)).bool().reshape(rows, columns)
        )
    if data.draw(st.booleans()):
        options["row_ids"] = torch.tensor(draw(st.integers(0, 3), rows)).long()
        options["col_ids"] = torch.tensor(draw(st.integers(0, 3), columns))
    ids, found = choose(sim, **options)
    want_ids, want_found = oracle.sample_negatives(sim, **options)
    assert torch.equal(found, want_found)
    assert torch.equal(ids, want_ids)


# How public code keeps a row's positive from being drawn, and what becomes of it where the softmax
# of every negative underflows beside the positive, and in a batch of one.


def zeroed(weights):
    return weights.masked_fill(torch.eye(len(weights), dtype=torch.bool), 0)


def filled(sim, value):
    return sim.masked_fill(torch.eye(len(sim), dtype=torch.bool), value).softmax(dim=1)


PUBLIC_RULES = {
    "zero after softmax (ALBEF)": (lambda sim: zeroed(sim.softmax(dim=1)), "error", "error"),
    "constant inside softmax (ALBEF retrieval)": (
        lambda sim: zeroed((sim + 1e-4).softmax(dim=1)),
        "error",
        "error",
    ),
    "constant outside softmax (BLIP)": (
        lambda sim: zeroed(sim.softmax(dim=1) + 1e-4),
        "right",
        "error",
    ),
    "zero where ids are equal (BLIP retrieval)": (
        lambda sim: (
            sim.softmax(dim=1) * (torch.arange(len(sim))[:, None] != torch.arange(len(sim)))
        ),
        "error",
        "error",
    ),
    "-inf before softmax (LAVIS)": (lambda sim: filled(sim, -INF), "right", "error"),
    "-10000 before softmax (BLIP-2)": (lambda sim: filled(sim, -10000.0), "right", "itself"),
    "top-1 after zero (GRIT-VLP)": (
        lambda sim: zeroed(sim.softmax(dim=1)),
        "arbitrary",
        "arbitrary",
    ),
}


def outcome(rule, weights):
    try:
        top = "top-1" in rule
        ids = (weights.topk(1) if top else (None, torch.multinomial(weights, 1)))[1].squeeze(1)
    except RuntimeError:
        return "error"
    if (weights.gather(1, ids.unsqueeze(1)) == 0).any():
        return "arbitrary"
    return "itself" if (ids == torch.arange(len(ids))).any() else "right"


@pytest.mark.parametrize("mode", ["multinomial", "hardest", "semi_hard"])
@pytest.mark.parametrize("rule", PUBLIC_RULES)
def test_inputs_that_break_public_code(rule, mode):
    weights, with_underflow, in_a_batch_of_one = PUBLIC_RULES[rule]
    underflow, one = torch.eye(4) * 1000, torch.tensor([[3.0]])
    assert outcome(rule, weights(underflow)) == with_underflow
    assert outcome(rule, weights(one)) == in_a_batch_of_one
    ids, found = choose(underflow, mode=mode, row_ids=torch.arange(4), col_ids=torch.arange(4))
    assert found.all()
    assert (ids != torch.arange(4)).all()
    ids, found = choose(one, mode=mode)
    assert ids.tolist() == [0]
    assert found.tolist() == [False]


def test_underflow_between_negatives_keeps_the_order():
    sim = torch.tensor([[0.0, -5000.0, -4000.0, -6000.0]])
    ids, _ = choose(sim, positive=torch.tensor([0]), seed=SEED)
    assert ids.tolist() == [2]


@pytest.mark.parametrize("mode", ["multinomial", "hardest", "semi_hard"])
def test_all_views_of_one_item_have_no_negative(mode):
    items = torch.zeros(4, dtype=torch.int64)
    ids, found = choose(torch.randn(4, 4), mode=mode, row_ids=items, col_ids=items)
    assert ids.tolist() == [0] * 4
    assert not found.any()


@pytest.mark.parametrize("mode", ["multinomial", "hardest", "semi_hard"])
def test_views_of_one_item_are_no_negatives(mode):
    """The negatives of all ranks, rectangular, with two views of each item."""
    rows, ranks = torch.tensor([5, 6]), torch.tensor([5, 6, 5, 7, 6])
    sim = torch.zeros(2, 5)
    sim[0, 2] = sim[1, 4] = 9.0  # the other view is by far the most similar
    for trial in range(20):
        ids, found = choose(
            sim,
            positive=torch.tensor([0, 1]),
            row_ids=rows,
            col_ids=ranks,
            mode=mode,
            **({"seed": SEED + trial} if mode == "multinomial" else {}),
        )
        assert found.all()
        assert (rows != ranks[ids]).all()


@pytest.mark.parametrize("mode", ["multinomial", "hardest", "semi_hard"])
@pytest.mark.parametrize("mark", [-INF, -10000.0, NAN])
def test_columns_that_the_caller_marked(mode, mark):
    sim = torch.zeros(3, 3).fill_diagonal_(mark)
    ids, found = choose(sim, mode=mode)
    assert found.all()
    assert (ids != torch.arange(3)).all()


@pytest.mark.parametrize("mode", ["multinomial", "hardest", "semi_hard"])
@pytest.mark.parametrize("mark", [-INF, NAN])
def test_rows_of_nothing_but_marks(mode, mark):
    sim = torch.randn(3, 3)
    sim[1] = mark
    ids, found = choose(sim, mode=mode)
    assert found.tolist() == [True, False, True]
    assert ids[1] == 0


def test_a_nan_in_a_row_does_not_spread():
    sim = torch.tensor([[0.0, NAN, 2.0, 1.0]])
    own = torch.tensor([0])
    assert choose(sim, positive=own, mode="hardest").ids.tolist() == [2]
    counts = torch.zeros(4)
    for trial in range(50):
        counts[smk.sample_negatives(sim, positive=own, seed=SEED + trial).ids] += 1
    assert counts[1] == counts[0] == 0
    assert counts[2] > 0
    assert counts[3] > 0


def test_hardest_ties_go_to_the_lower_index():
    sim = torch.tensor([[9.0, 1.0, 1.0], [-0.0, 9.0, 0.0], [0.0, -0.0, 9.0]])
    assert choose(sim, mode="hardest").ids.tolist() == [1, 0, 0]


def test_semi_hard_stays_below_the_margin():
    sim = torch.tensor([[5.0, 7.0, 4.9, 4.0, 1.0]])
    own = torch.tensor([0])

    def pick(**options):
        return choose(sim, positive=own, mode="semi_hard", **options)[0].item()

    assert pick() == 2
    assert pick(margin=0.5) == 3
    assert pick(margin=1.0) == 4  # strictly below
    assert pick(margin=9.0) == 4  # none qualifies: the least similar
    assert pick(margin=-3.0) == 1
    assert [pick(quantile=q) for q in (0.0, 0.33, 0.34, 0.66, 0.67, 1.0)] == [4, 4, 3, 3, 2, 2]


def test_semi_hard_without_an_easier_candidate_takes_the_least_similar():
    sim = torch.tensor([[0.0, 3.0, 1.0, 1.0]])
    assert choose(sim, positive=torch.tensor([0]), mode="semi_hard").ids.tolist() == [2]


# The distribution


def draws(sim, rows, **options):
    many = sim.expand(rows, -1)
    ids, found = choose(many, **options)
    assert found.all()
    return ids.bincount(minlength=sim.shape[1])


@pytest.mark.parametrize(
    "logits",
    [
        [0.0, 0.0, 0.0, 0.0, 0.0, 0.0],
        [0.0, -1.0, 2.0, 0.5, -3.0, 1.0],
        [0.0, 7.0, 0.0, 5.0, -1.0],
        [-200.0, -201.0, -199.0, -202.5],
    ],
)
def test_draws_follow_the_softmax(logits):
    """Chi-square over 2^20 draws, one column excluded as the positive."""
    sim, rows = torch.tensor([logits]), 2**16
    positive = torch.zeros(rows, dtype=torch.int64)
    counts = sum(draws(sim, rows, positive=positive, seed=SEED + trial) for trial in range(16))
    (expected,) = oracle.probabilities(sim, [list(range(1, len(logits)))])
    assert chi_square_p(counts, expected * 2**20) > 1e-3


def test_draws_of_many_small_batches_follow_the_softmax():
    """The same, over seeds as the generator draws them, of one small batch each."""
    generator = torch.Generator().manual_seed(0)
    sim = torch.tensor([[0.0, 1.0, 2.0, 0.5, -1.0]])
    counts, own = torch.zeros(5, dtype=torch.int64), torch.zeros(64, dtype=torch.int64)
    for _ in range(500):
        counts += draws(sim, 64, positive=own, generator=generator)
    (expected,) = oracle.probabilities(sim, [[1, 2, 3, 4]])
    assert chi_square_p(counts, expected * counts.sum()) > 1e-3


def test_rows_and_columns_draw_independently():
    """Pairs of neighbouring rows hit each pair of columns as often as any other."""
    ids, _ = choose(torch.zeros(2**17, 6), seed=SEED)
    pairs = (ids[0::2] * 6 + ids[1::2]).bincount(minlength=36)
    assert chi_square_p(pairs, torch.full((36,), 2**16 / 36)) > 1e-3


def test_gumbel_noise_is_within_two_units_of_the_last_place():
    noise = philox.gumbel(philox.philox_cells(SEED, 40, 33))
    truth = oracle.gumbel_noise(SEED.tolist(), 40, 33)
    unit = torch.nextafter(noise.abs(), torch.tensor(INF)) - noise.abs()
    # -log(u) near 1 cancels in the outer logarithm: there a unit of -log(u) counts.
    unit = torch.maximum(unit, torch.full_like(unit, 2.0**-24))
    assert ((noise.double() - truth).abs() <= 2 * unit).all()


def test_gumbel_noise_is_finite_at_both_ends():
    ends = philox.gumbel(torch.tensor([0, 2**32 - 1]))
    assert torch.isfinite(ends).all()


def test_seeded_draws_equal_oracle_noise():
    sim = torch.randn(64, 64, generator=torch.Generator().manual_seed(1))
    noise = oracle.gumbel_noise(SEED.tolist(), 64, 64).float()
    ids, _ = choose(sim, seed=SEED)
    assert torch.equal(ids, oracle.sample_negatives(sim, noise=noise)[0])


def test_generator_and_seed():
    sim = torch.randn(64, 64)

    def draw(seed):
        return choose(sim, generator=torch.Generator().manual_seed(seed)).ids

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    assert torch.equal(choose(sim, seed=SEED).ids, choose(sim, seed=SEED).ids)
    assert not torch.equal(choose(sim, seed=SEED).ids, choose(sim, seed=SEED + 1).ids)
    assert not torch.equal(choose(sim).ids, choose(sim).ids)
    # A row draws the same whatever stands below it.
    assert torch.equal(
        choose(sim[:9], positive=torch.arange(9), seed=SEED).ids, choose(sim, seed=SEED).ids[:9]
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("mode", ["multinomial", "hardest", "semi_hard"])
def test_types(dtype, mode):
    sim = torch.randn(16, 16).to(dtype)
    noise = {"noise": torch.randn(16, 16)} if mode == "multinomial" else {}
    wide = sim if dtype == torch.float64 else sim.float()
    ids, _ = choose(sim, mode=mode, **noise)
    assert torch.equal(ids, oracle.sample_negatives(wide, mode=mode, **noise)[0])


@pytest.mark.parametrize("shape", [(0, 0), (0, 5), (3, 0)])
@pytest.mark.parametrize("mode", ["multinomial", "hardest"])
def test_empty(shape, mode):
    ids, found = choose(torch.zeros(shape), mode=mode)
    assert ids.tolist() == [0] * shape[0]
    assert found.tolist() == [False] * shape[0]


def test_views_and_gradients():
    wide = torch.randn(12, 20, requires_grad=True)
    sim = wide[::2, ::3].t()
    ids, found = choose(sim, mode="hardest", positive=torch.zeros(7, dtype=torch.int64))
    assert torch.equal(
        ids,
        choose(
            sim.detach().clone(), mode="hardest", positive=torch.zeros(7, dtype=torch.int64)
        ).ids,
    )
    assert not ids.requires_grad
    assert found.all()


@pytest.mark.parametrize("mode", ["multinomial", "hardest", "semi_hard"])
def test_compile(mode):
    def sample(sim, items, seed):
        drawn = {"seed": seed} if mode == "multinomial" else {}
        return smk.sample_negatives(sim, row_ids=items, col_ids=items, mode=mode, **drawn)

    calls = [(torch.randn(n, n), torch.arange(n) // 2, SEED) for n in (6, 9)]
    assert_compiles_once(sample, calls)


@pytest.mark.parametrize("mode", ["multinomial", "hardest", "semi_hard"])
def test_never_asks_the_host(mode):
    sim = torch.zeros(4, 4, device="meta")
    items = torch.zeros(4, dtype=torch.int64, device="meta")
    ids, found = choose(
        sim, positive=items, exclude=sim > 0, row_ids=items, col_ids=items, mode=mode
    )
    assert ids.shape == found.shape == (4,)


SIM, ROWS = torch.zeros(3, 4), torch.zeros(3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"sim": SIM[0]}, ValueError, r"sim must be \[B, N\], got shape \(4,\)"),
        ({"sim": SIM.long()}, TypeError, "sim must be of type .* got int64"),
        ({"mode": "easy"}, ValueError, "mode must be one of .* got 'easy'"),
        ({"mode": "semi_hard"}, ValueError, "positive must be given"),
        ({"mode": "hardest", "margin": 0.1}, ValueError, "margin and quantile are for"),
        ({"quantile": 0.5}, ValueError, "margin and quantile are for"),
        ({"mode": "hardest", "noise": SIM}, ValueError, "noise is for mode 'multinomial'"),
        (
            {"mode": "semi_hard", "positive": ROWS, "quantile": 1.5},
            ValueError,
            r"quantile must be in \[0, 1\], got 1.5",
        ),
        ({"positive": ROWS + 4}, ValueError, r"positive must be in \[0, N\) = \[0, 4\), got 4"),
        ({"positive": ROWS - 1}, ValueError, "positive .* got -1"),
        ({"positive": ROWS[:2]}, ValueError, r"positive must be \[B\] = \(3,\)"),
        ({"positive": ROWS.float()}, TypeError, "positive .* int64, got float32"),
        ({"row_ids": ROWS}, ValueError, "row_ids and col_ids must be given together"),
        ({"row_ids": ROWS, "col_ids": ROWS}, ValueError, r"col_ids must be \[N\] = \(4,\)"),
        ({"exclude": SIM}, TypeError, "exclude .* bool, got float32"),
        ({"exclude": SIM[:2] > 0}, ValueError, "exclude must be the shape of sim"),
        ({"exclude": (SIM > 0).to("meta")}, ValueError, "exclude .* device of sim"),
        ({"noise": SIM[:2]}, ValueError, "noise must be the shape of sim"),
        ({"noise": SIM.long()}, TypeError, "noise must be of type"),
        ({"noise": SIM, "seed": SEED}, ValueError, "at most one of generator, seed and noise"),
        ({"generator": torch.Generator(), "seed": SEED}, ValueError, "at most one of seed and"),
        ({"seed": SEED[:1]}, ValueError, "seed must be two values"),
    ],
)
def test_bad_input(options, error, text):
    with pytest.raises(error, match=text):
        smk.sample_negatives(**{"sim": SIM, **options})
