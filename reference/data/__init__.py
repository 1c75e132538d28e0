"""Data to train on: a catalogue that draws itself, or a folder of one of three layouts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from reference.data.broken import TooManyBroken
from reference.data.catalogue import draw_catalogue
from reference.data.dataset import PairDataset, Pairs, Truth
from reference.data.fashiongen import load_fashiongen
from reference.data.photos import load_photos
from reference.data.shards import ShardStream, first_captions, load_shards, shards_of
from reference.data.tokenizer import longest, train_tokenizer

__all__ = [
    "Data", "PairDataset", "Pairs", "ShardStream", "TooManyBroken", "Truth",
    "kind_of", "load_data", "train_tokenizer",
]  # fmt: skip

_CAPTIONS = 20_000


@dataclass
class Data:
    """Training and validation pairs, and the tokenizer of both."""

    train: PairDataset | ShardStream
    val: PairDataset
    tokenizer: PreTrainedTokenizerFast


def kind_of(data: str | Path) -> str:
    """``"catalogue"``, or what a folder holds: ``"fashiongen"``, ``"shards"`` or ``"photos"``.

    Raises:
        FileNotFoundError: it is none of these.
    """
    if data == "catalogue":
        return "catalogue"
    folder = Path(data)
    for kind, patterns in (
        ("fashiongen", ("*_train.h5",)),
        ("shards", ("train-*.tar", "train.shards")),
        ("photos", ("train.jsonl",)),
    ):
        if any(any(folder.glob(pattern)) for pattern in patterns):
            return kind
    raise FileNotFoundError(
        f"{folder} holds no data: neither train.jsonl with images, nor *_train.h5 of FashionGen, "
        "nor train-*.tar or train.shards of WebDataset"
    )


def load_data(
    data: str | Path = "catalogue",
    *,
    image_size: int = 64,
    patch_size: int = 8,
    max_tokens: int = 32,
    items: int = 4000,
    seed: int = 0,
    tokenizer: PreTrainedTokenizerFast | None = None,
    max_broken: float = 0.1,
    batch_size: int = 48,
    workers: int = 2,
    shuffle_buffer: int = 1000,
) -> Data:
    """Load data: into memory but for the images of FashionGen and the training pairs of shards.

    Args:
        data: ``"catalogue"`` draws one (`reference.data.catalogue`); otherwise a folder laid out as
            `reference.data.photos`, `reference.data.fashiongen` or `reference.data.shards` say.
        image_size: side of the square images in pixels, a multiple of `patch_size`.
        patch_size: side of a patch in pixels; patches are numbered row by row.
        max_tokens: captions are padded to the longest training caption, but cut at this length.
        items: items of the drawn catalogue to train on, two images each; a tenth as many, but at
            least 50, are drawn for validation.
        seed: seed of the drawn catalogue, and of the order of shards.
        tokenizer: a tokenizer to use; by default one is trained on the training captions, of shards
            on the first 20 000.
        max_broken: largest share of pairs that may be broken and left out.
        batch_size, workers, shuffle_buffer: of the stream of shards: see `ShardStream`.

    Returns:
        Training and validation pairs and the tokenizer. Deterministic.

    >>> data = load_data(items=4)
    >>> data.train[0]["image"].shape, len(data.train), len(data.val)
    (torch.Size([3, 64, 64]), 8, 100)
    """
    for name, value, least in (
        ("image_size", image_size, 1), ("patch_size", patch_size, 1), ("max_tokens", max_tokens, 3)
    ):  # fmt: skip
        if value < least:
            raise ValueError(f"{name} is {value}, must be at least {least}")
    if image_size % patch_size:
        raise ValueError(f"image_size {image_size} is not a multiple of patch_size {patch_size}")
    kind = kind_of(data)
    if kind == "shards":
        shards = shards_of(data, "train")
        tokenizer = tokenizer or train_tokenizer(first_captions(shards, _CAPTIONS))
        stream = ShardStream(
            shards, tokenizer, max_tokens, batch_size=batch_size, image_size=image_size,
            workers=workers, buffer=shuffle_buffer, max_broken=max_broken, seed=seed,
        )  # fmt: skip
        val = load_shards(data, "val", image_size=image_size, max_broken=max_broken)
        return Data(stream, PairDataset(val, tokenizer, max_tokens), tokenizer)
    if kind == "catalogue":
        train, val = draw_catalogue(
            items, val_items=max(50, items // 10), image_size=image_size, patch_size=patch_size,
            seed=seed,
        )  # fmt: skip
    else:
        load = load_fashiongen if kind == "fashiongen" else load_photos
        train, val = load(data, image_size=image_size, max_broken=max_broken)
    tokenizer = tokenizer or train_tokenizer(train.captions)
    length = min(max_tokens, longest(tokenizer, train.captions))
    return Data(
        PairDataset(train, tokenizer, length), PairDataset(val, tokenizer, length), tokenizer
    )
