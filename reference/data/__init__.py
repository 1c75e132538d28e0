"""Data to train on: a catalogue that draws itself, or a folder of photos with captions."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from reference.data.catalogue import draw_catalogue
from reference.data.dataset import PairDataset, Pairs, Truth
from reference.data.photos import load_photos
from reference.data.tokenizer import longest, train_tokenizer

__all__ = ["Data", "PairDataset", "Pairs", "Truth", "load_data", "train_tokenizer"]


@dataclass
class Data:
    """Training and validation pairs, and the tokenizer of both."""

    train: PairDataset
    val: PairDataset
    tokenizer: PreTrainedTokenizerFast


def load_data(
    data: str | Path = "catalogue",
    *,
    image_size: int = 64,
    patch_size: int = 8,
    max_tokens: int = 32,
    items: int = 4000,
    seed: int = 0,
    tokenizer: PreTrainedTokenizerFast | None = None,
) -> Data:
    """Load everything into memory.

    Args:
        data: ``"catalogue"`` draws one (`reference.data.catalogue`); otherwise a folder with
            ``train.jsonl``, ``val.jsonl`` and the images (`reference.data.photos`).
        image_size: side of the square images in pixels, a multiple of `patch_size`.
        patch_size: side of a patch in pixels; patches are numbered row by row.
        max_tokens: captions are padded to the longest training caption, but cut at this length.
        items: items of the drawn catalogue to train on, two images each; a tenth as many, but at
            least 50, are drawn for validation.
        seed: seed of the drawn catalogue.
        tokenizer: a tokenizer to use; by default one is trained on the training captions.

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
    if data == "catalogue":
        train, val = draw_catalogue(
            items, val_items=max(50, items // 10), image_size=image_size, patch_size=patch_size,
            seed=seed,
        )  # fmt: skip
    else:
        train, val = load_photos(data, image_size=image_size)
    tokenizer = tokenizer or train_tokenizer(train.captions)
    length = min(max_tokens, longest(tokenizer, train.captions))
    return Data(
        PairDataset(train, tokenizer, length), PairDataset(val, tokenizer, length), tokenizer
    )
