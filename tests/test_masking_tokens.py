"""token_valid and mask_tokens, and the random integers beneath them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import syncmask_kernels as smk
from reference.ops import masking as oracle
from reference.ops import philox as oracle_philox
from syncmask_kernels.backends.eager import philox
from tests.accuracy import chi_square_p
from tests.compiling import assert_compiles_once

# Random123, tests/kat_vectors, philox4x32 with 10 rounds: counter, key, words.
KNOWN_ANSWERS = [
    (
        (0, 0, 0, 0),
        (0, 0),
        (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
    ),
    (
        (0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF),
        (0xFFFFFFFF, 0xFFFFFFFF),
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
WORD = st.integers(0, 2**32 - 1)


def eager_philox(key, counter):
    even, odd = philox.philox(
        torch.tensor(key), torch.tensor(counter[0::2]), torch.tensor(counter[1::2])
    )
    return int(even[0]), int(odd[0]), int(even[1]), int(odd[1])


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_philox_known_answers(counter, key, words):
    assert oracle_philox.philox(key, counter) == words
    assert eager_philox(key, counter) == words


@settings(max_examples=200, deadline=None)
@given(key=st.tuples(WORD, WORD), counter=st.tuples(WORD, WORD, WORD, WORD))
def test_philox_equals_python_integers(key, counter):
    assert eager_philox(key, counter) == oracle_philox.philox(key, counter)


def test_philox_key_is_the_low_words_of_the_seed():
    low = philox.philox_cells(torch.tensor([5, 2**32 - 3]), 2, 5)
    high = philox.philox_cells(torch.tensor([5 + 2**40, -3]), 2, 5)
    assert torch.equal(low, high)


def test_philox_cells():
    grid = philox.philox_cells(torch.tensor([3, 4]), 3, 6)
    for row in range(3):
        for column in range(6):
            words = oracle_philox.philox((3, 4), (column // 4, row, 0, 0))
            assert grid[row, column] == words[column % 4]


def ids_and_mask(batch=4, tokens=9, vocabulary=50, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(vocabulary, (batch, tokens), generator=generator)
    return ids, torch.rand(batch, tokens, generator=generator) < 0.5


@pytest.mark.parametrize("special", [(), (0,), (7, 0, 1, 2, 49, 48), tuple(range(50))])
def test_token_valid_equals_oracle(special):
    ids, _ = ids_and_mask()
    valid = smk.token_valid(ids, special)
    assert valid.dtype == torch.bool
    assert torch.equal(valid, oracle.token_valid(ids, special))


@settings(max_examples=40, deadline=None)
@given(
    shape=st.tuples(st.integers(0, 5), st.integers(0, 12)),
    seed=st.tuples(WORD, WORD),
    special=st.sets(st.integers(-2, 22), max_size=12),
    shares=st.tuples(st.integers(0, 10), st.integers(0, 10), st.integers(1, 10)),
    mask_id=st.integers(0, 19),
)
def test_mask_tokens_equals_oracle(shape, seed, special, shares, mask_id):
    ids, mask = ids_and_mask(*shape, vocabulary=20)
    options = {
        "mask_id": mask_id,
        "vocab_size": 20,
        "special_ids": special,
        "probs": tuple(share / sum(shares) for share in shares),
        "ignore_index": -7,
    }
    masked, labels = smk.mask_tokens(ids, mask, seed=torch.tensor(seed), **options)
    want_masked, want_labels = oracle.mask_tokens(ids, mask, seed=seed, **options)
    assert torch.equal(masked, want_masked)
    assert torch.equal(labels, want_labels)


def test_mask_tokens_shares_and_words():
    """80/10/10, and every ordinary word is as likely as any other (chi-square, 10^6 tokens)."""
    ids = torch.full((1000, 1000), 11)
    everywhere = torch.ones_like(ids, dtype=torch.bool)
    special = (0, 1, 2, 17, 30)
    masked, labels = smk.mask_tokens(
        ids, everywhere, mask_id=3, vocab_size=31, special_ids=special, seed=torch.tensor([1, 2])
    )
    assert torch.equal(labels, ids)
    counts = masked.flatten().bincount(minlength=31)
    expected = torch.full((31,), 1e5 / 25, dtype=torch.float64)
    expected[[*special, 3]] = 0
    expected[3] = 8e5
    expected[11] += 1e5
    assert chi_square_p(counts, expected) > 1e-3


@pytest.mark.parametrize(
    ("probs", "check"),
    [
        ((1, 0, 0), lambda ids, masked: (masked == 3).all()),
        ((0, 1, 0), lambda ids, masked: ((masked != 3) & (masked != ids)).float().mean() > 0.9),
        ((0, 0, 1), lambda ids, masked: torch.equal(ids, masked)),
    ],
)
def test_mask_tokens_pure_probs(probs, check):
    ids = torch.randint(4, 1000, (64, 64))
    mask = torch.ones_like(ids, dtype=torch.bool)
    masked, _ = smk.mask_tokens(ids, mask, mask_id=3, vocab_size=1000, probs=probs)
    assert check(ids, masked)


def test_mask_tokens_leaves_the_rest_alone():
    ids, mask = ids_and_mask(32, 32)
    masked, labels = smk.mask_tokens(ids, mask, mask_id=3, vocab_size=50)
    assert torch.equal(masked[~mask], ids[~mask])
    assert (labels[~mask] == -100).all()
    assert torch.equal(labels[mask], ids[mask])


def test_mask_tokens_generator():
    ids, mask = ids_and_mask(32, 32)

    def draw(seed):
        generator = torch.Generator().manual_seed(seed)
        first = smk.mask_tokens(ids, mask, mask_id=3, vocab_size=50, generator=generator)
        second = smk.mask_tokens(ids, mask, mask_id=3, vocab_size=50, generator=generator)
        return first[0], second[0]

    once, again = draw(1), draw(1)
    assert torch.equal(once[0], again[0])
    assert torch.equal(once[1], again[1])
    assert not torch.equal(once[0], once[1])
    assert not torch.equal(once[0], draw(2)[0])
    torch.manual_seed(0)
    default = smk.mask_tokens(ids, mask, mask_id=3, vocab_size=50)[0]
    torch.manual_seed(0)
    assert torch.equal(default, smk.mask_tokens(ids, mask, mask_id=3, vocab_size=50)[0])


def test_tokens_compile():
    seed = torch.tensor([1, 2])

    def both(ids, mask, seed):
        options = {"mask_id": 3, "vocab_size": 50, "special_ids": [0, 1, 9]}
        return smk.token_valid(ids, [0, 1, 9]), *smk.mask_tokens(ids, mask, seed=seed, **options)

    assert_compiles_once(both, [(*ids_and_mask(4, 9), seed), (*ids_and_mask(6, 13), seed)])


def test_tokens_never_ask_the_host():
    ids = torch.zeros(4, 9, dtype=torch.int64, device="meta")
    smk.token_valid(ids, [0, 5])
    masked, _ = smk.mask_tokens(ids, ids == 0, mask_id=3, vocab_size=50)
    assert masked.shape == ids.shape


IDS, MASK = ids_and_mask()


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: smk.token_valid(IDS.float(), [0]), TypeError, "input_ids .* int64, got float32"),
        (lambda: smk.token_valid(IDS[0], [0]), ValueError, r"input_ids must be \[B, T\], got"),
        (lambda: smk.token_valid(IDS, [0.5]), TypeError, "special_ids must hold ints, got float"),
        (lambda: tokens(mask=MASK.long()), TypeError, "token_mask .* bool, got int64"),
        (lambda: tokens(mask=MASK[:2]), ValueError, "token_mask must be .* got shape"),
        (lambda: tokens(mask_id=50), ValueError, "mask_id .* got 50"),
        (lambda: tokens(vocab_size=0), ValueError, "vocab_size .* got 0"),
        (lambda: tokens(vocab_size=9.5), TypeError, "vocab_size must be an int, got float"),
        (lambda: tokens(probs=(0.8, 0.1)), ValueError, "probs must be three"),
        (lambda: tokens(probs=(0.8, 0.3, -0.1)), ValueError, "probs must be three"),
        (lambda: tokens(probs=(0.8, 0.1, 0.2)), ValueError, "probs must be three"),
        (lambda: tokens(special_ids=range(50)), ValueError, "special_ids must leave a word"),
        (lambda: tokens(seed=torch.tensor([1])), ValueError, r"seed must be two values = \(2,\)"),
        (lambda: tokens(seed=torch.tensor([1.0, 2.0])), TypeError, "seed .* int64, got float32"),
        (
            lambda: tokens(seed=torch.tensor([1, 2]), generator=torch.Generator()),
            ValueError,
            "at most one of seed and generator",
        ),
    ],
)
def test_tokens_bad_input(call, error, text):
    with pytest.raises(error, match=text):
        call()


def tokens(mask=MASK, **options):
    return smk.mask_tokens(IDS, mask, **{"mask_id": 3, "vocab_size": 50, **options})
