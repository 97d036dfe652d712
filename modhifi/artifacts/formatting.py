"""Values as people read them, on the screen, on a page and on a card."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from markupsafe import Markup, escape

from modhifi.artifacts.escape import markdown_text

NOT_MEASURED = "not measured"
PREFIXES = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
SMALL = ((1.0, ""), (1e-3, "m"), (1e-6, "µ"))


# The rungs of the ladder, the self-test and plain observations: for who wants to look behind the outcome.
BEHIND = ("INFORMATIVE", "VACUOUS", "not available", "not measured", "HOLDS", "MEASURED")


def asked(verdicts: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The verdicts on what the user asked for, and what went wrong; without those behind the outcome."""
    return [verdict for verdict in verdicts if verdict["verdict"] not in BEHIND]


def number(value: Any, unit: str = "") -> str:
    """A value as people read it: ``11.69 M``, ``91.3 %`` (of a share), ``12.3 ms``; None says ``not measured``."""
    if value is None:
        return NOT_MEASURED
    if isinstance(value, bool) or not isinstance(value, int | float):
        return f"{value} {unit}".strip()
    if not math.isfinite(value):
        return "infinite" if math.isinf(value) else NOT_MEASURED
    if unit == "%":
        return f"{100 * value:.2f} %"
    size = abs(value)
    if unit == "s" and 0 < size < 1:
        scale, prefix = next(((s, p) for s, p in SMALL if size >= s), SMALL[-1])
        return f"{value / scale:.3g} {prefix}{unit}"
    # counts of less than a million are read as they are
    if size >= (1e3 if unit == "B" else 1e6):
        scale, prefix = next((s, p) for s, p in PREFIXES if size >= s)
        if size / scale < 1e4:
            return f"{value / scale:.4g} {prefix}{unit}"
    text = f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
    return f"{text} {unit}".strip()


def plain(value: Any) -> str:
    """A setting or other given value, digits untouched."""
    if value is None:
        return "none"
    if isinstance(value, list | tuple):
        return ", ".join(plain(v) for v in value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value)


def unbroken(text: str) -> Markup:
    """A sentence for a page that breaks no option, such as ``--flops 0.75x``, between its words."""
    option = re.compile(r"(?<![\w-])--[a-z][\w-]*(?: (?:\d|[A-Z])[\w.]*)?")
    return Markup(option.sub(r'<code class="option">\g<0></code>', str(escape(text))))


def columns(report: Mapping[str, Any]) -> dict[str, str]:
    """The keys of the values in a report's rows before and after an edit, each with the heading of its column."""
    return dict(report.get("columns") or {"before": "before", "after": "after"})


def noisy(ratio: float, spread: float) -> bool:
    """Whether a ratio of two times is no further from 1 than it spreads."""
    return abs(ratio - 1) <= spread


def change(row: Mapping[str, Any]) -> str:
    """The change of a before/after row: in points for shares, in percent for other numbers, empty if it has none.

    A row of times has their ``ratio``, with its ``spread``: the change is that of the ratio, where the spread lets it.
    """
    if row.get("change") is not None:
        return str(row["change"])
    if row.get("ratio") is not None and row.get("spread") is not None:
        ratio, spread = row["ratio"], row["spread"]
        if noisy(ratio, spread):
            return f"too noisy to say ({ratio:.2f} ± {spread:.2f} x)"
        return f"{100 * (ratio - 1):+.1f} ± {100 * spread:.1f} %".replace("-", "−")
    before, after = row.get("before"), row.get("after")
    if not isinstance(before, int | float) or not isinstance(after, int | float) or not math.isfinite(before + after):
        return ""
    if row.get("unit") == "%":
        text = f"{100 * (after - before):+.2f} points"
    else:
        text = f"{100 * (after / before - 1):+.1f} %" if before else ""
    return text.replace("-", "−")


def figures_table(report: Mapping[str, Any]) -> list[str]:
    """The figures before and after an edit as the lines of a Markdown table."""
    shown = columns(report)
    lines = ["| | " + " | ".join([*shown.values(), "change"]) + " |", "|---|" + "---|" * (len(shown) + 1)]
    for row in report["before_after"]:
        unit = row.get("unit") or ""
        cells = [row["name"], *(number(row.get(key), unit) for key in shown), change(row)]
        lines.append("| " + " | ".join(map(markdown_text, cells)) + " |")
    return lines


def tone(verdict: str) -> str:
    """The colour of a verdict: good, bad or open."""
    word = str(verdict).upper()
    return "good" if word.startswith(("PASS", "HOLDS")) else "bad" if word.startswith(("FAIL", "LEAK")) else "open"
