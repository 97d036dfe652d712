"""Subset Fidelity in four pictures, as one page or one image.

Histograms of singleton fidelity, Subset Fidelity against k, the share of HiFi sets by depth, and how alike the
components of one layer are.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import matplotlib
import numpy as np
from jinja2 import Environment, PackageLoader
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize, PowerNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from modhifi.artifacts.svg import INK, inline, style
from modhifi.disk import WRITTEN

Scores = Sequence[Mapping[str, Any]]
"""One entry a layer, from the input to the output, as `modhifi score --json` prints them: ``group``, ``kind``,
``singleton``, ``subset_fidelity``, ``hifi_share``."""

Draw = Callable[[Any, Any, str], None]
"""Draws what it is given on axes, with an ink."""

BINS = 25
# Its last colours cannot be seen on white, so its end lies beyond the last layer.
DEPTH = matplotlib.colormaps["viridis"]
LIGHTEST = 1.12
# Of the lines of HiFi shares; legible on white and on black.
LINES = ("#3b8ede", "#d9820b", "#2e9e5b", "#c2559d")
# Of the kinds of components.
STYLES: tuple[Literal["-", ":", "--", "-."], ...] = ("-", ":", "--", "-.")
MOST_NAMES = 20
CAPTIONS = {
    "histograms": "How many components of a layer have which singleton fidelity: what a component alone gives back of "
    "an output channel, at the channel where that is most.",
    "curves": "Subset Fidelity of the components that go last, by their share of the layer: what they give back of "
    "the layer's output energy after least squares. One line a layer.",
    "shares": "The share of each layer's components that its HiFi set of fidelity η takes.",
    "similarity": "Cosine between the contributions of any two components, over all output channels.",
}


def write_pictures(path: Path, title: str, scores: Scores, layer: str, similarity: np.ndarray) -> None:
    """Writes the pictures as one self-contained page (``.html``) or as one image (``.png``).

    ``similarity`` ``(n, n)`` in [-1, 1] is that of the components of ``layer``.
    """
    drawn: dict[str, tuple[Draw, Any]] = {
        "histograms": (histograms, scores),
        "curves": (curves, scores),
        "shares": (shares, scores),
        "similarity": (similarities, similarity),
    }
    titles = {
        "histograms": "Histograms of singleton fidelity",
        "curves": "Subset Fidelity against k",
        "shares": "HiFi share by depth",
        "similarity": f"Similarity of the components of {layer}",
    }
    if path.suffix == ".png":
        figure = Figure(figsize=(13, 10), layout="constrained")
        figure.suptitle(title)
        for axes, (name, (draw, content)) in zip(figure.subplots(2, 2).flat, drawn.items(), strict=True):
            draw(axes, content, "black")
            axes.set_title(titles[name], fontsize=11)
        figure.savefig(path, dpi=110, metadata={"Software": WRITTEN})
        return
    charts = [
        {"title": titles[name], "caption": CAPTIONS[name], "svg": _alone(draw, content, titles[name])}
        for name, (draw, content) in drawn.items()
    ]
    environment = Environment(
        loader=PackageLoader("modhifi.artifacts", "templates"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    page = environment.get_template("pictures.html.j2").render(title=title, charts=charts)
    path.write_text(page, encoding="utf-8")


def _alone(draw: Draw, content: Any, label: str) -> str:
    """One picture as inline SVG no wider than a page's text."""
    with style():
        figure = Figure(figsize=(4.1, 3.4), layout="constrained")
        draw(figure.add_subplot(), content, INK)
        return inline(figure, label)


def histograms(axes: Any, scores: Scores, ink: str) -> None:
    """Draws one row a layer: the share of its components in each of ``BINS`` equal bins of singleton fidelity.

    Layers of one kind of component stand together, so that names of every k-th row leave no kind out.
    """
    kinds = list(dict.fromkeys(entry["kind"] for entry in scores))
    scores = sorted(scores, key=lambda entry: kinds.index(entry["kind"]))
    counts = np.stack([np.histogram(s["singleton"], BINS, (0, 1))[0] / len(s["singleton"]) for s in scores])
    image = axes.imshow(
        counts, cmap="cividis", norm=PowerNorm(0.4, 0, 1), aspect="auto", extent=(0, 1, len(scores) - 0.5, -0.5)
    )
    _name_layers(axes, scores)
    _finish(axes, ink, "best fidelity of a component alone", None)
    _colour_bar(axes, image, ink, "share of the layer's components")


