"""A bench as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from modhifi.disk import WRITTEN
from modhifi.runs.timing.bench import BenchRow

BAR = 0.3  # inches


def draw(rows: Sequence[BenchRow], path: Path) -> None:
    """Writes a chart of the time of every model over its reference's: one panel a setting, interquartile ranges on it.

    The ending of ``path`` decides the format.
    """
    settings = list(dict.fromkeys((r.runtime, r.batch, r.threads) for r in rows if r.ratio is not None))
    models = list(dict.fromkeys(r.model for r in rows))
    figure = Figure(figsize=(7, 0.6 + len(settings) * (0.5 + BAR * len(models))), layout="constrained")
    panels = figure.subplots(max(1, len(settings)), 1, sharex=True, squeeze=False)[:, 0]
    for axes, setting in zip(panels, settings, strict=False):
        own = [r for r in rows if (r.runtime, r.batch, r.threads) == setting and r.ratio is not None]
        axes.barh([r.model for r in own], [r.ratio for r in own], xerr=[(r.ratio_iqr or 0) / 2 for r in own])
        axes.axvline(1.0, color="black", linewidth=0.8)
        axes.invert_yaxis()
        axes.set_title(f"{setting[0]}, batch {setting[1]}, {setting[2]} threads", fontsize=9, loc="left")
        axes.tick_params(labelsize=8)
    panels[-1].set_xlabel("time over the original's (median, interquartile range)", fontsize=9)
    # by which the file is known again, and replaced
    figure.savefig(path, dpi=150, metadata={"Software" if path.suffix == ".png" else "Creator": WRITTEN})
