"""FashionGen: the HDF5 files ``fashiongen_256_256_train.h5`` and ``..._validation.h5``.

A file holds ``input_image`` (uint8 ``[N, 256, 256, 3]``) and columns ``[N, 1]`` of Latin-1 strings
or numbers. Images of one ``input_productID`` show one item; the caption is ``input_description``.
Captions and attributes are held in memory. An image is read when it is asked for, since all 260 490
take 51 GB once they are unpacked.
"""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from reference.data.broken import Broken
from reference.data.dataset import Pairs
from reference.data.images import Pixels, StoredImages, attempt, fit

FILES = {"train": "*_train.h5", "val": "*_validation.h5"}
ATTRIBUTES = (
    "name", "category", "subcategory", "brand", "composition", "gender", "department", "season",
    "pose",
)  # fmt: skip
"""Columns (``input_name``, ...) that become keys of the records, where the file has them."""

_GRACE = 1000


def load_fashiongen(
    folder: str | Path, *, image_size: int = 64, max_broken: float = 0.1
) -> tuple[Pairs, Pairs]:
    """The pairs of both files, their images scaled to `image_size` when they are read.

    A pair without a description is left out. So is a validation pair whose image cannot be read:
    figures are computed of all of them, so each is read once to begin with. Training images are
    not; one that turns out to be broken is replaced as `PairDataset` says.

    Raises:
        FileNotFoundError: a file is missing.
        TooManyBroken: a larger share than `max_broken` is left out, or replaced.
        ValueError: a file is not laid out like FashionGen.
    """
    item_ids: dict[int, int] = {}
    train, val = (
        _load_split(_file(Path(folder), split), image_size, max_broken, item_ids, split == "val")
        for split in FILES
    )
    return train, val


def _file(folder: Path, split: str) -> Path:
    found = sorted(folder.glob(FILES[split]))
    if len(found) != 1:
        raise FileNotFoundError(f"{folder} holds {len(found)} files {FILES[split]} instead of one")
    return found[0]


def _load_split(
    path: Path, image_size: int, most: float, item_ids: dict[int, int], check: bool
) -> Pairs:
    file = h5py.File(path)
    images = _images(file, path)
    captions = _texts(file, path, "description", len(images))
    products = _column(file, path, "productID", len(images)).astype(np.int64).tolist()
    problems = {
        row: f"row {row}: no description" for row, text in enumerate(captions) if not text.strip()
    }

    def read(row: int) -> Pixels:
        return fit(Image.fromarray(images[row]), image_size)

    if check:
        for row in tqdm(range(len(images)), f"check {path.name}", unit="image"):
            image = attempt(read, row)
            if isinstance(image, str):
                problems[row] = f"row {row}: {image}"
    Broken(path.name, most).note(len(images), list(problems.values()))
    rows = [row for row in range(len(images)) if row not in problems]
    if not rows:
        raise ValueError(f"{path} holds no image-caption pair")
    return Pairs(
        images=StoredImages(
            lambda i: read(rows[i]),
            len(rows),
            lambda i: f"row {rows[i]}",
            Broken(path.name, most, _GRACE),
        ),
        captions=[captions[row] for row in rows],
        item_ids=torch.tensor([item_ids.setdefault(products[row], len(item_ids)) for row in rows]),
        records=_records(file, path, rows, products),
    )


def _records(
    file: h5py.File, path: Path, rows: list[int], products: list[int]
) -> list[dict[str, str]]:
    records = [{"image": f"{path.name}:{row}", "product_id": str(products[row])} for row in rows]
    for name in ATTRIBUTES:
        if f"input_{name}" in file:
            values = _texts(file, path, name, len(products))
            for record, row in zip(records, rows, strict=True):
                record[name] = values[row]
    return records


def _images(file: h5py.File, path: Path) -> h5py.Dataset:
    images = _dataset(file, path, "image")
    if images.ndim != 4 or images.shape[3] != 3 or images.dtype != np.uint8:
        raise ValueError(
            f"{path}: input_image must be uint8 [N, height, width, 3], "
            f"got {images.dtype} {list(images.shape)}"
        )
    return images


def _texts(file: h5py.File, path: Path, name: str, count: int) -> list[str]:
    return [str(text, "latin-1") for text in _column(file, path, name, count).tolist()]


def _column(file: h5py.File, path: Path, name: str, count: int) -> NDArray:
    column = _dataset(file, path, name)
    if column.size != count:
        raise ValueError(
            f"{path}: input_{name} must be [{count}, 1], one for each image, "
            f"got {list(column.shape)}"
        )
    values: NDArray = column[()].reshape(count)
    return values


def _dataset(file: h5py.File, path: Path, name: str) -> h5py.Dataset:
    if f"input_{name}" not in file:
        raise ValueError(f"{path}: no input_{name}; there are {', '.join(sorted(file))}")
    return file[f"input_{name}"]
