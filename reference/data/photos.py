"""Photos with captions: a folder, or a tar, of images and a JSON-lines file per split."""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from reference.data.broken import Broken
from reference.data.dataset import Pairs
from reference.data.images import attempt, decode

Read = Callable[[str], bytes]


def load_photos(
    folder: str | Path, *, image_size: int = 64, max_broken: float = 0.1
) -> tuple[Pairs, Pairs]:
    """Read ``train.jsonl`` and ``val.jsonl`` and decode their images.

    A line is an object with ``image`` (a file name in ``images.tar``, an uncompressed tar, or
    else relative to the folder), ``caption``, and if wanted ``product_id``: images with equal ids
    show one item; without it, images with equal captions do. Other keys are kept as attributes.
    Images are turned upright as EXIF says, laid on white where they are transparent, scaled to fit
    `image_size` and padded with white to a square.

    A line that is no such object, or an image that is missing or cannot be decoded, is left out; a
    warning counts and names them.

    Raises:
        FileNotFoundError: one of the two files is missing.
        TooManyBroken: more than the share `max_broken` is left out.
        ValueError: the tar is none, or nothing is left.
    """
    folder = Path(folder)
    read = _reader(folder)
    item_ids: dict[tuple[str, str], int] = {}
    train, val = (
        _load_split(folder / f"{split}.jsonl", read, image_size, item_ids, max_broken)
        for split in ("train", "val")
    )
    return train, val


def _reader(folder: Path) -> Read:
    """A thread-safe function from an image's name to its bytes."""
    archive = folder / "images.tar"
    if not archive.exists():
        return lambda name: (folder / name).read_bytes()
    places: dict[str, tuple[int, int]] = {}
    try:
        with tarfile.open(archive, "r:") as tar:
            for member in tar:
                places[member.name] = member.offset_data, member.size
    except tarfile.ReadError as error:  # also at the end of one that is cut off
        if not places:
            raise ValueError(f"{archive} is no uncompressed tar: {error}") from error

    def read(name: str) -> bytes:
        if name not in places:
            raise FileNotFoundError(f"not in {archive.name}")
        offset, size = places[name]
        with open(archive, "rb") as file:
            file.seek(offset)
            return file.read(size)

    return read


def _load_split(
    path: Path, read: Read, image_size: int, item_ids: dict[tuple[str, str], int], most: float
) -> Pairs:
    problems: list[str] = []
    lines = _read_lines(path, problems)
    read_lines = len(lines) + len(problems)
    images, kept = _decode_all(path, lines, read, image_size, problems)
    Broken(str(path), most).note(read_lines, problems)
    if not kept:
        raise ValueError(f"{path} holds no image-caption pair")
    records = [lines[i][1] for i in kept]
    keys = [item_key(record) for record in records]
    return Pairs(
        images=images[kept],
        captions=[record.pop("caption") for record in records],
        item_ids=torch.tensor([item_ids.setdefault(key, len(item_ids)) for key in keys]),
        records=records,
    )


def item_key(record: dict[str, Any]) -> tuple[str, str]:
    """What the images of one item have in common: `product_id`, or else the caption."""
    product = record.get("product_id")
    return ("caption", record["caption"]) if product is None else ("product", str(product))


def _read_lines(path: Path, problems: list[str]) -> list[tuple[int, dict[str, Any]]]:
    """The usable lines of a file, with their numbers."""
    lines = []
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            where = f"{path.name}:{number}"
            try:
                record = json.loads(line)
            except ValueError as error:
                problems.append(f"{where}: no JSON: {error}")
                continue
            if not isinstance(record, dict):
                problems.append(f"{where}: {type(record).__name__} instead of an object")
                continue
            missing = [key for key in ("image", "caption") if key not in record]
            if missing:
                problems.append(
                    f"{where}: no key {' and no key '.join(map(repr, missing))}; "
                    f"the keys are {sorted(record)}"
                )
                continue
            if not all(
                isinstance(record[key], str) and record[key] for key in ("image", "caption")
            ):
                problems.append(f"{where}: image and caption must be texts that are not empty")
                continue
            lines.append((number, record))
    return lines


def _decode_all(
    path: Path,
    lines: list[tuple[int, dict[str, Any]]],
    read: Read,
    image_size: int,
    problems: list[str],
) -> tuple[Tensor, list[int]]:
    """Decode in parallel: uint8 [len(lines), 3, S, S] and the indices that succeeded."""
    images = np.empty((len(lines), 3, image_size, image_size), np.uint8)

    def load(i: int) -> str | None:
        number, record = lines[i]
        image = attempt(lambda: decode(read(record["image"]), image_size))
        if isinstance(image, str):
            return f"{path.name}:{number}: {record['image']}: {image}"
        images[i] = image
        return None

    kept = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = pool.map(load, range(len(lines)))
        for i, problem in enumerate(tqdm(results, path.name, len(lines), unit="image")):
            if problem is None:
                kept.append(i)
            else:
                problems.append(problem)
    return torch.from_numpy(images), kept
