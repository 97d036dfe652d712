"""One run as ``report.json`` and as one self-contained page, ``report.html``, which can be rendered from it again.

The schema, version 1; every part but ``title`` may be missing, which means that it was not measured:

* ``schema_version``, ``title``, ``task``, ``command`` (text; the command that repeats the run)
* ``model``, ``data``, ``settings``, ``errors``: names and values, one level of nesting allowed;
  ``summary``: a sentence; ``conditions``: what was timed on what, as a sentence
* ``before_after``: ``{name, before, after, unit, change?, ratio?, spread?}``; with the unit ``%`` values are shares in
  [0, 1], with ``s`` and ``B`` seconds and bytes; ``change`` is text and computed where it is missing, of times from
  the ``ratio`` of both, timed in turns, and the interquartile range of that ratio
  ``columns``: the keys of these rows that hold values, each with its heading, where there are others than ``before``
  and ``after``
* ``healing``: of a distillation, ``{steps, seconds, best, curve, …}``; the entries of ``curve`` are
  ``{step, seconds, loss, divergence, agreement}``
* ``groups``: ``{name, kind, n, kept, local_error, relative_error, amplification, share}``; ``kept`` is a number of
  components, ``local_error`` squared, ``relative_error`` its share of the readers' output energy, ``amplification`` the
  change of the network's output over the readers' own errors, ``share`` that change's share of the sum over all layers;
  ``fidelity``: ``{kept, removed}``, the 10 %, 50 % and 90 % quantiles of their components' best singleton fidelities
* ``comparison``: the cells of a grid of runs (:func:`modhifi.artifacts.pareto.pareto_charts`)
* ``tables``: ``{title, columns, rows, unit?, note?}``; a row is a name and a value for each further column, ``note``
  a sentence on them
* ``refused``: ``{name, reason}``; ``verdicts``: ``{name, verdict, text}``; ``warnings``: sentences
* ``outcome``: ``{tone, text, advice}``, see :mod:`modhifi.runs.reports.outcome`
* ``texts``: ``{beginning, before, after}``, what a language model writes
* ``timed``: of a budget of time, ``{operators, rest}``: the predicted seconds of every operator, before and after the
  edit, and of what no operator's width changes
* ``timing``: seconds by stage; ``contact_sheet``: a JPEG picture as a data URI (:func:`data_uri`)
"""

from __future__ import annotations

import base64
import io
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, Template
from markupsafe import Markup
from matplotlib.figure import Figure
from PIL import Image

from modhifi.artifacts.escape import one_line, printable
from modhifi.artifacts.formatting import BEHIND, asked, change, columns, number, plain, tone, unbroken
from modhifi.artifacts.learning_curve import learning_curve
from modhifi.artifacts.pareto import pareto_charts
from modhifi.artifacts.svg import FAINT, INK, STRONG, inline, style

# The share of a chart's width that a letter beside a bar takes.
LETTER = 0.029
LABELLED_ROWS = 80


# What a report's keys are called on a page, and those that its table of figures shows already.
LABELS = {
    "n": "held-out samples",
    "mean_squared_error": "squared change of the output, mean",
    "relative_error": "share of the output's energy",
    "kl": "KL divergence, nats",
    "total_variation": "total variation, mean",
}
SHOWN = {"agreement", "explained", "accuracy_before", "accuracy_after", "perplexity_before", "perplexity_after"}


def label(key: str) -> str:
    """A report's key in words."""
    return LABELS.get(key, key.replace("_", " "))


def render_html(report: Mapping[str, Any]) -> str:
    """The report as one HTML page without network or script, for screen, phone and paper, light and dark."""
    report = printable(report)
    groups = report.get("groups") or []
    rows = [{**row, "change": change(row)} for row in report.get("before_after") or []]
    charts = {
        "widths": _widths(groups),
        "fidelities": _fidelities(groups),
        "errors": _errors(groups),
        "times": _times(report.get("metered")),
        "learning": learning_curve(report.get("healing")),
    }
    comparison = report.get("comparison")
    verdicts = report.get("verdicts") or []
    page: str = _template().render(
        report=report,
        rows=rows,
        columns=columns(report),
        groups=groups,
        charts=charts,
        spent=any(group.get("amplification") is not None for group in groups),
        settings=_set(report.get("settings") or {}),
        errors=_set({key: v for key, v in (report.get("errors") or {}).items() if not (rows and key in SHOWN)}),
        fronts=pareto_charts(comparison) if comparison else [],
        verdicts=asked(verdicts),
        ladder=_ladder(verdicts),
    )
    return re.sub(r"(?<=\d) %", "\u00a0%", page)


