"""The Pareto front of many pruned models: quality against FLOPs and against measured time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from modhifi.artifacts.svg import INK, inline, style

COLOURS = ("#3b8ede", "#d9820b", "#2e9e5b", "#c2559d", "#8a6fd1", "#b8a01f", "#4fb3b0", "#9a6b4b")
MARKERS = ("o", "s", "^", "D", "v", "P")
# The share within which a budget is met: cells of one budget differ by chance in what they cost.
TOLERANCE = 0.02
# The costs of a cell and what an axis calls them.
COSTS = {"flops": "FLOPs, as a share of the original's", "time": "time of one sample, over the original's"}


def front(costs: Sequence[float], qualities: Sequence[float], tolerance: float = 0.0, noise: float = 0.0) -> list[bool]:
    """Which of some points no other is as cheap as and better, or as good as and cheaper.

    Costs that differ by up to ``tolerance``, as a share, are alike. A point is better by more than ``noise`` alone.
    """
    cost, quality = np.array(costs, dtype=float), np.array(qualities, dtype=float)
    better = (cost[None] <= (1 + tolerance) * cost[:, None]) & (quality[None] > quality[:, None] + noise)
    cheaper = ((1 + tolerance) * cost[None] < cost[:, None]) & (quality[None] >= quality[:, None])
    dominated = np.asarray((better | cheaper).any(1))
    return [not each for each in dominated.tolist()]


def pareto_charts(comparison: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The charts of a comparison for a page: a title and an SVG each; none where no cell was measured.

    ``comparison`` has ``cells`` (``selector``, ``compensate``, ``error`` or ``quality`` and each of ``COSTS``),
    ``quality`` (what the quality is) and ``original_quality``.
    """
    if not measured(comparison):
        return []
    charts = []
    for cost, label in COSTS.items():
        title = f"{comparison['quality']} against {label.partition(',')[0]}"
        with style():
            figure = Figure(figsize=(4.0, 3.3), layout="constrained")
            draw(figure.add_subplot(), comparison, cost, INK)
            charts.append({"title": title[:1].upper() + title[1:], "svg": Markup(inline(figure, title))})
    return charts


def write_png(path: Path, comparison: Mapping[str, Any], title: str) -> None:
    """Writes the charts side by side as one image."""
    figure = Figure(figsize=(13, 5), layout="constrained")
    figure.suptitle(title)
    for axes, cost in zip(figure.subplots(1, 2), COSTS, strict=True):
        draw(axes, comparison, cost, "black")
    figure.savefig(path, dpi=110)


def measured(comparison: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The cells of a comparison that are not empty."""
    return [cell for cell in comparison["cells"] if cell["error"] is None]


def draw(axes: Any, comparison: Mapping[str, Any], cost: str, ink: str) -> None:
    """Draws each cell, by colour its selector and by shape its compensation, and the front as a line of steps."""
    cells = measured(comparison)
    selectors = list(dict.fromkeys(cell["selector"] for cell in comparison["cells"]))
    compensations = list(dict.fromkeys(cell["compensate"] for cell in comparison["cells"]))
    colour = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(selectors)}
    marker = {name: MARKERS[i % len(MARKERS)] for i, name in enumerate(compensations)}
    for cell in cells:
        axes.plot(
            cell[cost],
            100 * cell["quality"],
            linewidth=0,
            marker=marker[cell["compensate"]],
            markersize=6,
            color=colour[cell["selector"]],
        )
    best = sorted((c[cost], c["quality"]) for c, on in zip(cells, fronts(cells, 0.0)[cost], strict=True) if on)
    steps = sorted([*best, (1.0, comparison["original_quality"])])
    axes.plot([x for x, _ in steps], [100 * y for _, y in steps], color=ink, linewidth=0.8, drawstyle="steps-post")
    axes.plot(1.0, 100 * comparison["original_quality"], marker="*", markersize=11, color=ink, linewidth=0)
    keys = [
        *(Line2D([], [], linewidth=0, marker="o", color=colour[name], label=name) for name in selectors),
        *(Line2D([], [], linewidth=0, marker=marker[name], color=ink, fillstyle="none", label=name) for name in marker),
        Line2D([], [], linewidth=0, marker="*", color=ink, label="original"),
    ]
    axes.legend(handles=keys, frameon=False, labelcolor=ink, fontsize=8, loc="lower right")
    axes.set_xlabel(COSTS[cost], color=ink)
    axes.set_ylabel(f"{comparison['quality']}, %", color=ink)
    axes.tick_params(colors=ink, length=2)
    for side in axes.spines.values():
        side.set_color(ink)
        side.set_linewidth(0.6)


def fronts(cells: Sequence[Mapping[str, Any]], noise: float) -> dict[str, list[bool]]:
    """For each cost which of some measured cells are on its front, budgets being met within ``TOLERANCE``.

    Qualities that differ by up to ``noise`` are alike.
    """
    qualities = [cell["quality"] for cell in cells]
    return {cost: front([cell[cost] for cell in cells], qualities, TOLERANCE, noise) for cost in COSTS}
