"""A drawn catalogue: garments in two views that share one caption, with the truth kept.

The situation SyncMask is made for: several images of an item carry one text, and some described
details can be seen in one of them only (a pocket or badge in front, a print on the back). Since
the pictures are drawn, which words and which patches show up in both modalities is known exactly.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageChops
from torch import Tensor

from reference.data.dataset import Pairs
from reference.data.drawing import (
    GARMENTS,
    PATTERNS,
    SHAPES,
    SHEET,
    Layer,
    detail,
    pattern,
    sheet,
)  # fmt: skip

COLOURS = {
    "red": (202, 58, 62),
    "green": (64, 148, 96),
    "blue": (58, 94, 190),
    "yellow": (238, 200, 72),
    "black": (44, 45, 52),
    "white": (246, 244, 240),
    "purple": (132, 82, 168),
    "orange": (233, 132, 50),
}
MATERIALS = ("cotton", "linen", "leather", "silk")
SEASONS = ("summer", "winter")
STYLES = ("new", "classic")
VIEWS = ("front", "back")
VIEW_OF = {"pocket": "front", "badge": "front", "print": "back"}

_BACKDROPS = ((236, 232, 225), (225, 231, 238), (230, 237, 230), (240, 230, 228), (232, 229, 240))
_SCALES = (0.98, 1.03, 1.08)
_JITTER = 3

Colour = tuple[int, int, int]


@dataclass(frozen=True)
class Detail:
    """A small part of a garment: a pocket, a badge or a print."""

    kind: str
    shape: str
    colour: str

    @property
    def article(self) -> str:
        return "an" if self.colour == "orange" else "a"


@dataclass(frozen=True)
class Garment:
    """One item of the catalogue."""

    kind: str
    colour: str
    pattern: str
    material: str
    season: str
    style: str
    details: tuple[Detail, ...]

    def words(self) -> list[tuple[str, str | None]]:
        """The caption's words, each with the part it names.

        The part is ``"body"``, a detail's kind, or None: function words, and properties that no
        view can show (season, material), are no attribute words.
        """
        words: list[tuple[str, str | None]] = [
            (self.style, None), (self.season, None), (self.colour, "body"),
            (self.pattern, "body"), (self.material, None), (self.kind, "body"),
        ]  # fmt: skip
        for i, part in enumerate(self.details):
            words += [
                ("and" if i else "with", None),
                (part.article, None),
                (part.colour, part.kind),
            ]
            if part.kind == "pocket":
                words.append(("pocket", "pocket"))
                continue
            words += [(part.shape, part.kind), (part.kind, part.kind), ("on", None), ("the", None)]
            words.append((VIEW_OF[part.kind], part.kind))
        return words

    @property
    def caption(self) -> str:
        return " ".join(word for word, _ in self.words())


def describe(rng: random.Random) -> Garment:
    """Invent a garment. Its details differ from it, and from each other, in colour."""
    colour, *others = rng.sample(list(COLOURS), 4)
    details = [
        Detail(kind, "pocket" if kind == "pocket" else rng.choice(SHAPES), other)
        for kind, other in zip(VIEW_OF, others, strict=True)
        if rng.random() < 0.7
    ]
    return Garment(
        rng.choice(GARMENTS), colour, rng.choice(PATTERNS), rng.choice(MATERIALS),
        rng.choice(SEASONS), rng.choice(STYLES), tuple(details),
    )  # fmt: skip


def draw(
    garment: Garment, view: str, size: int, rng: random.Random
) -> tuple[Image.Image, Layer, Layer]:
    """Draw one view: (RGB image, how much of a pixel is garment, how much is a small detail)."""
    scale = rng.choice(_SCALES)
    layers = sheet(garment.kind, view, scale, size)
    base = COLOURS[garment.colour]
    cloth = Image.new("RGB", (size, size), base)
    cloth.paste(_contrast(base), mask=pattern(garment.pattern, size))
    cloth.paste(_tone(base, 0.78), mask=layers.trim)
    cloth = ImageChops.multiply(cloth, layers.light)
    cloth.paste(_ink(base), mask=layers.line)
    details = Image.new("L", (size, size))
    for part in garment.details:
        if VIEW_OF[part.kind] == view:
            area, rim = detail(garment.kind, view, part.kind, part.shape, scale, size)
            cloth.paste(COLOURS[part.colour], mask=area)
            cloth.paste(_ink(COLOURS[part.colour]), mask=rim)
            details = ImageChops.lighter(details, area)

    reach = _JITTER * size // SHEET
    place = (rng.randint(-reach, reach), rng.randint(-reach, reach))
    image = _backdrop(rng.choice(_BACKDROPS), size).copy()
    image.paste((0, 0, 0), place, layers.shadow)
    image.paste(cloth, place, layers.body)
    return image, _moved(layers.body, place), _moved(details, place)


def draw_catalogue(
    items: int, *, val_items: int = 400, image_size: int = 64, patch_size: int = 8, seed: int = 0
) -> tuple[Pairs, Pairs]:
    """Draw the catalogue; every item gives a front and a back view, one after the other.

    Args:
        items: items to train on.
        val_items: items to validate on. They depend on the seed alone, not on `items`.
        image_size: side of the square images in pixels, a multiple of `patch_size`.
        patch_size: side of a patch, for the truth per patch.
        seed: equal seeds give equal catalogues.

    Returns:
        (train, val); no caption occurs twice, so no item of one is in the other.

    >>> train, val = draw_catalogue(3, val_items=2)
    >>> train.images.shape, val.images.shape
    (torch.Size([6, 3, 64, 64]), torch.Size([4, 3, 64, 64]))
    >>> train.captions[0] == train.captions[1] != train.captions[2]
    True
    """
    for name, value in (("items", items), ("val_items", val_items)):
        if value < 1:
            raise ValueError(f"{name} is {value}, must be at least 1")
    rng = random.Random(seed)
    garments: dict[str, Garment] = {}
    while len(garments) < val_items + items:
        garment = describe(rng)
        garments.setdefault(garment.caption, garment)
    every = list(garments.values())
    return (
        _draw_pairs(every[val_items:], val_items, image_size, patch_size, seed),
        _draw_pairs(every[:val_items], 0, image_size, patch_size, seed),
    )


def _draw_pairs(
    garments: list[Garment], first_id: int, size: int, patch_size: int, seed: int
) -> Pairs:
    n = len(VIEWS) * len(garments)
    images = np.empty((n, size, size, 3), np.uint8)
    bodies = np.empty((n, size, size), np.uint8)
    details = np.empty_like(bodies)
    visible: list[list[int]] = []
    records: list[dict[str, str]] = []
    for item, garment in enumerate(garments, first_id):
        rng = random.Random(f"{seed} {item}")
        for view in VIEWS:
            row = len(records)
            drawn = draw(garment, view, size, rng)
            images[row], bodies[row], details[row] = map(np.asarray, drawn)
            visible.append([_visible(part, view) for _, part in garment.words()])
            records.append(_record(garment, item, view))
    return Pairs(
        images=torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(),
        captions=[garment.caption for garment in garments for _ in VIEWS],
        item_ids=torch.arange(first_id, first_id + len(garments)).repeat_interleave(len(VIEWS)),
        records=records,
        words_visible=visible,
        patch_described=_patch_shares(bodies, patch_size),
        patch_detail=_patch_shares(details, patch_size),
    )


def _visible(part: str | None, view: str) -> int:
    if part is None:
        return -1
    return int(part == "body" or VIEW_OF[part] == view)


def _record(garment: Garment, item: int, view: str) -> dict[str, str]:
    details = {part.kind: f"{part.colour} {part.shape}" for part in garment.details}
    return {
        "image": f"{item}-{view}", "view": view, "type": garment.kind, "colour": garment.colour,
        "pattern": garment.pattern, **details,
    }  # fmt: skip


def _patch_shares(cover: NDArray[np.uint8], patch_size: int) -> Tensor:
    """Covered share of each patch, float32 [N, P], of cover [N, S, S]."""
    n, size, _ = cover.shape
    per_side = size // patch_size
    patches = cover.reshape(n, per_side, patch_size, per_side, patch_size)
    shares = patches.mean((2, 4), dtype=np.float32) / 255
    return torch.from_numpy(shares.reshape(n, per_side**2))


def _moved(layer: Layer, place: tuple[int, int]) -> Layer:
    moved = Image.new("L", layer.size)
    moved.paste(layer, place)
    return moved


def _tone(colour: Colour, share: float, towards: int = 0) -> Colour:
    """A colour mixed with black, or with the grey `towards`."""
    r, g, b = (round(share * value + (1 - share) * towards) for value in colour)
    return r, g, b


def _contrast(colour: Colour) -> Colour:
    """A lighter or darker tone of the same colour, for patterns."""
    return _tone(colour, 0.6) if sum(colour) > 345 else _tone(colour, 0.55, 255)


def _ink(colour: Colour) -> Colour:
    """The tone of outlines and seams."""
    return _tone(colour, 0.5) if sum(colour) > 190 else _tone(colour, 0.6, 180)


@cache
def _backdrop(colour: Colour, size: int) -> Image.Image:
    fade = np.linspace(1.04, 0.95, size)[:, None, None]
    rows = np.minimum(255, np.broadcast_to(fade * np.array(colour), (size, size, 3)))
    return Image.fromarray(rows.astype(np.uint8))