@cache
def _template() -> Template:
    environment = Environment(
        loader=PackageLoader("modhifi.artifacts", "templates"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"number": number, "plain": plain, "tone": tone, "label": label, "unbroken": unbroken}
    return environment.get_template("report.html.j2")


def _set(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings or figures that hold a value."""
    values = {key: _set(value) if isinstance(value, Mapping) else value for key, value in settings.items()}
    return {key: value for key, value in values.items() if value is not None and value not in ({}, [])}


def _ladder(verdicts: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The verdicts behind the outcome; what is missing for one and the same reason makes one entry."""
    entries: list[Mapping[str, Any]] = []
    missing: dict[str, list[str]] = {}
    for verdict in verdicts:
        if verdict["verdict"] in ("not available", "not measured"):
            missing.setdefault(str(verdict.get("text") or ""), []).append(str(verdict["name"]))
        elif verdict["verdict"] in BEHIND:
            entries.append(verdict)
    return entries + [
        {"name": ", ".join(names), "verdict": "not available", "text": text} for text, names in missing.items()
    ]


def data_uri(image: Image.Image) -> str:
    """A picture as a JPEG data URI, small enough for a page."""
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "JPEG", quality=90)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


# -- charts ------------------------------------------------------------------------------------------------------------
def _widths(groups: Sequence[Mapping[str, Any]]) -> Markup | None:
    """The chart of the components that every group had and keeps."""
    drawn = [g for g in groups if g.get("n")]
    if not drawn:
        return None
    return _bars(
        [str(g["name"]) for g in drawn],
        [(FAINT, [1.0 for _ in drawn]), (STRONG, [g["kept"] / g["n"] for g in drawn])],
        [f"{g['kept']} of {g['n']}" for g in drawn],
        "share of components kept",
    )


def _errors(groups: Sequence[Mapping[str, Any]]) -> Markup | None:
    """The chart of the error that every group causes at its readers."""
    drawn = [g for g in groups if isinstance(g.get("relative_error"), int | float)]
    if not drawn:
        return None
    values = [float(g["relative_error"]) for g in drawn]
    texts = [f"{100 * v:.2g} %" for v in values]
    return _bars([str(g["name"]) for g in drawn], [(STRONG, values)], texts, "share of output energy lost")


def _times(metered: Mapping[str, Any] | None) -> Markup | None:
    """The chart of every operator's time, before and after the edit, beside the prediction where both are known."""
    if not metered or not metered.get("operators"):
        return None
    predicted, measured = metered["operators"], metered.get("by_operator")
    rows = measured or {**predicted, "the rest": [metered["rest"]] * 2}
    texts = []
    for name, (before, after) in rows.items():
        text = f"{number(before, 's')} to {number(after, 's')}" if after else f"{number(before, 's')}, gone"
        if measured and after:
            text += f" ({number(predicted[name][1], 's') if name in predicted else 'not'})"
        texts.append(text)
    return _bars(
        list(rows),
        [(FAINT, [before for before, _ in rows.values()]), (STRONG, [after for _, after in rows.values()])],
        texts,
        "seconds, before and after" + " (predicted)" * bool(measured),
    )


def _fidelities(groups: Sequence[Mapping[str, Any]]) -> Markup | None:
    """The chart of the components' best singleton fidelities in every group: those kept over those removed."""
    drawn = [g for g in groups if g.get("fidelity")]
    if not drawn:
        return None

    def draw(axes: Any) -> None:
        for row, group in enumerate(drawn):
            for side, colour, offset in (("kept", STRONG, -0.17), ("removed", INK, 0.17)):
                if side in group["fidelity"]:
                    low, middle, high = group["fidelity"][side]
                    axes.plot([low, high], [row + offset] * 2, color=colour, linewidth=1.6, solid_capstyle="butt")
                    axes.plot([middle], [row + offset], marker="o", markersize=3.2, color=colour, linewidth=0)
        axes.set_xlim(left=0)
        axes.tick_params(axis="x", labelsize=8)

    return _rows([str(g["name"]) for g in drawn], draw, "best fidelity alone, 10 % to 90 %")


def _bars(names: Sequence[str], layers: Sequence[tuple[str, list[float]]], texts: Sequence[str], label: str) -> Markup:
    """A chart of one horizontal bar a row, later layers over earlier ones."""
    top = max(max(values) for _, values in layers) or 1.0

    def draw(axes: Any) -> None:
        for colour, values in layers:
            axes.barh(range(len(names)), values, height=0.72, color=colour, linewidth=0)
        axes.set_xlim(0, top / (0.98 - min(0.75, LETTER * max(map(len, texts)))))
        for i in _labelled(len(names)):
            end = max(values[i] for _, values in layers)
            axes.text(end + 0.015 * top, i, texts[i], va="center", color=INK, fontsize=8)
        axes.set_xticks([])

    return _rows(names, draw, label)


def _labelled(n: int) -> range:
    """The rows that get a label: all of them while they are legible, else every k-th."""
    return range(0, n, math.ceil(n / LABELLED_ROWS))


def _rows(names: Sequence[str], draw: Callable[[Any], None], label: str) -> Markup:
    """A chart of named rows, from the top down, as inline SVG no wider than a phone."""
    n = len(names)
    height = 0.55 + (0.2 * n if n <= LABELLED_ROWS else 16.0)
    with style():
        figure = Figure(figsize=(3.8, height), layout="constrained")
        axes = figure.add_subplot()
        draw(axes)
        axes.set_ylim(n - 0.4, -0.6)
        labels = told_apart([one_line(name) for name in names])
        axes.set_yticks(_labelled(n), [labels[i] for i in _labelled(n)], parse_math=False)
        axes.set_xlabel(label, color=INK)
        axes.tick_params(colors=INK, length=0)
        for side in axes.spines.values():
            side.set_visible(False)
        return inline(figure, label)


def told_apart(names: Sequence[str], limit: int = 24) -> list[str]:
    """Names of modules without the modules that hold all of them, cut in the middle where they are still long."""
    common = os.path.commonprefix(list(names)).rpartition(".")
    shared, half = len(common[0] + common[1]) if len(names) > 1 else 0, (limit - 1) // 2
    short = [name[shared:] for name in names]
    return [name if len(name) <= limit else f"{name[:half]}…{name[-half:]}" for name in short]
