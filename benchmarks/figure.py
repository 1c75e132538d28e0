"""The figure of a run: bars of time relative to the floor, a panel for each operator."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.report import Comparison

FLOOR, OTHER, OURS = "#b8b8b8", "#7fa6c9", "#d9722e"
ON_WHITE = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
INCHES_PER_BAR = 0.19
PANEL_MARGIN = 3.5  # for the title and the axis of a panel, in bars


def _panel_height(panel: Sequence[Comparison]) -> float:
    """In bars; each comparison has a line for what is computed."""
    return PANEL_MARGIN + sum(len(comparison.rows) + 1.6 for comparison in panel)


def _columns(panels: dict[str, list[Comparison]]) -> list[list[str]]:
    """The operators in one or two columns of about equal height."""
    columns: list[list[str]] = [[], []]
    heights = [0.0, 0.0]
    for op, panel in panels.items():
        shorter = heights.index(min(heights))
        columns[shorter].append(op)
        heights[shorter] += _panel_height(panel)
    return [column for column in columns if column]


def _draw_panel(axis: Any, op: str, panel: Sequence[Comparison]) -> None:
    y, ticks, names = 0.0, [], []
    longest = max(row.median / c.floor for c in panel for row in c.rows)
    for comparison in panel:
        inputs = comparison.case.inputs
        axis.text(0, y, inputs, va="center", fontsize=8, fontweight="bold", bbox=ON_WHITE)
        for i, row in enumerate(comparison.rows):
            y += 1
            ratio = row.median / comparison.floor
            colour = FLOOR if i == 0 else OURS if i == len(comparison.rows) - 1 else OTHER
            axis.barh(y, ratio, height=0.82, color=colour)
            time = f"{row.median:.0f}" if row.median >= 100 else f"{row.median:.3g}"
            axis.text(
                ratio + 0.01 * longest,
                y,
                f"{ratio:.2f}  ({time} ms)",
                va="center",
                fontsize=7,
                bbox=ON_WHITE,
            )
            ticks.append(y)
            names.append(row.contender)
        y += 1.6
    axis.axvline(1, color="#555555", linewidth=0.8, linestyle="--")
    axis.set_yticks(ticks, names, fontsize=7)
    axis.set_ylim(y - 0.6, -0.8)
    axis.set_xlim(0, 1.25 * longest)
    axis.tick_params(axis="x", labelsize=7)
    axis.tick_params(axis="y", length=0)
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_title(op, loc="left", fontsize=10, fontweight="bold")


def draw(path: Path, comparisons: Sequence[Comparison], machine: dict[str, Any]) -> None:
    from matplotlib.figure import Figure

    panels: dict[str, list[Comparison]] = {}
    for comparison in comparisons:
        panels.setdefault(comparison.case.op, []).append(comparison)
    columns = _columns(panels)
    heights = [[_panel_height(panels[op]) for op in column] for column in columns]
    tallest = max(map(sum, heights))
    size = (8 * len(columns), INCHES_PER_BAR * tallest + 0.7)
    figure = Figure(figsize=size, dpi=110, layout="constrained")
    figure.suptitle(
        "Time relative to the floor (dashed) on "
        f"{machine['device']}, threads: {machine['threads']}",
        fontsize=11,
    )
    parts = figure.subfigures(1, len(columns), squeeze=False)[0]
    for part, column, of_panels in zip(parts, columns, heights, strict=True):
        blank = tallest - sum(of_panels)
        axes = part.subplots(
            len(column) + 1, squeeze=False, height_ratios=[*of_panels, max(blank, 0.01)]
        )[:, 0]
        for axis, op in zip(axes, column, strict=False):
            _draw_panel(axis, op, panels[op])
        axes[-1].axis("off")
    figure.savefig(path)
