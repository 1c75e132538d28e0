"""Images as training wants them: square, uint8, in memory or read when they are asked for."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from reference.data.broken import Broken, stand_ins

Pixels = NDArray[np.uint8]


def fit(image: Image.Image, size: int) -> Pixels:
    """An image upright, on white, scaled to fit and padded: uint8 ``[3, size, size]``."""
    image = ImageOps.exif_transpose(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    square = ImageOps.pad(image.convert("RGB"), (size, size), color="white")
    return np.asarray(square).transpose(2, 0, 1)


def decode(data: bytes, size: int) -> Pixels:
    """`fit` of a file's content."""
    try:
        opened = Image.open(io.BytesIO(data))
    except UnidentifiedImageError as error:  # whose message holds an address in memory
        raise ValueError("no image of a known format") from error
    with opened as image:
        # A JPEG can be decoded at a fraction of its size; twice the target keeps the quality.
        image.draft("RGB", (2 * size, 2 * size))
        return fit(image, size)


def attempt(read: Callable[..., Pixels], *arguments: Any) -> Pixels | str:
    """What `read` gives, or what is wrong."""
    try:
        return read(*arguments)
    except Exception as error:  # Pillow's plugins raise errors of many kinds on broken files
        return f"{type(error).__name__}: {error}"


def stacked(images: Sequence[Pixels]) -> Tensor:
    """uint8 ``[N, 3, S, S]``."""
    return torch.from_numpy(np.stack(images))


class StoredImages:
    """Images too many to hold in memory, read when they are indexed.

    Args:
        read: gives image ``0 <= row < count`` as uint8 ``[3, S, S]``, or raises.
        count: how many there are.
        name: gives the name of an image, for messages.
        broken: counts those that cannot be read.
    """

    def __init__(
        self, read: Callable[[int], Pixels], count: int, name: Callable[[int], str], broken: Broken
    ) -> None:
        self._read, self._count, self._name, self.broken = read, count, name, broken

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, rows: Tensor) -> Tensor:
        """uint8 ``[*rows.shape, 3, S, S]``, all of which must be readable."""
        images = stacked([self._read(row) for row in rows.flatten().tolist()])
        return images.view(*rows.shape, *images.shape[1:])

    def batch(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The images of a batch ``[B]``, and which they are: another one's for a broken one.

        Raises:
            ValueError: none can be read.
            TooManyBroken: see `Broken`.
        """
        found = [attempt(self._read, row) for row in rows.tolist()]
        problems = [
            f"{self._name(row)}: {image}"
            for row, image in zip(rows.tolist(), found, strict=True)
            if isinstance(image, str)
        ]
        self.broken.note(len(found), problems)
        places = stand_ins([not isinstance(image, str) for image in found])
        if not places:
            raise ValueError(f"no image of a batch can be read: {', '.join(problems[:3])}")
        shown = [image for place in places if not isinstance(image := found[place], str)]
        return stacked(shown), rows[places]
