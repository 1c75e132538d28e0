"""Antialiased layers of drawn garments: silhouettes, trims, seams, patterns and details.

Coordinates are those of a 64 x 64 sheet, x to the right of the garment's axis, y downwards.
Every layer is a Pillow image of mode L whose pixels say how much of them is covered (255: all).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter

Layer = Image.Image
Points = Sequence[tuple[float, float]]

SHEET = 64
AXIS = 32
_OVERSAMPLING = 4


@dataclass(frozen=True)
class _Style:
    """How to draw one kind of garment; outlines and trims give the right half, then mirrored."""

    outline: Points
    neck_depth: tuple[float, float] | None
    """y of the neckline's lowest point in the front and in the back view"""
    trims: Sequence[Points]
    front_trims: Sequence[Points]
    seams: Sequence[Points]
    front_seams: Sequence[Points]
    buttons: Points
    anchors: dict[str, tuple[float, float, float]]
    """x, y and radius of each detail"""


_STYLES = {
    "shirt": _Style(
        outline=[(5.5, 10), (13, 12.5), (24, 23), (18.5, 30.5), (13, 25.5), (13.5, 55)],
        neck_depth=(17, 11.5),
        trims=[[(19.5, 31), (17, 28.5), (22.2, 21), (25, 23.5)]],
        front_trims=[],
        seams=[[(12.6, 13), (12.2, 19), (13, 26)], [(0, 52), (13.5, 52)]],
        front_seams=[[(0, 17), (0, 55)]],
        buttons=[(1.8, 22), (1.8, 31), (1.8, 40), (1.8, 48)],
        anchors={"badge": (7, 27, 5.5), "pocket": (-7, 42, 5), "print": (0, 33, 9.5)},
    ),
    "jacket": _Style(
        outline=[(5, 8.5), (13, 11.5), (17, 17), (22.5, 45), (16, 48), (13, 27), (14, 55)],
        neck_depth=(19, 9.5),
        trims=[
            [(22, 41), (24, 45), (15.5, 49), (14.8, 44)],
            [(0, 51), (15, 51), (15, 56), (0, 56)],
        ],
        front_trims=[[(4.5, 8), (8, 10), (6.5, 20), (1, 24), (0.5, 19)]],
        seams=[[(13.5, 12), (12, 19), (13, 28)]],
        front_seams=[[(0, 19), (0, 55)]],
        buttons=[],
        anchors={"badge": (7.5, 29.5, 5.2), "pocket": (-6.5, 42.5, 5), "print": (0, 32, 9.5)},
    ),
    "dress": _Style(
        outline=[(4.5, 8), (8.5, 8), (9.5, 17), (8, 28), (20, 57)],
        neck_depth=(14, 11),
        trims=[[(0, 27), (9, 27), (9.5, 31), (0, 31)], [(0, 54), (21, 54), (21, 58), (0, 58)]],
        front_trims=[],
        seams=[[(5, 32), (8, 54)], [(9, 32), (14.5, 54)]],
        front_seams=[],
        buttons=[],
        anchors={"badge": (0, 21, 5.4), "pocket": (-7.5, 42, 5), "print": (0, 42.5, 9.5)},
    ),
    "trousers": _Style(
        outline=[(0, 8), (11.5, 8), (14.5, 24), (16, 57), (3, 57), (0, 32)],
        neck_depth=None,
        trims=[[(0, 7), (13, 7), (13, 12), (0, 12)], [(2, 54), (17, 54), (17, 58), (2, 58)]],
        front_trims=[],
        seams=[[(0, 12), (0, 32)]],
        front_seams=[[(6.5, 12), (8.5, 17), (13.5, 19)]],
        buttons=[(1.8, 10)],
        anchors={"badge": (9, 42, 5.4), "pocket": (-8.5, 25, 5), "print": (0, 22.5, 8.8)},
    ),
    "skirt": _Style(
        outline=[(0, 13), (9.5, 13), (22, 53), (10, 55), (0, 55.5)],
        neck_depth=None,
        trims=[[(0, 12), (11.5, 12), (11.5, 18), (0, 18)]],
        front_trims=[],
        seams=[[(3.5, 22), (8, 54)], [(6.5, 22), (15, 53)]],
        front_seams=[],
        buttons=[(1.8, 15.5)],
        anchors={"badge": (6.5, 40, 5.5), "pocket": (-7, 30, 5), "print": (0, 37, 9.8)},
    ),
    "bag": _Style(
        outline=[(0, 25), (18, 25), (21, 56), (0, 56)],
        neck_depth=None,
        trims=[[(0, 24), (19, 24), (19.5, 30), (0, 30)]],
        front_trims=[],
        seams=[[(0, 53), (21, 53)]],
        front_seams=[],
        buttons=[(0, 27)],
        anchors={"badge": (8.5, 42, 5.6), "pocket": (-8.5, 43, 5.2), "print": (0, 42, 9.8)},
    ),
}
GARMENTS = tuple(_STYLES)
SHAPES = ("star", "heart", "circle", "diamond")
PATTERNS = ("plain", "striped", "dotted", "checked")


