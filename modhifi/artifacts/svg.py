"""Figures of matplotlib as inline SVG whose ink follows the light or dark colours of the page around it."""

from __future__ import annotations

import io
from contextlib import AbstractContextManager

import matplotlib
from markupsafe import Markup
from matplotlib.figure import Figure

# Drawn with these, then replaced by what follows the page's light or dark colours.
INK, STRONG, FAINT = "#010203", "#010204", "#010205"
COLOURS = {INK: "currentColor", STRONG: "var(--accent)", FAINT: "var(--faint)"}


def style() -> AbstractContextManager[None]:
    """Inside, figures are made and drawn as SVG with text as text and the same bytes every time."""
    context: AbstractContextManager[None] = matplotlib.rc_context(
        {"svg.fonttype": "none", "svg.hashsalt": "modhifi", "font.size": 8.5}
    )
    return context


def inline(figure: Figure, label: str) -> Markup:
    """A figure, made inside :func:`style`, as an ``<svg>`` element that is announced as ``label``."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    for placeholder, colour in COLOURS.items():
        svg = svg.replace(placeholder, colour)
    # Escaped by matplotlib already.
    return Markup(svg.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1))
