"""The learning curve of a distillation: agreement with the original, or the distance to it, by step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup
from matplotlib.figure import Figure

from modhifi.artifacts.svg import INK, STRONG, inline, style


def learning_curve(healing: Mapping[str, Any] | None) -> Markup | None:
    """The chart of a report's ``healing``, the entry that was taken marked; None without a curve."""
    curve = (healing or {}).get("curve") or []
    if healing is None or len(curve) < 2:
        return None
    shares = all(entry.get("agreement") is not None for entry in curve)
    label = "agreement with the original, %" if shares else "distance to the original"
    values = [100 * entry["agreement"] if shares else entry["divergence"] for entry in curve]
    steps = [entry["step"] for entry in curve]
    with style():
        figure = Figure(figsize=(4.0, 2.4), layout="constrained")
        axes = figure.add_subplot()
        axes.plot(steps, values, color=STRONG, linewidth=1.4, marker="o", markersize=3)
        best = steps.index(healing["best"])
        axes.plot(steps[best], values[best], color=INK, linewidth=0, marker="o", markersize=6, fillstyle="none")
        axes.set_xlabel("step; the circle marks the weights that were taken", color=INK)
        axes.set_ylabel(label, color=INK)
        axes.tick_params(colors=INK, length=2)
        for side in axes.spines.values():
            side.set_color(INK)
            side.set_linewidth(0.6)
        return inline(figure, label)