def curves(axes: Any, scores: Scores, ink: str) -> None:
    """Draws Subset Fidelity against the share of components kept, one line a layer, dark first, light last.

    Kinds of components are told apart by the style of the line.
    """
    kinds = list(dict.fromkeys(entry["kind"] for entry in scores))
    depth = Normalize(1, max(2, LIGHTEST * len(scores)))
    for number, entry in enumerate(scores):
        values = np.array(entry["subset_fidelity"], dtype=float)
        style = STYLES[kinds.index(entry["kind"]) % len(STYLES)]
        shares_kept = np.linspace(0, 1, len(values))
        axes.plot(shares_kept, values, color=DEPTH(depth(number + 1)), linewidth=1.2, linestyle=style)
    for eta in scores[0]["hifi_share"]:
        axes.axhline(float(eta), color=ink, linewidth=0.5, linestyle=":")
        axes.text(1, float(eta), f"η = {eta}", color=ink, fontsize=8, ha="right", va="bottom")
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1.02)
    _finish(axes, ink, "share of components kept, k / n", "Subset Fidelity")
    if len(kinds) > 1:
        keys = [
            Line2D([], [], color=ink, linestyle=STYLES[i % len(STYLES)], label=kind) for i, kind in enumerate(kinds)
        ]
        axes.legend(handles=keys, frameon=False, labelcolor=ink, fontsize=8, loc="lower right")
    bar = _colour_bar(axes, ScalarMappable(depth, DEPTH), ink, "layer, from input to output")
    bar.ax.set_ylim(1, max(2, len(scores)))


def shares(axes: Any, scores: Scores, ink: str) -> None:
    """Draws the HiFi share of every layer, from the input to the output: one line for each η and kind of component."""
    kinds = list(dict.fromkeys(entry["kind"] for entry in scores))
    for number, kind in enumerate(kinds):
        places = [place for place, entry in enumerate(scores) if entry["kind"] == kind]
        for colour, eta in zip(LINES, scores[0]["hifi_share"], strict=False):
            axes.plot(
                [place + 1 for place in places],
                [scores[place]["hifi_share"][eta] for place in places],
                marker="o",
                markersize=2.5,
                linewidth=1.2,
                color=colour,
                linestyle=STYLES[number % len(STYLES)],
                label=f"η = {eta}" + (f", {kind}" if len(kinds) > 1 else ""),
            )
    axes.set_ylim(0, 1.02)
    axes.legend(frameon=False, labelcolor=ink, fontsize=8)
    _finish(axes, ink, "layer, from input to output", "share of components in the HiFi set")


def similarities(axes: Any, similarity: np.ndarray, ink: str) -> None:
    """Draws the matrix of similarities, red for alike and blue for opposite, as strong as the strongest of two."""
    others = np.abs(similarity[~np.eye(len(similarity), dtype=bool)])
    most = float(others.max()) if others.any() else 1.0
    image = axes.imshow(similarity, cmap="RdBu_r", vmin=-most, vmax=most, interpolation="nearest")
    for axis in (axes.xaxis, axes.yaxis):
        axis.get_major_locator().set_params(integer=True)
    _finish(axes, ink, "component", "component")
    _colour_bar(axes, image, ink, "cosine (1 on the diagonal)")


def _name_layers(axes: Any, scores: Scores) -> None:
    """Names the rows, or every k-th of many, without the modules that all layers lie in."""
    step = -(-len(scores) // MOST_NAMES)
    names = [str(s["group"]) for s in scores]
    shared = os.path.commonprefix(names).rpartition(".")[0]
    texts = [name.removeprefix(f"{shared}.") for name in names[::step]]
    axes.set_yticks(range(0, len(scores), step), texts, fontsize=7, parse_math=False)


def _finish(axes: Any, ink: str, across: str, up: str | None) -> None:
    axes.set_xlabel(across, color=ink)
    if up is not None:
        axes.set_ylabel(up, color=ink)
    axes.tick_params(colors=ink, length=2)
    for side in axes.spines.values():
        side.set_color(ink)
        side.set_linewidth(0.6)


def _colour_bar(axes: Any, mappable: Any, ink: str, label: str) -> Any:
    bar = axes.figure.colorbar(mappable, ax=axes, shrink=0.8)
    bar.set_label(label, color=ink)
    bar.ax.tick_params(colors=ink, length=2)
    bar.outline.set_visible(False)
    return bar