@dataclass(frozen=True)
class Sheet:
    """The layers of one kind of garment in one view at one scale."""

    body: Layer
    trim: Layer
    line: Layer
    light: Layer
    """RGB brightness of the cloth, darker towards the edges"""
    shadow: Layer


class _Pen:
    """Draws sheet coordinates, scaled about the sheet's centre, onto an oversampled mask."""

    def __init__(self, size: int, scale: float) -> None:
        self.size, self.scale = size, scale
        self.unit = size * _OVERSAMPLING / SHEET
        self.image = Image.new("L", (size * _OVERSAMPLING,) * 2)
        self.draw = ImageDraw.Draw(self.image)

    def at(self, points: Points, mirror: bool = False) -> list[tuple[float, float]]:
        half, side = SHEET / 2, -1 if mirror else 1
        return [
            (
                (AXIS + self.scale * side * x) * self.unit,
                (half + self.scale * (y - half)) * self.unit,
            )
            for x, y in points
        ]

    def polygon(self, points: Points, mirrored: bool = False) -> None:
        self.draw.polygon(self.at(points), fill=255)
        if mirrored:
            self.draw.polygon(self.at(points, mirror=True), fill=255)

    def line(self, points: Points, width: float) -> None:
        for mirror in (False, True):
            self.draw.line(self.at(points, mirror), 255, round(width * self.unit), "curve")

    def dot(self, x: float, y: float, radius: float, fill: int = 255) -> None:
        ((cx, cy),) = self.at([(x, y)])
        r = radius * self.scale * self.unit
        self.draw.ellipse((cx - r, cy - r, cx + r, cy + r), fill=fill)


def _blurred(image: Image.Image, pixels: float) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(pixels))


def _contour(mask: Image.Image, width: float) -> Image.Image:
    """The rim of a mask, `width` oversampled pixels deep."""
    # One standard deviation inside a straight edge, a blurred mask reaches 0.84.
    core = _blurred(mask, width).point(lambda value: 255 * (value > 0.84 * 255))
    return ImageChops.subtract(mask, core)


