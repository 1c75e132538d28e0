"""The random numbers of sample_negatives: what is drawn, and how often."""

from __future__ import annotations

import ctypes
import math
import subprocess

import native
import pytest
import torch

import syncmask_kernels as smk
from reference.ops import negatives as oracle
from syncmask_kernels.backends.eager import philox
from tests.accuracy import chi_square_p

SEED = torch.tensor([2024, 7])
DRAWS = 2**20


def draws(sim, rows, **options):
    """How often each column of sim [1, N] is drawn in a batch of `rows` copies."""
    ids, found = smk.sample_negatives(sim.expand(rows, -1), **options)
    assert found.all()
    return ids.bincount(minlength=sim.shape[1])


def assert_follows_softmax(logits, rows=2**17):
    """Chi-square over 2^20 draws, the first column excluded as the positive."""
    sim, own = torch.tensor([logits]), torch.zeros(rows, dtype=torch.int64)
    counts = sum(draws(sim, rows, positive=own, seed=SEED + t) for t in range(DRAWS // rows))
    (expected,) = oracle.probabilities(sim, [list(range(1, len(logits)))])
    assert chi_square_p(counts, expected * DRAWS) > 1e-3


@pytest.mark.parametrize(
    "logits",
    [
        [0.0, 0.0, 0.0, 0.0, 0.0, 0.0],
        [0.0, -1.0, 2.0, 0.5, -3.0, 1.0],
        [-200.0, -201.0, -199.0, -202.5],
    ],
)
def test_draws_follow_the_softmax(backend, logits):
    assert_follows_softmax(logits)


@pytest.mark.parametrize("temperature", [1e-2, 1e-4])
def test_draws_follow_the_softmax_at_low_temperatures(backend, temperature):
    """The positive and two more at a similarity of 1, one just below, one at -1.

    The softmax that public code takes over the positive too is 0 in float32 for the last.
    """
    near = 1 - temperature
    assert_follows_softmax([s / temperature for s in (1.0, 1.0, -1.0, near, 1.0)])


def test_underflow_of_all_negatives_but_one(backend):
    """In the limit the most similar negative alone, or those that are equally similar."""
    cosines = torch.tensor([[1.0, -1.0, -0.9, -0.9, -0.95]])
    counts = draws(cosines / 1e-4, 2**16, positive=torch.zeros(2**16).long(), seed=SEED)
    assert counts[[0, 1, 4]].tolist() == [0, 0, 0]
    assert chi_square_p(counts[2:4], torch.full((2,), 2.0**15)) > 1e-3


def test_draws_of_many_small_batches_follow_the_softmax(backend):
    """The same, over seeds as the generator draws them, of one small batch each."""
    generator = torch.Generator().manual_seed(0)
    sim = torch.tensor([[0.0, 1.0, 2.0, 0.5, -1.0]])
    counts, own = torch.zeros(5, dtype=torch.int64), torch.zeros(64, dtype=torch.int64)
    for _ in range(500):
        counts += draws(sim, 64, positive=own, generator=generator)
    (expected,) = oracle.probabilities(sim, [[1, 2, 3, 4]])
    assert chi_square_p(counts, expected * counts.sum()) > 1e-3


def test_rows_and_columns_draw_independently(backend):
    """Pairs of neighbouring rows hit each pair of columns as often as any other."""
    ids, _ = smk.sample_negatives(torch.zeros(2**17, 6), seed=SEED)
    pairs = (ids[0::2] * 6 + ids[1::2]).bincount(minlength=36)
    assert chi_square_p(pairs, torch.full((36,), 2**16 / 36)) > 1e-3


def test_seeded_draws_equal_oracle_noise(backend):
    sim = torch.randn(64, 64, generator=torch.Generator().manual_seed(1))
    noise = oracle.gumbel_noise(SEED.tolist(), 64, 64).float()
    ids, _ = smk.sample_negatives(sim, seed=SEED)
    assert torch.equal(ids, oracle.sample_negatives(sim, noise=noise)[0])


@pytest.mark.parametrize("columns", [1, 2, 5, 7, 63, 64, 65, 200, 2050])
def test_every_word_is_that_of_eager(backend, columns):
    """The noise alone decides; keys have more than 32 bits, and a sign."""
    for seed in (SEED, torch.tensor([-3, 2**40 + 5])):
        ids, _ = smk.sample_negatives(torch.zeros(300, columns), seed=seed)
        with smk.use_backend("eager"):
            assert torch.equal(ids, smk.sample_negatives(torch.zeros(300, columns), seed=seed).ids)


def test_generator_and_seed(backend):
    sim = torch.randn(64, 64)

    def draw(seed):
        return smk.sample_negatives(sim, generator=torch.Generator().manual_seed(seed)).ids

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    drawn = smk.sample_negatives(sim, seed=SEED).ids
    assert torch.equal(smk.sample_negatives(sim, seed=SEED).ids, drawn)
    assert not torch.equal(smk.sample_negatives(sim, seed=SEED + 1).ids, drawn)
    assert not torch.equal(smk.sample_negatives(sim).ids, smk.sample_negatives(sim).ids)
    # A row draws the same whatever stands below it.
    top = smk.sample_negatives(sim[:9], positive=torch.arange(9), seed=SEED).ids
    assert torch.equal(top, drawn[:9])


def test_a_seed_is_for_draws_alone(backend):
    sim = torch.randn(64, 64)
    hardest = smk.sample_negatives(sim, mode="hardest", seed=SEED)
    assert all(map(torch.equal, hardest, smk.sample_negatives(sim, mode="hardest")))


# Gumbel noise


def assert_within_two_units(noise, truth):
    unit = torch.nextafter(noise.abs(), torch.tensor(math.inf)) - noise.abs()
    # -log(u) near 1 cancels in the outer logarithm: there a unit of -log(u) counts.
    unit = unit.clamp(min=2.0**-24)
    assert ((noise.double() - truth).abs() <= 2 * unit).all()


def true_gumbel(words):
    return -((((words >> 9).double() + 0.5) * 2.0**-23).log().neg().log())


EVERY_WORD = torch.arange(0, 2**32, 2**9)  # the lower bits do not count


def test_gumbel_noise_is_within_two_units_of_the_last_place():
    noise = philox.gumbel(EVERY_WORD)
    assert torch.isfinite(noise).all()
    assert_within_two_units(noise, true_gumbel(EVERY_WORD))


def test_gumbel_noise_of_oracle():
    noise = philox.gumbel(philox.philox_cells(SEED, 40, 33))
    assert_within_two_units(noise, oracle.gumbel_noise(SEED.tolist(), 40, 33))


CPP = """
#include "syncmask/philox.h"
extern "C" SYNCMASK_CLONES void gumbel_of(const uint32_t* words, float* noise, int64_t n) {
  syncmask::Floats value;
  for (int64_t i = 0; i < n; i += syncmask::kLanes) {
    syncmask::gumbel(words + i, value);
    syncmask::store(value, noise + i);
  }
}
"""


def test_gumbel_noise_of_cpp(tmp_path, pytestconfig):
    """On every word, with the flags that ship."""
    try:
        compiler = native.find_compiler()
    except native.Unbuildable as error:
        pytest.skip(str(error))
    source, library = tmp_path / "gumbel.cpp", tmp_path / "gumbel.so"
    source.write_text(CPP)
    include = f"-I{pytestconfig.rootpath / 'csrc' / 'include'}"
    command = [*compiler, *native.CXX_FLAGS, include, "-shared", str(source), "-o", str(library)]
    subprocess.run(command, check=True)
    words, noise = EVERY_WORD.to(torch.int32), torch.full((len(EVERY_WORD),), math.nan)
    pointers = (ctypes.c_void_p(x.data_ptr()) for x in (words, noise))
    ctypes.CDLL(str(library)).gumbel_of(*pointers, ctypes.c_int64(len(EVERY_WORD)))
    assert_within_two_units(noise, true_gumbel(EVERY_WORD))
