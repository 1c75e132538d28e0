"""Image-text pairs that can be asked for in any order, ready to train on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerFast

from reference.data.images import StoredImages
from reference.data.tokenizer import tokenize


@dataclass
class Pairs:
    """Pairs before their captions are tokenized; the last three fields where the truth is known."""

    images: Tensor | StoredImages
    """uint8 [N, 3, S, S]"""
    captions: list[str]
    item_ids: Tensor
    """int64 [N], equal for images of one item"""
    records: list[dict[str, Any]]
    """attributes of each image, such as its name"""
    words_visible: list[list[int]] | None = None
    """for each word of each caption: 1 visible in this image, 0 not, -1 no attribute word"""
    patch_described: Tensor | None = None
    """float32 [N, P]"""
    patch_detail: Tensor | None = None
    """float32 [N, P]"""


@dataclass
class Truth:
    """What the two modalities share, known for drawn data."""

    word_visible: Tensor
    """int8 [N, T]: 1 the token's word names something visible in this image, 0 something that is
    not visible in it, -1 it is no attribute word or a special token"""
    patch_described: Tensor
    """float32 [N, P]: share of the patch that lies on described, visible parts"""
    patch_detail: Tensor
    """float32 [N, P]: share of the patch that lies on small described details"""


class PairDataset(Dataset[dict[str, Tensor]]):
    """Images and tokenized captions.

    ``dataset[i]`` is ``{"image": uint8 [3, S, S], "input_ids": int64 [T], "word_ids": int64 [T],
    "item_id": int64, "index": int64}``. An index tensor or list instead of ``i`` gives the same
    with a leading batch axis, in one gather per field.

    Images that are read when asked for may turn out to be broken. The place of such a pair is then
    taken, under its index, by another pair of the batch.

    Args:
        pairs: the pairs.
        tokenizer: turns captions into ids.
        length: T; longer captions are cut.
    """

    images: Tensor | StoredImages
    captions: list[str]
    item_ids: Tensor
    input_ids: Tensor
    word_ids: Tensor
    records: list[dict[str, Any]]
    truth: Truth | None

    def __init__(self, pairs: Pairs, tokenizer: PreTrainedTokenizerFast, length: int) -> None:
        self.images, self.captions = pairs.images, pairs.captions
        self.item_ids, self.records = pairs.item_ids, pairs.records
        self.input_ids, self.word_ids = tokenize(tokenizer, pairs.captions, length)
        self.truth = _truth(pairs, self.word_ids)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int | Sequence[int] | Tensor) -> dict[str, Tensor]:
        rows = torch.as_tensor(index)
        images, shown = self._look_up(rows)
        return {
            "image": images,
            "input_ids": self.input_ids[shown],
            "word_ids": self.word_ids[shown],
            "item_id": self.item_ids[shown],
            "index": rows,
        }

    @property
    def broken(self) -> int:
        """How often a broken image was met and replaced."""
        return self.images.broken.count if isinstance(self.images, StoredImages) else 0

    def _look_up(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        if isinstance(self.images, StoredImages) and rows.ndim:
            return self.images.batch(rows)
        return self.images[rows], rows

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Tensor]]:
        batch = self[indices]
        return [dict(zip(batch, row, strict=True)) for row in zip(*batch.values(), strict=True)]


def _truth(pairs: Pairs, word_ids: Tensor) -> Truth | None:
    if pairs.words_visible is None:
        return None
    assert pairs.patch_described is not None
    assert pairs.patch_detail is not None
    word_visible = torch.full_like(word_ids, -1, dtype=torch.int8)
    for row, words, ids in zip(word_visible, pairs.words_visible, word_ids, strict=True):
        row[ids >= 0] = torch.tensor(words, dtype=torch.int8)[ids[ids >= 0]]
    return Truth(word_visible, pairs.patch_described, pairs.patch_detail)