@cache
def sheet(garment: str, view: str, scale: float, size: int) -> Sheet:
    """Draw a garment in view ``"front"`` or ``"back"`` as [size, size] layers."""
    style = _STYLES[garment]
    body = _Pen(size, scale)
    outline = list(style.outline)
    if style.neck_depth is not None:
        depth, top = style.neck_depth[view == "back"], outline[0][1]
        outline = [(0, depth), (outline[0][0] * 0.7, (depth + top) / 2), *outline]
        outline.append((0, outline[-1][1] + 0.5))
    body.polygon(outline, mirrored=True)
    # Blur and threshold round the corners of cloth.
    soft = _blurred(body.image, 1.1 * body.unit).point(lambda value: 255 * (value > 127))
    if garment == "bag":
        soft = ImageChops.lighter(soft, _bag_handle(size, scale))

    front = view == "front"
    trim, line = _Pen(size, scale), _Pen(size, scale)
    for points in (*style.trims, *(style.front_trims if front else ())):
        trim.polygon(points, mirrored=True)
    for points in (*style.seams, *(style.front_seams if front else ())):
        line.line(points, 0.7)
    for x, y in style.buttons if front else ():
        line.dot(x, y, 0.9)

    unit = body.unit
    seams = ImageChops.multiply(line.image, soft).point(lambda value: value * 0.6)
    light = _blurred(soft, 3.5 * unit).point(lambda value: min(255, 184 + 0.32 * value))
    shadow = Image.new("L", soft.size)
    shadow.paste(soft.point(lambda value: value * 0.3), (round(unit), round(2.2 * unit)))
    return Sheet(
        body=soft.reduce(_OVERSAMPLING),
        trim=ImageChops.multiply(trim.image, soft).reduce(_OVERSAMPLING),
        line=ImageChops.lighter(seams, _contour(soft, 0.9 * unit)).reduce(_OVERSAMPLING),
        light=Image.merge("RGB", 3 * [light.reduce(_OVERSAMPLING)]),
        shadow=_blurred(shadow, 2.2 * unit).reduce(_OVERSAMPLING),
    )


def _bag_handle(size: int, scale: float) -> Image.Image:
    pen = _Pen(size, scale)
    pen.dot(0, 24, 13.5)
    pen.dot(0, 24, 10, fill=0)
    pen.draw.rectangle((0, pen.at([(0, 26)])[0][1], *pen.image.size), fill=0)
    return pen.image


@cache
def detail(
    garment: str, view: str, kind: str, shape: str, scale: float, size: int
) -> tuple[Layer, Layer]:
    """Draw a pocket, badge or print where this garment carries it: (area, rim)."""
    x, y, radius = _STYLES[garment].anchors[kind]
    pen = _Pen(size, scale)
    pen.polygon([(x + radius * u, y + radius * v) for u, v in _outline(shape)])
    area, rim = (
        ImageChops.multiply(image.reduce(_OVERSAMPLING), sheet(garment, view, scale, size).body)
        for image in (pen.image, _contour(pen.image, 0.8 * pen.unit))
    )
    return area, rim


def _outline(shape: str) -> Points:
    """A shape's polygon in the unit circle's box."""
    turns = np.linspace(0, 2 * math.pi, 48, endpoint=False)
    if shape == "star":
        radii = [1.1, 0.48] * 5
        angles = [math.pi * (i / 5 - 0.5) for i in range(10)]
        return [(r * math.cos(a), r * math.sin(a)) for r, a in zip(radii, angles, strict=True)]
    if shape == "heart":
        return [
            (math.sin(t) ** 3, -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t)) / 15)
            for t in turns
        ]
    if shape == "diamond":
        return [(0, -1.15), (0.85, 0), (0, 1.15), (-0.85, 0)]
    if shape == "pocket":
        return [(-0.95, -0.95), (0.95, -0.95), (0.95, 0.6), (0, 1.1), (-0.95, 0.6)]
    return [(math.cos(t), math.sin(t)) for t in turns]


@cache
def pattern(name: str, size: int) -> Layer:
    """A pattern of the cloth over the whole sheet."""
    y, x = (np.mgrid[: size * _OVERSAMPLING, : size * _OVERSAMPLING] + 0.5) * (
        SHEET / size / _OVERSAMPLING
    )
    if name == "striped":
        inside = y % 7 < 2.6
    elif name == "dotted":
        shifted = x + 3.5 * (y // 7 % 2)
        inside = (shifted % 7 - 3.5) ** 2 + (y % 7 - 3.5) ** 2 < 3.2
    elif name == "checked":
        inside = (x // 5 + y // 5) % 2 == 0
    else:
        inside = np.zeros_like(x, dtype=bool)
    return Image.fromarray(inside.astype(np.uint8) * 255).reduce(_OVERSAMPLING)
