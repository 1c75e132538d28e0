"""Batches of similar examples for a DataLoader."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, distributed
from torch.utils.data import Sampler

from syncmask_kernels import _checks
from syncmask_kernels.grouping import MODES, grouped_order


class _Recorded(NamedTuple):
    """Examples in the order in which training met them."""

    indices: Tensor
    image_feat: Tensor
    text_feat: Tensor


def _positive(name: str, value: int) -> None:
    _checks.integer(name, value)
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")


def _sent(values: Tensor, device: torch.device) -> Tensor:
    """`values` of the CPU on the device, for which nobody waits."""
    pinned = values.pin_memory() if device.type == "cuda" else values
    return pinned.to(device, non_blocking=True)


class GroupedBatchSampler(Sampler[list[int]]):
    """A batch sampler whose batches are hard: each is cut from a chain of similar examples.

    Features that training computes anyway are recorded; every `queue_size` of them are shuffled,
    cut into search spaces, and chained by `grouped_order`, while their features are dropped. The
    next epoch has the batches that are cut from the chains, in shuffled order. What was not
    recorded, or is left of a chain, and the whole first epoch, comes in plain shuffled batches.

    Args:
        size: number of examples of the dataset, N.
        batch_size: examples of a batch, of one process.
        search_space: examples of a chain (1920 in GRIT-VLP); the longer, the harder the batches. A
            multiple of `batch_size` leaves nothing of a chain.
        queue_size: how many recorded features are held before they are chained. Default: N.
        item_ids: ``[N]`` int64 on the CPU; examples with equal ids (views of one product) are kept
            out of each other's batches as long as others are left.
        mode: of `grouped_order`: ``"hardest"`` (default) or ``"semi_hard"``.
        drop_last: leave out what does not fill a batch of every process. Else these last batches
            are smaller, and of up to ``processes - 1`` examples there are two.
        seed: of all shuffling, the same in every process.
        group: process group, by default that of `torch.distributed` where it is initialised.

    Each process chains what it has itself recorded, so that no features travel; the chains' batches
    (indices) are gathered as an epoch begins, shuffled, and dealt out, as many to every process.
    Batches depend on `seed`, the epoch and what was recorded only.

    Raises:
        TypeError: types do not fit.
        ValueError: sizes or `mode` do not fit.

    Source: GRIT-VLP's example-level shuffle, grouping, and shuffle of batches.

    Example:
        >>> import torch, syncmask_kernels as smk
        >>> sampler = smk.GroupedBatchSampler(6, batch_size=2)
        >>> place = torch.tensor([0.0, 0.1, 3.0, 3.1, 6.0, 6.1])  # pairs of neighbours
        >>> feat = torch.stack([place.cos(), place.sin()], dim=1)
        >>> for epoch in range(2):
        ...     batches = sorted(sorted(batch) for batch in sampler)
        ...     for batch in batches:
        ...         sampler.record(torch.tensor(batch), feat[batch], feat[batch])
        >>> sorted(i for batch in batches for i in batch)
        [0, 1, 2, 3, 4, 5]
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        *,
        search_space: int = 1920,
        queue_size: int | None = None,
        item_ids: Tensor | None = None,
        mode: str = "hardest",
        drop_last: bool = False,
        seed: int = 0,
        group: distributed.ProcessGroup | None = None,
    ) -> None:
        queue_size = max(size, 1) if queue_size is None else queue_size
        _checks.count("size", size)
        _checks.count("seed", seed)
        _positive("batch_size", batch_size)
        _positive("search_space", search_space)
        _positive("queue_size", queue_size)
        _checks.choice("mode", mode, MODES)
        if item_ids is not None:
            _checks.dtype("item_ids", item_ids, torch.int64)
            _checks.shape("item_ids", item_ids, "[N]", (size,))
            if item_ids.device.type != "cpu":
                raise ValueError(f"item_ids must be on the CPU, got {item_ids.device}")
        self.size, self.batch_size, self.drop_last = size, batch_size, drop_last
        self.search_space, self.queue_size = search_space, queue_size
        self.item_ids, self.mode, self.seed, self.group = item_ids, mode, seed, group
        self.epoch = 0
        self._batches: list[list[int]] | None = None  # of this process, in this epoch
        self._taken = 0  # of them
        self._first = 0  # where the next iteration begins
        self._queue: list[_Recorded] = []
        self._chained = 0
        self._grouped: list[Tensor] = []  # [*, batch_size] indices, for the next epoch

    # ---- what a DataLoader calls ----

    def __len__(self) -> int:
        """Batches of each process in an epoch."""
        step = self.batch_size * self._processes()
        return self.size // step if self.drop_last else -(-self.size // step)

    def __iter__(self) -> Iterator[list[int]]:
        """The batches of the next epoch; of the same again where it was left before its end."""
        if self._batches is None:
            self._batches = self._plan()
        elif self._taken >= len(self._batches):
            self.epoch += 1
            self._batches = self._plan()
            self._first = 0
        self._taken, self._first = self._first, 0
        while self._taken < len(self._batches):
            self._taken += 1
            yield self._batches[self._taken - 1]

    # ---- what training calls ----

    def record(self, indices: Tensor, image_feat: Tensor, text_feat: Tensor) -> None:
        """Take in the features of examples, such as those of each training step.

        Args:
            indices: ``[B]`` int64 on the CPU, as the dataset counts the examples.
            image_feat: ``[B, D]`` floating, kept on its device.
            text_feat: ``[B, D]`` floating.

        No host sync: chains are computed on the features' device and read as an epoch begins.
        """
        _checks.rank("indices", indices, "[B]")
        _checks.dtype("indices", indices, torch.int64)
        _checks.floating("image_feat", image_feat, "[B, D]")
        _checks.floating("text_feat", text_feat)
        _checks.shape("text_feat", text_feat, "the shape of image_feat", image_feat.shape)
        _checks.same_device("text_feat", text_feat, "image_feat", image_feat)
        _checks.shape("indices", indices, "[B]", (len(image_feat),))
        if indices.device.type != "cpu":
            raise ValueError(f"indices must be on the CPU, got {indices.device}")
        if len(indices) and not 0 <= int(indices.min()) <= int(indices.max()) < self.size:
            raise ValueError(f"indices must be in [0, N) = [0, {self.size}), got {indices}")
        features = (x.detach().clone() for x in (image_feat, text_feat))
        self._queue.append(_Recorded(indices.clone(), *features))
        while sum(len(part.indices) for part in self._queue) >= self.queue_size:
            self._chain(self.queue_size)

    def state_dict(self, consumed: int | None = None) -> dict[str, Any]:
        """The state of this process, for a checkpoint of it.

        Args:
            consumed: batches of this epoch that training is done with, after which it goes on.
                Default: all that were taken from the sampler, which is more than that where the
                workers of a DataLoader load ahead.
        """
        consumed = self._taken if consumed is None else consumed
        _checks.count("consumed", consumed)
        recorded = self._recorded()
        return {
            "epoch": self.epoch,
            "consumed": consumed,
            "batches": self._batches,
            "grouped": self._all_grouped(),
            "chained": self._chained,
            "queue": None if recorded is None else tuple(recorded),
            "sizes": self._sizes(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state: the next iteration has the rest of its epoch.

        Raises:
            ValueError: the state is of a sampler of other sizes.
        """
        if tuple(state["sizes"]) != self._sizes():
            raise ValueError(
                f"state must be of a sampler of (size, batch_size, processes, drop_last) = "
                f"{self._sizes()}, got {tuple(state['sizes'])}"
            )
        self.epoch, self._batches = state["epoch"], state["batches"]
        self._taken = self._first = state["consumed"]
        self._grouped, self._chained = [state["grouped"]], state["chained"]
        self._queue = [] if state["queue"] is None else [_Recorded(*state["queue"])]

    # ---- how batches are made ----

    def _processes(self) -> int:
        ready = distributed.is_available() and distributed.is_initialized()
        return distributed.get_world_size(self.group) if ready else 1

    def _rank(self) -> int:
        return distributed.get_rank(self.group) if self._processes() > 1 else 0

    def _sizes(self) -> tuple[int, int, int, bool]:
        return self.size, self.batch_size, self._processes(), self.drop_last

    def _recorded(self) -> _Recorded | None:
        return _Recorded(*map(torch.cat, zip(*self._queue, strict=True))) if self._queue else None

    def _all_grouped(self) -> Tensor:
        empty = torch.empty(0, self.batch_size, dtype=torch.int64, device="cpu")
        return torch.cat([empty, *(part.cpu() for part in self._grouped)])

    def _chain(self, count: int) -> None:
        """Chain the first `count` recorded examples, and keep what is cut into batches."""
        recorded = self._recorded()
        if recorded is None:
            return
        indices, image_feat, text_feat = (part[:count] for part in recorded)
        self._queue = [_Recorded(*(part[count:] for part in recorded))]
        generator = np.random.default_rng((self.seed, self.epoch, 1, self._rank(), self._chained))
        shuffled = torch.from_numpy(generator.permutation(len(indices)))
        self._chained += 1
        device = image_feat.device
        for part in shuffled.split(self.search_space):
            there = _sent(part, device)
            order = self._order(indices[part], image_feat[there], text_feat[there])
            full = len(order) // self.batch_size * self.batch_size
            self._grouped.append(order[:full].view(-1, self.batch_size))

    def _order(self, indices: Tensor, image_feat: Tensor, text_feat: Tensor) -> Tensor:
        """`indices` of the CPU in the order of a chain, on the device of the features."""
        device, items = image_feat.device, None
        if self.item_ids is not None:
            items = _sent(self.item_ids[indices], device)
        window = self.batch_size if items is not None else 1
        order = grouped_order(image_feat, text_feat, items, mode=self.mode, window=window)
        return _sent(indices, device)[order]

    def _plan(self) -> list[list[int]]:
        """The batches of this process, with the same shuffling in all of them."""
        generator = np.random.default_rng((self.seed, self.epoch, 0))
        full, loose = self._cut(self._gathered(), generator)
        generator.shuffle(full)
        processes, rank = self._processes(), self._rank()
        steps = len(full) // processes
        batches = full[rank : steps * processes : processes].tolist()
        rest = np.concatenate([full[steps * processes :].reshape(-1), loose])
        if len(rest) and not self.drop_last:
            missing = -len(rest) % processes
            rest = np.concatenate([rest, np.resize(np.arange(self.size), missing)])
            batches.append(rest.reshape(processes, -1)[rank].tolist())
        return batches

    def _gathered(self) -> np.ndarray:
        """The batches that all processes have cut from chains, which the next epoch starts with."""
        self._chain(self.queue_size)
        own = self._all_grouped().numpy()
        self._grouped, self._queue, self._chained = [], [], 0
        if self._processes() == 1:
            return own
        parts: list[Any] = [None] * self._processes()
        distributed.all_gather_object(parts, own, group=self.group)
        return np.concatenate(parts)

    def _cut(
        self, grouped: np.ndarray, generator: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """Every example once: full batches [*, batch_size], and what does not fill one."""
        _, first = np.unique(grouped, return_index=True)
        again = np.ones(grouped.size, dtype=bool)
        again[first] = False
        grouped = grouped[~again.reshape(grouped.shape).any(axis=1)]
        others = generator.permutation(np.setdiff1d(np.arange(self.size), grouped))
        if self.item_ids is not None:
            # All are as similar as can be, so the chain keeps to the order and items apart.
            parts = torch.from_numpy(others).split(self.search_space)
            alike = [part.new_zeros(len(part), 0, dtype=torch.float32) for part in parts]
            ordered = map(self._order, parts, alike, alike)
            others = np.concatenate([others[:0], *(part.numpy() for part in ordered)])
        end = len(others) // self.batch_size * self.batch_size
        return np.concatenate([grouped, others[:end].reshape(-1, self.batch_size)]), others[end:]
