"""WebDataset shards: tar files read one after the other, for data that outgrows a disk.

A sample is files of one name in one shard: an image (``jpg``, ``jpeg``, ``png`` or ``webp``) and
its caption, as ``json`` (``{"caption": ..., "product_id": ...}``, as in `reference.data.photos`) or
as ``txt``. A folder holds ``train-*.tar`` and ``val-*.tar``, or lists in ``train.shards`` and
``val.shards`` what WebDataset can open, one a line: paths, URLs, ``pipe:`` commands, each with
``{000..146}`` if wanted.

Validation pairs are read into memory. Training pairs are a stream:

- **Order.** In every pass the shards are shuffled by seed and pass and dealt out to all workers of
  all ranks; a worker shuffles what it reads in a buffer. A worker begins its next pass when it is
  through, and need not wait for others: where shards differ in size, small ones come up more often.
- **Resuming** is exact: a checkpoint holds how far each worker is in its pass, and the worker reads
  up to there again without decoding. This takes the same shards, ranks, workers and buffer.
- **Not possible:** whatever needs to choose its pairs. Grouped batches, and tasks that train on
  features of the training split, are refused.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
import webdataset
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast
from webdataset.gopen import gopen
from webdataset.tariterators import group_by_keys, tar_file_expander

from reference import ranks
from reference.data.broken import Broken, stand_ins
from reference.data.dataset import Pairs
from reference.data.images import attempt, decode, stacked
from reference.data.photos import item_key
from reference.data.tokenizer import tokenize

IMAGES = ("jpg", "jpeg", "png", "webp")

_GRACE = 1000


class Sample(NamedTuple):
    """A pair whose image is not decoded yet."""

    name: str
    image: bytes
    record: dict[str, Any]
    """with its ``caption``"""


def shards_of(folder: str | Path, split: str) -> list[str]:
    """The shards of a split.

    Raises:
        FileNotFoundError: there are none.
    """
    found = sorted(map(str, Path(folder).glob(f"{split}-*.tar")))
    listed = Path(folder) / f"{split}.shards"
    if not found and listed.exists():
        lines = filter(None, map(str.strip, listed.read_text(encoding="utf-8").splitlines()))
        found = [url for line in lines for url in webdataset.shardlists.expand_urls(line)]
    if not found:
        raise FileNotFoundError(f"{folder} holds neither {split}-*.tar nor {split}.shards")
    return found


def read_samples(shards: Iterable[str]) -> Iterator[Sample | str]:
    """The samples of shards, in their order; in the place of an unusable one, where and why."""
    for shard in shards:
        try:
            with gopen(shard) as stream:
                yield from _read_shard(shard, stream)
        except OSError as error:  # a file that is not there, or a command that failed as it ended
            yield f"{shard}: {error}"


def _read_shard(shard: str, stream: IO[bytes]) -> Iterator[Sample | str]:
    problems: list[str] = []

    def name_problem(error: Exception) -> bool:
        problems.append(f"{shard}: {type(error).__name__}: {error.args[0]}")
        return True

    opened = [{"url": shard, "stream": stream}]
    files = tar_file_expander(opened, handler=name_problem)
    for found in group_by_keys(files, handler=name_problem):
        name = f"{shard.rpartition('/')[2]}:{found['__key__']}"
        sample = _sample(name, found)
        yield f"{name}: {sample}" if isinstance(sample, str) else sample
    yield from problems


def _sample(name: str, files: dict[str, Any]) -> Sample | str:
    """A sample, or what is wrong with it."""
    images = [files[kind] for kind in IMAGES if kind in files]
    if not images:
        return "no image"
    record: Any = {}
    try:
        if "json" in files:
            record = json.loads(files["json"])
        if "txt" in files:
            record.setdefault("caption", files["txt"].decode().strip())
    except (ValueError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    if not isinstance(record, dict):
        return f"{type(record).__name__} instead of an object"
    caption = record.get("caption")
    if not (isinstance(caption, str) and caption):
        return "no caption"
    return Sample(name, images[0], record)


def first_captions(shards: list[str], count: int) -> list[str]:
    """The captions that come first.

    Raises:
        ValueError: there are none.
    """
    usable = (sample for sample in read_samples(shards) if isinstance(sample, Sample))
    captions = [sample.record["caption"] for sample in itertools.islice(usable, count)]
    if not captions:
        raise _no_pair(shards)
    return captions


def _no_pair(shards: list[str]) -> ValueError:
    problems = map(str, itertools.islice(read_samples(shards), 3))
    return ValueError(f"{len(shards)} shards hold no pair: {'; '.join(problems)}")


def load_shards(folder: str | Path, split: str, *, image_size: int, max_broken: float) -> Pairs:
    """All pairs of a split, in memory.

    Raises:
        FileNotFoundError, ValueError: there are none.
        TooManyBroken: more than the share `max_broken` is left out.
    """
    problems: list[str] = []
    shards, images, records = shards_of(folder, split), [], []
    for sample in tqdm(read_samples(shards), f"{split} shards", unit="image"):
        if isinstance(sample, str):
            problems.append(sample)
            continue
        image = attempt(decode, sample.image, image_size)
        if isinstance(image, str):
            problems.append(f"{sample.name}: {image}")
        else:
            images.append(image)
            records.append({"image": sample.name, **sample.record})
    Broken(f"{folder}: {split}", max_broken).note(len(images) + len(problems), problems)
    if not images:
        raise ValueError(f"{folder}: the shards of {split} hold no image-caption pair")
    item_ids = torch.tensor([item_id(record) for record in records])
    captions = [record.pop("caption") for record in records]
    return Pairs(stacked(images), captions, item_ids, records)


def item_id(record: dict[str, Any]) -> int:
    """A number for `item_key`, equal in all processes: 63 bits of a hash."""
    key = repr(item_key(record)).encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") >> 1


class Position(NamedTuple):
    """How far a worker is."""

    epoch: int = 0
    """its pass"""
    taken: int = 0
    """samples of it, unusable ones included"""


class Part(NamedTuple):
    """What a worker makes of as many usable samples as a batch has."""

    images: Tensor | None
    """uint8 ``[B, 3, S, S]``, None: not one could be decoded"""
    captions: list[str]
    item_ids: Tensor
    position: Position
    read: int
    """samples, broken ones included"""
    problems: list[str]


@dataclass(frozen=True)
class Order:
    """In which order one rank reads samples, but for where it begins."""

    shards: list[str]
    """of all ranks"""
    rank: int
    ranks: int
    workers: int
    """at least 1"""
    batch_size: int
    buffer: int
    """samples among which a worker shuffles"""
    seed: int

    def samples(self, part: int, start: Position) -> Iterator[tuple[Sample | str, Position]]:
        """Samples of a worker without end after `start`, and how far it is with each.

        Unusable ones are shuffled with the others, so that they come as often as they are.
        """
        reader, readers = self.rank * self.workers + part, self.ranks * self.workers
        for epoch in itertools.count(start.epoch):
            dealt = random.Random(f"{self.seed} {epoch}").sample(self.shards, len(self.shards))
            own = dealt[reader::readers]
            chance = random.Random(f"{self.seed} {epoch} {reader}")
            mix = webdataset.shuffle(self.buffer, initial=self.buffer, rng=chance)
            usable = False
            for number, sample in enumerate(mix(read_samples(own)), 1):
                usable = usable or isinstance(sample, Sample)
                if epoch > start.epoch or number > start.taken:
                    yield sample, Position(epoch, number)
            if not usable:
                raise _no_pair(own)


class ShardReader(IterableDataset[Part]):
    """The parts that batches are made of, decoded by the workers of a DataLoader in turn.

    Args:
        order: of the samples.
        positions: where each worker begins.
        batches: how many were taken of all workers; tells whose turn it is.
        image_size: side of the images.
    """

    def __init__(
        self, order: Order, positions: list[Position], batches: int, image_size: int
    ) -> None:
        self.order, self.positions, self.batches = order, positions, batches
        self.image_size = image_size

    def __iter__(self) -> Iterator[Part]:
        worker = get_worker_info()
        # A loader begins with its first worker, which therefore takes the part whose turn it is.
        part = (self.batches + (0 if worker is None else worker.id)) % self.order.workers
        batch: list[Sample] = []
        problems: list[str] = []
        for sample, position in self.order.samples(part, self.positions[part]):
            if isinstance(sample, str):
                problems.append(sample)
            else:
                batch.append(sample)
            if len(batch) == self.order.batch_size:
                yield self._decoded(batch, position, problems)
                batch, problems = [], []

    def _decoded(self, batch: list[Sample], position: Position, unusable: list[str]) -> Part:
        images = [attempt(decode, sample.image, self.image_size) for sample in batch]
        broken = [
            f"{sample.name}: {image}"
            for image, sample in zip(images, batch, strict=True)
            if isinstance(image, str)
        ]
        places = stand_ins([not isinstance(image, str) for image in images])
        shown = [image for place in places if not isinstance(image := images[place], str)]
        records = [batch[place].record for place in places]
        return Part(
            stacked(shown) if shown else None,
            [record["caption"] for record in records],
            torch.tensor([item_id(record) for record in records], dtype=torch.int64),
            position,
            len(batch) + len(unusable),
            unusable + broken,
        )


class ShardStream:
    """Batches of training pairs without end, for one rank.

    ``next(stream)`` is a batch as `PairDataset` gives it, without a number of rows. The place of a
    pair whose image cannot be decoded is taken by another pair of the batch, so that batches have
    one size and what was read can be counted without decoding.

    Args:
        shards: of all ranks.
        tokenizer: turns captions into ids.
        length: T; longer captions are cut.
        batch_size: pairs of a batch.
        image_size: side of the images.
        workers: processes that read and decode; 0: this one does.
        buffer: samples among which a worker shuffles.
        max_broken: share of broken pairs that stops the run.
        seed: of all shuffling.

    Raises:
        ValueError: there are fewer shards than workers of all ranks.
    """

    def __init__(
        self,
        shards: list[str],
        tokenizer: PreTrainedTokenizerFast,
        length: int,
        *,
        batch_size: int,
        image_size: int,
        workers: int = 2,
        buffer: int = 1000,
        max_broken: float = 0.1,
        seed: int = 0,
    ) -> None:
        parts = max(1, workers)
        if len(shards) < ranks.size() * parts:
            raise ValueError(
                f"{len(shards)} shards are too few for {ranks.size()} processes of {parts} "
                f"workers: make at least {ranks.size() * parts}, or lower workers"
            )
        self.tokenizer, self.length, self.image_size = tokenizer, length, image_size
        self.order = Order(shards, ranks.rank(), ranks.size(), parts, batch_size, buffer, seed)
        self.workers, self.positions, self.batches = workers, [Position()] * parts, 0
        self._broken = Broken("training shards", max_broken, _GRACE)
        self._parts: Iterator[Part] | None = None

    def __next__(self) -> dict[str, Tensor]:
        """The next batch.

        Raises:
            TooManyBroken: see `Broken`.
            ValueError: a worker's shards hold no pair.
        """
        part = self._next_part()
        while part.images is None:
            part = self._next_part()
        input_ids, word_ids = tokenize(self.tokenizer, part.captions, self.length)
        return {
            "image": part.images,
            "input_ids": input_ids,
            "word_ids": word_ids,
            "item_id": part.item_ids,
            "index": torch.full_like(part.item_ids, -1),
        }

    def _next_part(self) -> Part:
        if self._parts is None:
            reader = ShardReader(self.order, self.positions.copy(), self.batches, self.image_size)
            # A loader draws a seed as it begins: not from the generator that steps draw from.
            own = torch.Generator()
            loader = DataLoader(reader, batch_size=None, num_workers=self.workers, generator=own)
            self._parts = iter(loader)
        part = next(self._parts)
        self.positions[self.batches % len(self.positions)] = part.position
        self.batches += 1
        self._broken.note(part.read, part.problems)
        return part

    @property
    def broken(self) -> int:
        """How many broken pairs were met."""
        return self._broken.count

    def state_dict(self) -> dict[str, Any]:
        """How far every worker of this rank is."""
        positions = [tuple(position) for position in self.positions]
        return {"batches": self.batches, "positions": positions, "sizes": self._sizes()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there.

        Raises:
            ValueError: the state is of other shards, ranks, workers or sizes.
        """
        if tuple(state["sizes"]) != self._sizes():
            raise ValueError(
                f"state must be of a stream of (shards, ranks, workers, batch_size, buffer, seed) "
                f"= {self._sizes()}, got {tuple(state['sizes'])}"
            )
        self.batches, self._parts = state["batches"], None
        self.positions = [Position(*position) for position in state["positions"]]

    def _sizes(self) -> tuple[int, ...]:
        order = self.order
        sizes = order.ranks, order.workers, order.batch_size, order.buffer, order.seed
        return len(order.shards), *sizes
