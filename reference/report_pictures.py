"""Pictures of masks and of retrieved neighbours."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from math import isqrt
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from torch import Tensor

import syncmask_kernels as smk
from reference.run_files import Examples

Pixels = NDArray[np.uint8]
Bits = NDArray[np.bool_]
Colour = tuple[int, int, int]
Views = dict[str, Callable[[Examples, int], Image.Image]]

OUTLINE: Colour = (226, 0, 116)
HIT: Colour = (46, 158, 91)
MISS: Colour = (208, 208, 214)
INK: Colour = (32, 35, 42)
FAINT: Colour = (110, 115, 128)
CHIPS: dict[str, Colour] = {"seen": HIT, "unseen": (214, 120, 32), "masked": (84, 96, 200)}
"""Colours of masked words: named thing visible in this view, not visible, no attribute word."""

_SIDE = 256
_MASKED: Colour = (176, 180, 190)


@dataclass
class Word:
    """A word of a caption as the report marks it."""

    text: str
    kind: str
    """``"seen"``, ``"unseen"``, ``"masked"`` (see `CHIPS`), or where the word was not chosen
    ``"absent"`` (an attribute word that names nothing in this view) or ``"plain"``"""


def words_of(examples: Examples, i: int) -> list[Word]:
    """The words of pair `i`, their pieces joined, special tokens left out."""
    words: list[tuple[str, bool, int]] = []
    for token, chosen, visible in zip(
        examples.tokens[i],
        examples.token_mask[i].tolist(),
        examples.token_visible[i].tolist(),
        strict=False,
    ):
        if token.startswith("[") and token.endswith("]"):
            continue
        if token.startswith("##") and words:
            text, before, _ = words.pop()
            token, chosen = text + token[2:], chosen or before
        words.append((token, chosen, visible))
    return [Word(text, _kind(chosen, visible)) for text, chosen, visible in words]


def _kind(chosen: bool, visible: int) -> str:
    if chosen:
        return {1: "seen", 0: "unseen"}.get(visible, "masked")
    return "absent" if visible == 0 else "plain"


def photo(image: Tensor, side: int = _SIDE) -> Image.Image:
    """An image uint8 [3, S, S], enlarged."""
    return Image.fromarray(image.permute(1, 2, 0).numpy()).resize(
        (side, side), Image.Resampling.LANCZOS
    )


def chosen_view(image: Tensor, patch_mask: Tensor) -> Image.Image:
    """The image with the patches that were not chosen dimmed, and the chosen ones outlined."""
    chosen = _enlarged(patch_mask)
    pixels = np.asarray(photo(image), np.float32)
    dimmed = 0.4 * pixels.mean(-1, keepdims=True) + 0.6 * 245
    shown = np.where(chosen[..., None], pixels, dimmed)
    shown[_rim(chosen, 3)] = OUTLINE
    return Image.fromarray(shown.astype(np.uint8))


def masked_view(image: Tensor, patch_mask: Tensor) -> Image.Image:
    """What the MIM branch sees: the image without the chosen patches."""
    y, x = np.mgrid[:_SIDE, :_SIDE]
    hatch = np.where(((x + y) % 12 < 2)[..., None], 205, np.array(_MASKED))
    return Image.fromarray(
        np.where(_enlarged(patch_mask)[..., None], hatch, np.asarray(photo(image))).astype(np.uint8)
    )


def heat_view(image: Tensor, scores: Tensor) -> Image.Image:
    """The patch scores, from the least (dark) to the most, over a grey image."""
    values = np.nan_to_num(scores.float().numpy(), posinf=0, neginf=0)
    span = np.ptp(values) or 1
    grid = _grid(((values - values.min()) / span * 255).astype(np.uint8))
    smooth = Image.fromarray(grid).resize((_SIDE, _SIDE), Image.Resampling.BICUBIC)
    colours = matplotlib.colormaps["inferno"](np.asarray(smooth))[..., :3] * 255
    grey = np.asarray(photo(image).convert("L"))[..., None]
    return Image.fromarray((0.72 * colours + 0.28 * grey).astype(np.uint8))


def views_of(config: Mapping[str, Any]) -> Views:
    """What is shown of a pair, by title, for the method and options of a run."""

    def chosen(examples: Examples, i: int) -> Image.Image:
        return chosen_view(examples.image[i], examples.patch_mask[i])

    def masked(examples: Examples, i: int) -> Image.Image:
        return masked_view(examples.image[i], examples.patch_mask[i])

    def heat(examples: Examples, i: int) -> Image.Image:
        return heat_view(examples.image[i], examples.patch_scores[i])

    def described(examples: Examples, i: int) -> Image.Image:
        ratios = {name: config[name] for name in ("high_ratio", "low_ratio")}
        hidden = smk.attentive_mask(examples.patch_scores[i], **ratios).low.mask
        return masked_view(examples.image[i], hidden)

    views: Views = {"Image": lambda examples, i: photo(examples.image[i])}
    if config["method"] == "sycoca":
        told = {"For the captioner": described, "Likeness to the text": heat}
        return views | {"Patches to rebuild": chosen} | told
    if config["method"] == "simla":
        return views | {"Random blocks": chosen, "What MIM sees": masked}
    return views | {"Chosen patches": chosen, "What MIM sees": masked, "Patch scores": heat}


def _grid(patches: NDArray) -> NDArray:
    side = isqrt(len(patches))
    if side * side != len(patches):
        raise ValueError(f"{len(patches)} patches are no square grid")
    return patches.reshape(side, side)


def _enlarged(patch_mask: Tensor) -> Bits:
    grid = Image.fromarray(_grid(patch_mask.numpy()).astype(np.uint8))
    return np.asarray(grid.resize((_SIDE, _SIDE), Image.Resampling.NEAREST)) > 0


def _rim(area: Bits, width: int) -> Bits:
    """The outermost pixels of an area, `width` deep."""
    padded = Image.fromarray(np.pad(area, width).astype(np.uint8))
    core = np.asarray(padded.filter(ImageFilter.MinFilter(2 * width + 1)))
    return area & (core[width:-width, width:-width] == 0)


@cache
def _font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts", "ttf", name), size)


_GAP, _MARGIN, _LINE = 12, 36, 34


def mask_sheet(
    examples: Examples,
    views: Views,
    *,
    pairs: int = 6,
    columns: int = 2,
    word: str = "masked word",
) -> Image.Image:
    """A picture of the first pairs: their views, and their captions with chosen words marked.

    `word` is what a chosen word is called.
    """
    count = min(pairs, len(examples.image))
    width = len(views) * (_SIDE + _GAP) - _GAP
    captions = [_set_words(words_of(examples, i), width) for i in range(count)]
    lines = max((text.height for text in captions), default=0)
    height, top = _SIDE + lines + 2 * _GAP, _MARGIN + _LINE
    sheet_width = columns * (width + _MARGIN) + _MARGIN
    legend = _set_words(_legend(examples, word), sheet_width - 2 * _MARGIN, size=17)
    foot = top + -(-count // columns) * height + _GAP
    sheet = Image.new("RGB", (sheet_width, foot + legend.height + _GAP), "white")
    draw = ImageDraw.Draw(sheet)
    for i, caption in enumerate(captions):
        left = _MARGIN + i % columns * (width + _MARGIN)
        y = top + i // columns * height
        for j, (title, view) in enumerate(views.items()):
            x = left + j * (_SIDE + _GAP)
            if i < columns:
                draw.text((x, _MARGIN - 4), title, FAINT, _font(20))
            sheet.paste(view(examples, i), (x, y))
        sheet.paste(caption, (left, y + _SIDE + 6))
    sheet.paste(legend, (_MARGIN, foot))
    return sheet


def _legend(examples: Examples, word: str) -> list[Word]:
    chosen, known = examples.token_mask.any(), (examples.token_visible >= 0).any()
    if not known:
        return [Word(word, "masked")] if chosen else []
    marked = [
        Word(f"{word}, visible in this view", "seen"),
        Word(f"{word}, not visible in this view", "unseen"),
        Word(f"{word}, names nothing an image can show", "masked"),
    ]
    return [*(marked if chosen else []), Word("grey: not visible in this view", "absent")]


def _set_words(words: Sequence[Word], width: int, *, size: int = 21) -> Image.Image:
    """Words set in lines of at most `width` pixels, masked ones as chips."""
    places, x, y = [], 0, 4
    for word in words:
        chip = CHIPS.get(word.kind)
        font, inset = _font(size, bold=chip is not None), 7 if chip else 0
        length = round(font.getlength(word.text)) + 2 * inset
        if x and x + length > width:
            x, y = 0, y + _LINE
        places.append((word, chip, font, inset, length, x, y))
        x += length + 9
    image = Image.new("RGB", (width, y + _LINE), "white")
    draw = ImageDraw.Draw(image)
    for word, chip, font, inset, length, x, y in places:
        if chip:
            draw.rounded_rectangle((x, y - 3, x + length, y + size + 7), 7, chip)
        colour = "white" if chip else FAINT if word.kind == "absent" else INK
        draw.text((x + inset, y), word.text, colour, font)
    return image


def gallery_sheet(examples: Examples, *, side: int = 150) -> Image.Image:
    """A picture of the first images retrieved for each text; hits are framed green."""
    rows, columns = examples.gallery_hits.shape
    width = max(columns, 5) * (side + _GAP) - _GAP + 2 * _MARGIN
    height = side + 2 * _LINE + _GAP
    foot = max(1, rows) * height + _MARGIN
    sheet = Image.new("RGB", (width, foot + _LINE), "white")
    draw = ImageDraw.Draw(sheet)
    note = "The images nearest to each text, best first; green: an image of the text's item."
    draw.text((_MARGIN, foot - 10), note, FAINT, _font(15))
    for i, query in enumerate(examples.gallery_queries):
        y = _MARGIN + i * height
        draw.text((_MARGIN, y - 8), _shortened(query, width - 2 * _MARGIN), INK, _font(17))
        for j, (image, hit) in enumerate(
            zip(examples.gallery_images[i], examples.gallery_hits[i].tolist(), strict=True)
        ):
            x = _MARGIN + j * (side + _GAP)
            box = (x, y + _LINE, x + side, y + _LINE + side)
            sheet.paste(photo(image, side), box[:2])
            draw.rectangle(box, outline=HIT if hit else MISS, width=6 if hit else 1)
    return sheet


def _shortened(text: str, width: int) -> str:
    font = _font(17)
    if font.getlength(text) <= width:
        return text
    while font.getlength(f"{text}…") > width:
        text = text[:-1]
    return f"{text}…"
