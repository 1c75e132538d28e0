"""Photos with captions: a folder, or a tar, of images and a JSON-lines file per split."""

from __future__ import annotations

import io
import json
import os
import tarfile
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

from reference.data.dataset import Pairs

_SHOWN_PROBLEMS = 10

Read = Callable[[str], bytes]


def load_photos(folder: str | Path, *, image_size: int = 64) -> tuple[Pairs, Pairs]:
    """Read ``train.jsonl`` and ``val.jsonl`` and decode their images.

    A line is an object with ``image`` (a file name in ``images.tar``, an uncompressed tar, or
    else relative to the folder), ``caption``, and if wanted ``product_id``: images with equal ids
    show one item; without it, images with equal captions do. Other keys are kept as attributes.
    Images are scaled to fit `image_size` and padded with white to a square.

    A line that is no object with a text, or an image that cannot be decoded, is skipped; a warning
    counts and names them.

    Raises:
        FileNotFoundError: a file, or both ``images.tar`` and ``images/``, are missing.
        ValueError: a line lacks ``image`` or ``caption``, the tar is none, or nothing is left.
    """
    folder = Path(folder)
    read = _reader(folder)
    item_ids: dict[tuple[str, str], int] = {}
    train, val = (
        _load_split(folder / f"{split}.jsonl", read, image_size, item_ids)
        for split in ("train", "val")
    )
    return train, val


def _reader(folder: Path) -> Read:
    """A thread-safe function from an image's name to its bytes."""
    archive = folder / "images.tar"
    if not archive.exists():
        if not (folder / "images").is_dir():
            raise FileNotFoundError(f"{folder} holds neither images.tar nor a folder images")
        return lambda name: (folder / name).read_bytes()
    try:
        with tarfile.open(archive, "r:") as tar:
            places = {member.name: (member.offset_data, member.size) for member in tar}
    except tarfile.ReadError as error:
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
    path: Path, read: Read, image_size: int, item_ids: dict[tuple[str, str], int]
) -> Pairs:
    problems: list[str] = []
    lines = _read_lines(path, problems)
    images, kept = _decode_all(path, lines, read, image_size, problems)
    if problems:
        shown = "".join(f"\n  {problem}" for problem in problems[:_SHOWN_PROBLEMS])
        more = len(problems) - _SHOWN_PROBLEMS
        rest = f"\n  and {more} more" if more > 0 else ""
        warnings.warn(f"{path}: {len(problems)} lines skipped{shown}{rest}", stacklevel=2)
    if not kept:
        raise ValueError(f"{path} holds no usable image-caption pair")
    records = [lines[i][1] for i in kept]
    keys = [_item_key(record) for record in records]
    return Pairs(
        images=images[kept],
        captions=[record.pop("caption") for record in records],
        item_ids=torch.tensor([item_ids.setdefault(key, len(item_ids)) for key in keys]),
        records=records,
    )


def _item_key(record: dict[str, Any]) -> tuple[str, str]:
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
                raise ValueError(
                    f"{where}: no key {' and no key '.join(map(repr, missing))}; "
                    f"the keys are {sorted(record)}"
                )
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

    def decode(i: int) -> str | None:
        number, record = lines[i]
        try:
            images[i] = _decode(read(record["image"]), image_size)
        except Exception as error:  # Pillow's plugins raise errors of many kinds on broken files
            return f"{path.name}:{number}: {record['image']}: {type(error).__name__}: {error}"
        return None

    kept = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = pool.map(decode, range(len(lines)))
        for i, problem in enumerate(tqdm(results, path.name, len(lines), unit="image")):
            if problem is None:
                kept.append(i)
            else:
                problems.append(problem)
    return torch.from_numpy(images), kept


def _decode(data: bytes, size: int) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        # A JPEG can be decoded at a fraction of its size; twice the target keeps the quality.
        image.draft("RGB", (2 * size, 2 * size))
        square = ImageOps.pad(image.convert("RGB"), (size, size), color="white")
    return np.asarray(square).transpose(2, 0, 1)
