"""Curves of a training run."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator

_TITLES = {
    "loss": "Total loss",
    "itc": "ITC: image-text contrast",
    "itm": "ITM: matching",
    "mlm": "MLM: masked words",
    "mim": "MIM: masked patches",
    "caption": "Captioning: next word",
    "keywords": "Keywords, from the image",
}
_MASKS = {
    "patches_described": "patches on described parts",
    "details_covered": "details covered",
    "words_visible": "chosen words visible",
    "word_auc": "word scores (AUC)",
}
_COLOURS = ("#5460c8", "#e20074", "#2e9e5b", "#d67820")
_LINE, _SECOND, *_ = _COLOURS


def loss_curves(metrics: Sequence[dict[str, Any]], *, dark: bool = False) -> bytes:
    """A PNG of the losses, of the retrieval recall and of figures of masks, against the step."""
    logged = [row for row in metrics if "loss" in row]
    evaluated = [row for row in metrics if "eval" in row]
    paper, ink = ("#171a21", "#c6cad4") if dark else ("#ffffff", "#3c404b")
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.14, wspace=0.04, hspace=0.06)
    figure = Figure(figsize=(11.4, 5.6), dpi=150, facecolor=paper, layout=layout)
    names = [name for name in logged[0] if name in _TITLES] if logged else []
    masked = [row for row in evaluated if "masks" in row["eval"]]
    panels = len(names) + 1 + bool(masked)
    axes = figure.subplots(2, max(1, -(-panels // 2))).ravel()
    for axis, name in zip(axes, names, strict=False):
        _style(axis, _TITLES[name], paper, ink)
        steps, values = np.array([(row["step"], row[name]) for row in logged]).T
        axis.plot(steps, values, color=_LINE, alpha=0.28, linewidth=1)
        axis.plot(steps, _smooth(values), color=_LINE, linewidth=2)
    _recalls(axes[len(names)], evaluated, paper, ink)
    if masked:
        _mask_figures(axes[len(names) + 1], masked, paper, ink)
    for axis in axes[panels:]:
        axis.set_visible(False)
    file = io.BytesIO()
    figure.savefig(file, format="png", facecolor=paper, metadata={"Software": None})
    return file.getvalue()


def _recalls(axis: Axes, evaluated: Sequence[dict[str, Any]], paper: str, ink: str) -> None:
    _style(axis, "Recall at 10, validation", paper, ink)
    steps = [row["step"] for row in evaluated]
    for key, label, colour in (
        ("t2i", "text to image", _LINE), ("i2t", "image to text", _SECOND)
    ):  # fmt: skip
        values = [100 * row["eval"]["retrieval"][key]["r10"] for row in evaluated]
        axis.plot(steps, values, "o-", color=colour, markersize=4, linewidth=2, label=label)
    if evaluated:
        chance = 100 * evaluated[-1]["eval"]["retrieval"]["chance"]["t2i"]["r10"]
        axis.axhline(chance, color=ink, linestyle=":", linewidth=1, label="chance")
        _percent(axis, ink)


def _mask_figures(axis: Axes, evaluated: Sequence[dict[str, Any]], paper: str, ink: str) -> None:
    _style(axis, "Masks, validation", paper, ink)
    steps = [row["step"] for row in evaluated]
    for (key, label), colour in zip(_MASKS.items(), _COLOURS, strict=True):
        figures = [row["eval"]["masks"] for row in evaluated]
        if key in figures[0]:
            values = [100 * figure[key] for figure in figures]
            axis.plot(steps, values, "o-", color=colour, markersize=4, linewidth=2, label=label)
            chance = 100 * figures[-1].get(f"{key}_random", 0.5)
            axis.axhline(chance, color=colour, linestyle=":", linewidth=1)
    _percent(axis, ink)


def _percent(axis: Axes, ink: str) -> None:
    axis.set_ylim(0, 100)
    axis.yaxis.set_major_formatter("{x:.0f} %")
    axis.legend(frameon=False, fontsize=8, labelcolor=ink, loc="best")


def _smooth(values: np.ndarray) -> np.ndarray:
    """A running mean that shortens at the ends."""
    width = max(1, len(values) // 20) | 1
    ones = np.ones(width)
    counts = np.convolve(np.ones_like(values), ones, "same")
    return np.convolve(values, ones, "same") / counts


def _style(axis: Axes, title: str, paper: str, ink: str) -> None:
    axis.set_title(title, loc="left", fontsize=10, color=ink, fontweight="bold")
    axis.set_facecolor(paper)
    axis.grid(color=ink, alpha=0.15, linewidth=0.7)
    axis.tick_params(colors=ink, labelsize=8, length=0)
    axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axis.set_xlabel("step", fontsize=8, color=ink)
    for spine in axis.spines.values():
        spine.set_visible(False)
