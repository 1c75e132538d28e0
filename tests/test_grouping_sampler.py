"""GroupedBatchSampler."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

import syncmask_kernels as smk
from tests.grouping_rank import clusters, sample_of_a_rank

Batches = list[list[int]]


def train(sampler: smk.GroupedBatchSampler, epochs: int, share: int = 1) -> list[Batches]:
    """The batches of epochs, whose examples are recorded: all, or one batch of `share`."""
    feat, seen = clusters(sampler.size), []
    for _ in range(epochs):
        seen.append([])
        for i, batch in enumerate(sampler):
            seen[-1].append(batch)
            if i % share == 0:
                sampler.record(torch.tensor(batch), feat[batch], feat[batch])
    return seen


def flat(batches: Batches) -> list[int]:
    return [i for batch in batches for i in batch]


def kinds(batches: Batches) -> float:
    """How many of the eight kinds a batch has, on average."""
    return sum(len({i % 8 for i in batch}) for batch in batches) / len(batches)


@pytest.mark.parametrize("share", [1, 3])
@pytest.mark.parametrize(
    ("size", "batch_size", "options"),
    [
        (64, 4, {}),
        (67, 4, {"search_space": 16}),
        (67, 4, {"search_space": 10, "queue_size": 25, "mode": "semi_hard"}),
        (30, 7, {"search_space": 5, "queue_size": 1, "item_ids": torch.arange(30) // 2}),
        (3, 8, {}),
        (1, 1, {}),
        (0, 4, {}),
    ],
)
def test_every_example_once(size: int, batch_size: int, options: Any, share: int) -> None:
    for drop_last in (False, True):
        sampler = smk.GroupedBatchSampler(size, batch_size, drop_last=drop_last, **options)
        for batches in train(sampler, 3, share):
            assert len(batches) == len(sampler)
            assert all(len(batch) == batch_size for batch in batches[: size // batch_size])
            indices = sorted(flat(batches))
            if drop_last:
                assert len(indices) == len(set(indices)) == size // batch_size * batch_size
            else:
                assert indices == [*range(size)]


def test_batches_are_of_one_kind_after_the_first_epoch() -> None:
    first, *others = train(smk.GroupedBatchSampler(128, 4), 3)
    assert kinds(first) > 2.5
    for batches in others:
        assert kinds(batches) < 1.5
    assert sorted(map(sorted, others[0])) != sorted(map(sorted, others[1]))


def test_the_search_space_bounds_what_is_found() -> None:
    shares = [
        kinds(train(smk.GroupedBatchSampler(256, 4, search_space=space, queue_size=64), 2)[1])
        for space in (4, 16, 64)
    ]
    assert shares[0] > 2.5 > shares[1] > shares[2]


def test_batches_are_cut_from_chains() -> None:
    """With one chain of all, its batches are those of grouped_order of the shuffled examples."""
    sampler = smk.GroupedBatchSampler(24, 4)
    generator = torch.Generator().manual_seed(0)
    image, text = torch.randn(2, 24, 16, generator=generator)
    sampler.record(torch.arange(24), image, text)
    batches = list(sampler)
    starts = []
    for start in range(24):
        chain = smk.grouped_order(image, text, start=start).tolist()
        cut = [chain[i : i + 4] for i in range(0, 24, 4)]
        starts += [start] * (sorted(cut) == sorted(batches))
    assert len(starts) == 1


def test_items_are_apart() -> None:
    items = torch.arange(160) % 40  # four examples of a kind
    epochs = train(smk.GroupedBatchSampler(160, 5, item_ids=items), 3)
    for batches in epochs:
        mixed = sum(len({int(items[i]) for i in batch}) < len(batch) for batch in batches)
        assert mixed <= 2  # where a chain ends nothing else may be left
    plain = train(smk.GroupedBatchSampler(160, 5), 2)[1]
    assert sum(len({int(items[i]) for i in batch}) < len(batch) for batch in plain) > 5


def test_seeds_and_epochs_shuffle() -> None:
    one, again = (train(smk.GroupedBatchSampler(64, 4, seed=3), 3) for _ in range(2))
    assert one == again
    assert one[0] != train(smk.GroupedBatchSampler(64, 4, seed=4), 1)[0]
    unrecorded = smk.GroupedBatchSampler(64, 4)
    assert flat(list(unrecorded)) != flat(list(unrecorded))


def test_examples_recorded_twice() -> None:
    sampler = smk.GroupedBatchSampler(32, 4)
    feat = clusters(32)
    for _ in range(2):
        sampler.record(torch.arange(20), feat[:20], feat[:20])
    assert sorted(flat(list(sampler))) == [*range(32)]


def test_an_epoch_that_was_left_begins_anew() -> None:
    sampler = smk.GroupedBatchSampler(40, 4)
    begun = iter(sampler)
    left = [next(begun) for _ in range(3)]
    assert list(sampler)[:3] == left
    assert sampler.epoch == 0
    next(iter(sampler))
    assert sampler.epoch == 1


@pytest.mark.parametrize("options", [{}, {"queue_size": 12, "search_space": 7}])
@pytest.mark.parametrize("done", [0, 1, 5, 16])
def test_goes_on_from_a_checkpoint(done: int, options: Any) -> None:
    """In the middle of the second epoch, with part of its features recorded."""

    def go_on(sampler: smk.GroupedBatchSampler, done: int) -> list[Batches]:
        return [*train(sampler, 1), *train(sampler, 2)]

    feat = clusters(64)
    sampler = smk.GroupedBatchSampler(64, 4, **options)
    train(sampler, 1)
    batches = iter(sampler)
    for _ in range(done):
        batch = next(batches)
        sampler.record(torch.tensor(batch), feat[batch], feat[batch])
    file = io.BytesIO()
    torch.save(sampler.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    rest = list(batches)
    for batch in rest:
        sampler.record(torch.tensor(batch), feat[batch], feat[batch])
    wanted = ([rest] if rest else []) + train(sampler, 2)
    resumed = smk.GroupedBatchSampler(64, 4, **options)
    resumed.load_state_dict(state)
    assert train(resumed, len(wanted)) == wanted


def test_what_workers_loaded_ahead_comes_again() -> None:
    """Training tells how far it is; the sampler sees what the workers took."""
    sampler = smk.GroupedBatchSampler(40, 4)
    loader = DataLoader(torch.arange(40), batch_sampler=sampler, num_workers=1, prefetch_factor=4)
    assert len(loader) == 10
    batches = iter(loader)
    seen = [next(batches).tolist() for _ in range(2)]
    state = sampler.state_dict(consumed=2)
    assert sampler.state_dict()["consumed"] > 2
    del batches
    resumed = smk.GroupedBatchSampler(40, 4)
    resumed.load_state_dict(state)
    rest = [batch.tolist() for batch in DataLoader(torch.arange(40), batch_sampler=resumed)]
    assert len(rest) == 8
    assert sorted(flat(seen + rest)) == [*range(40)]


def test_two_processes(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(sample_of_a_rank, (str(tmp_path),), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for epoch, (one, two) in enumerate(zip(*ranks, strict=True)):
        assert [len(batch) for batch in one] == [len(batch) for batch in two]
        indices = flat(one) + flat(two)
        if epoch < 3:
            assert set(indices) == set(range(67))
            assert len(indices) == 68  # one example twice, so that both have as many
        else:
            assert len(indices) == len(set(indices)) == 64
        assert (kinds(one + two) > 2.5) == (epoch % 3 == 0)
    for rank in range(2):  # examples travel from one to the other
        first, second = (set(flat(epoch)) for epoch in ranks[rank][:2])
        assert len(first & second) < 28


def test_another_default_device() -> None:
    with torch.device("meta"):
        assert sorted(flat(smk.GroupedBatchSampler(5, 2))) == list(range(5))


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"size": -1}, ValueError, "size must be at least 0, got -1"),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1, got 0"),
        ({"batch_size": 2.0}, TypeError, "batch_size must be an int, got float"),
        ({"search_space": 0}, ValueError, "search_space must be at least 1, got 0"),
        ({"queue_size": 0}, ValueError, "queue_size must be at least 1, got 0"),
        ({"seed": -1}, ValueError, "seed must be at least 0, got -1"),
        ({"mode": "easy"}, ValueError, "mode must be one of"),
        ({"item_ids": torch.zeros(4).long()}, ValueError, r"item_ids must be \[N\] = \(5,\)"),
        ({"item_ids": torch.zeros(5)}, TypeError, "item_ids must be of type int64"),
        (
            {"item_ids": torch.zeros(5, dtype=torch.int64, device="meta")},
            ValueError,
            "item_ids must be on the CPU, got meta",
        ),
    ],
)
def test_bad_arguments(change: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        smk.GroupedBatchSampler(**{"size": 5, "batch_size": 2, **change})


FEAT = torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"indices": torch.tensor([0, 5])}, ValueError, r"indices must be in \[0, N\) = \[0, 5\)"),
        ({"indices": torch.tensor([0])}, ValueError, r"indices must be \[B\] = \(2,\)"),
        ({"indices": torch.zeros(2)}, TypeError, "indices must be of type int64"),
        ({"indices": torch.zeros(2, device="meta").long()}, ValueError, "must be on the CPU"),
        ({"image_feat": FEAT[0]}, ValueError, r"image_feat must be \[B, D\]"),
        ({"text_feat": FEAT[:, :2]}, ValueError, "text_feat must be the shape of image_feat"),
        ({"text_feat": FEAT.long()}, TypeError, "text_feat must be of type float16"),
    ],
)
def test_bad_records(change: dict[str, Any], error: type[Exception], text: str) -> None:
    given = {"indices": torch.tensor([0, 1]), "image_feat": FEAT, "text_feat": FEAT}
    with pytest.raises(error, match=text):
        smk.GroupedBatchSampler(5, 2).record(**{**given, **change})


def test_states_of_other_sizes_are_refused() -> None:
    state = smk.GroupedBatchSampler(5, 2).state_dict()
    with pytest.raises(
        ValueError, match=r"sampler of .* = \(6, 2, 1, False\), got \(5, 2, 1, False"
    ):
        smk.GroupedBatchSampler(6, 2).load_state_dict(state)
