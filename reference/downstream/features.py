"""What a frozen model makes of a data set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from reference.batch import Batch, make_batch
from reference.data import Data, PairDataset, ShardStream
from reference.data.tokenizer import tokenize
from reference.downstream.records import MissingRecords
from reference.model import DualEncoder

CHUNK = 256


class Features(NamedTuple):
    """Of ``N`` pairs, on the CPU."""

    image: Tensor
    """``[N, D]``: the first state (CLS) of the encoded image, which knows no text"""
    text: Tensor
    """``[N, D]``: the first state of the encoded text"""
    fused: Tensor
    """``[N, D]``: the first state of text and image fused"""
    image_features: Tensor
    """``[N, P]``, of unit length: the projection that is compared with texts'"""
    text_features: Tensor
    """``[N, P]``, of unit length"""


def features(
    model: DualEncoder,
    dataset: PairDataset,
    tokenizer: PreTrainedTokenizerFast,
    name: str,
    rows: Tensor | None = None,
    texts: Sequence[str] | None = None,
) -> Features:
    """Encode pairs of a data set.

    Args:
        model: in evaluation mode.
        dataset, tokenizer: the pairs, and what made their ids.
        name: label of the progress bar.
        rows: which pairs, all by default.
        texts: what stands in the place of their captions.
    """
    rows = torch.arange(len(dataset)) if rows is None else rows
    words = None if texts is None else tokenize(tokenizer, texts, dataset.input_ids.shape[1])
    chunks = []
    for places in tqdm(torch.arange(len(rows)).split(CHUNK), f"encode {name}", unit="batch"):
        pairs = dataset[rows[places]]
        if words is not None:
            pairs |= {"input_ids": words[0][places], "word_ids": words[1][places]}
        chunks.append(_encode(model, make_batch(pairs, tokenizer, model.temperature.device)))
    columns = zip(*chunks, strict=True)
    return Features._make(map(torch.cat, columns))


@dataclass
class Encodings:
    """A frozen model and what it makes of both splits, encoded when first asked for."""

    model: DualEncoder
    data: Data

    @property
    def train_pairs(self) -> PairDataset:
        """The training split.

        Raises:
            MissingRecords: it is a stream.
        """
        pairs = self.data.train
        if isinstance(pairs, ShardStream):
            raise MissingRecords("the training split is a stream of shards")
        return pairs

    @cached_property
    def train(self) -> Features:
        return features(self.model, self.train_pairs, self.data.tokenizer, "train")

    @cached_property
    def val(self) -> Features:
        return features(self.model, self.data.val, self.data.tokenizer, "val")


@torch.no_grad()
def _encode(model: DualEncoder, batch: Batch) -> Features:
    image = model.encode_image(batch.pixels)
    text = model.encode_text(batch.input_ids, batch.attended)
    fused = model.encode_pair(batch.input_ids, batch.attended, image)
    return Features(
        image[:, 0].cpu(),
        text[:, 0].cpu(),
        fused[:, 0].cpu(),
        model.image_features(image).cpu(),
        model.text_features(text).cpu(),
    )
