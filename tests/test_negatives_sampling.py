"""sample_negatives in all modes."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import syncmask_kernels as smk
from reference.ops import negatives as oracle
from syncmask_kernels import backends
from tests.compiling import assert_compiles_once

OP = "sample_negatives"
NAN, INF = math.nan, math.inf
BACKENDS = [name for name in ("eager", "cpu") if backends.refusal(name, OP, "cpu") is None]
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


@settings(max_examples=250, deadline=None)
@given(data=st.data(), rows=st.integers(0, 5), columns=st.integers(1, 19), options=MODE)
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
    wanted = oracle.sample_negatives(sim, **options)
    for name in BACKENDS:
        with smk.use_backend(name):
            assert all(map(torch.equal, choose(sim, **options), wanted)), name


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
def test_inputs_that_break_public_code(backend, rule, mode):
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


def test_underflow_between_negatives_keeps_the_order(backend):
    sim = torch.tensor([[0.0, -5000.0, -4000.0, -6000.0]])
    ids, _ = choose(sim, positive=torch.tensor([0]), seed=SEED)
    assert ids.tolist() == [2]


@pytest.mark.parametrize("mode", ["multinomial", "hardest", "semi_hard"])
def test_all_views_of_one_item_have_no_negative(backend, mode):
    items = torch.zeros(4, dtype=torch.int64)
    ids, found = choose(torch.randn(4, 4), mode=mode, row_ids=items, col_ids=items)
    assert ids.tolist() == [0] * 4
    assert not found.any()


@pytest.mark.parametrize("mode", ["multinomial", "hardest", "semi_hard"])
def test_views_of_one_item_are_no_negatives(backend, mode):
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
def test_columns_that_the_caller_marked(backend, mode, mark):
    sim = torch.zeros(3, 3).fill_diagonal_(mark)
    ids, found = choose(sim, mode=mode)
    assert found.all()
    assert (ids != torch.arange(3)).all()


@pytest.mark.parametrize("mode", ["multinomial", "hardest", "semi_hard"])
@pytest.mark.parametrize("mark", [-INF, NAN])
def test_rows_of_nothing_but_marks(backend, mode, mark):
    sim = torch.randn(3, 3)
    sim[1] = mark
    ids, found = choose(sim, mode=mode)
    assert found.tolist() == [True, False, True]
    assert ids[1] == 0


def test_a_nan_in_a_row_does_not_spread(backend):
    sim = torch.tensor([[0.0, NAN, 2.0, 1.0]])
    own = torch.tensor([0])
    assert choose(sim, positive=own, mode="hardest").ids.tolist() == [2]
    counts = torch.zeros(4)
    for trial in range(50):
        counts[smk.sample_negatives(sim, positive=own, seed=SEED + trial).ids] += 1
    assert counts[1] == counts[0] == 0
    assert counts[2] > 0
    assert counts[3] > 0


def test_hardest_ties_go_to_the_lower_index(backend):
    sim = torch.tensor([[9.0, 1.0, 1.0], [-0.0, 9.0, 0.0], [0.0, -0.0, 9.0]])
    assert choose(sim, mode="hardest").ids.tolist() == [1, 0, 0]


def test_semi_hard_stays_below_the_margin(backend):
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


def test_semi_hard_without_an_easier_candidate_takes_the_least_similar(backend):
    sim = torch.tensor([[0.0, 3.0, 1.0, 1.0]])
    assert choose(sim, positive=torch.tensor([0]), mode="semi_hard").ids.tolist() == [2]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("mode", ["multinomial", "hardest", "semi_hard"])
def test_types(backend, dtype, mode):
    sim = torch.randn(16, 16).to(dtype)
    noise = {"noise": torch.randn(16, 16)} if mode == "multinomial" else {}
    if (backend, dtype) == ("cpu", torch.float64):
        with pytest.raises(smk.BackendError, match="float64 is served by eager only"):
            choose(sim, mode=mode, **noise)
        return
    wide = sim if dtype == torch.float64 else sim.float()
    ids, _ = choose(sim, mode=mode, **noise)
    assert torch.equal(ids, oracle.sample_negatives(wide, mode=mode, **noise)[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_noise_of_another_type(backend, dtype):
    sim, noise = torch.randn(16, 16), torch.randn(16, 16).to(dtype)
    ids, _ = choose(sim, noise=noise)
    assert torch.equal(ids, oracle.sample_negatives(sim, noise=noise.float())[0])


@pytest.mark.parametrize("columns", [33, 3000])
@pytest.mark.parametrize("quantile", [0.0, 0.25, 0.9, 1.0])
def test_semi_hard_in_long_rows(backend, columns, quantile):
    """With many ties, and all kinds of candidates."""
    generator = torch.Generator().manual_seed(columns)
    sim = (8 * torch.randn(6, columns, generator=generator)).round() / 8
    sim[:, ::7], sim[:, 3::11] = -INF, NAN
    options = {
        "positive": torch.randint(columns, (6,), generator=generator),
        "exclude": torch.rand(6, columns, generator=generator) < 0.3,
        "row_ids": torch.arange(6),
        "col_ids": torch.randint(9, (columns,), generator=generator),
        "mode": "semi_hard",
        "margin": 0.125,
        "quantile": quantile,
    }
    wanted = oracle.sample_negatives(sim, **options)
    assert all(map(torch.equal, choose(sim, **options), wanted))


@pytest.mark.parametrize("shape", [(0, 0), (0, 5), (3, 0)])
@pytest.mark.parametrize("mode", ["multinomial", "hardest"])
def test_empty(backend, shape, mode):
    ids, found = choose(torch.zeros(shape), mode=mode)
    assert ids.tolist() == [0] * shape[0]
    assert found.tolist() == [False] * shape[0]


def test_views(backend):
    """Of sim (also of a part of its columns, as of the logits with a queue), exclude and ids."""
    wide = torch.randn(12, 20)
    for sim in (wide[::2, ::3].t(), wide[:, 2:9], wide[:1].expand(5, 20)):
        rows, columns = sim.shape
        options = {
            "positive": torch.arange(2 * rows)[::2] % columns,
            "exclude": (torch.rand(columns, rows) < 0.3).t(),
            "row_ids": torch.arange(3 * rows)[::3] % 5,
            "col_ids": torch.arange(2 * columns)[::2] % 5,
            "noise": torch.randn(columns, rows).t(),
        }
        assert all(
            map(torch.equal, choose(sim, **options), oracle.sample_negatives(sim, **options))
        )


def test_no_gradient(backend):
    sim = torch.randn(5, 5, requires_grad=True)
    ids, found = choose(sim)
    assert not ids.requires_grad
    assert found.all()


@pytest.mark.parametrize("mode", ["multinomial", "hardest", "semi_hard"])
def test_compile(backend, mode):
    def sample(sim, items, seed):
        drawn = {"seed": seed} if mode == "multinomial" else {}
        return smk.sample_negatives(sim, row_ids=items, col_ids=items, mode=mode, **drawn)

    calls = [(torch.randn(n, n), torch.arange(n) // 2, SEED) for n in (6, 9)]
    assert_compiles_once(sample, calls, "eager" if backend == "eager" else "aot_eager")


def test_opcheck():
    if "cpu" not in BACKENDS:
        pytest.skip("the CPU library is not built")
    sim, ids = torch.randn(3, 5), torch.arange(5)
    own, bars = ids[:3], (sim > 1, ids[:3], ids)
    operator = torch.ops.syncmask.sample_negatives.cpu
    for call in [
        (sim.t(), None, None, None, None, 0, 0.0, 1, 1, SEED, None),
        (sim.half(), own, *bars, 0, 0.0, 1, 1, None, sim),
        (sim[:0], None, None, None, None, 1, 0.0, 1, 1, None, None),
        (sim, own, *bars, 2, 0.5, 1, 3, None, None),
    ]:
        torch.library.opcheck(operator, call)


def test_a_wrong_positive_stops_compiled_code():
    """Which no check on the host sees."""
    if "cpu" not in BACKENDS:
        pytest.skip("the CPU library is not built")
    for own in (-1, 4):
        call = (torch.zeros(1, 4), torch.tensor([own]), None, None, None, 2, 0.0, 1, 1, None, None)
        with pytest.raises(RuntimeError, match="positive must be in"):
            torch.ops.syncmask.sample_negatives.cpu(*call)


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
        ({"mode": "semi_hard", "margin": "a"}, TypeError, "margin must be a number, got str"),
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
        ({"mode": "hardest", "seed": SEED[:1]}, ValueError, "seed must be two values"),
        (
            {"mode": "hardest", "generator": torch.Generator(), "seed": SEED},
            ValueError,
            "at most one of seed and generator",
        ),
    ],
)
def test_bad_input(options, error, text):
    with pytest.raises(error, match=text):
        smk.sample_negatives(**{"sim": SIM, **options})
