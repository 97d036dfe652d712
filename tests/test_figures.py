"""Figures in the README and docs/ are those of the results files that their paragraph or section names."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "eval" / "results"
PAGES = ["README.md", *(str(path.relative_to(ROOT)) for path in sorted((ROOT / "docs").glob("*.md")))]
# A number with a decimal point, or a share in percent.
FIGURE = re.compile(r"(?<![\w.,])(\d[\d,]*\.\d+|\d[\d,]*(?= %))")
# Figures that no results file of their paragraph holds, and where they come from.
PAPER = "arXiv 2511.19566"
PUBLISHED = """94.99 91.02 4.07 93.50 91.80 2.39 93.37 93.49 93.17 93.76 85.8 35.6 14.4 86.27 90.75 90.39 76.1 76.70
    2.17 5.12 5.97 7.91 11.53 92.98 73.57 92.31""".split()
DENSE = "accuracy of the dense network, printed by eval/synthetic.py"
ELSEWHERE: dict[str, dict[str, str]] = {
    "docs/method.md": {"5": "how far a budget of time may be missed, a setting"},
    "docs/own-data.md": dict.fromkeys(("90.5", "90.1", "82.8", "87.2"), DENSE),
    "docs/reproduce.md": dict.fromkeys(PUBLISHED, PAPER),
}
# Figures that are computed from a results file: mean over the classes of which there is a network trained without them.
MEANS = {"docs/unlearning.md": {"77.9": "nearest_mean", "74.1": "relearn"}}


def numbers(content: Any) -> Iterator[float]:
    """Every number in a results file: values, those inside texts, and the changes from before to after."""
    if isinstance(content, dict):
        before, after = content.get("before"), content.get("after")
        if isinstance(before, int | float) and isinstance(after, int | float) and before:
            yield from (after / before, after / before - 1)
        if isinstance(content.get("ratio"), int | float):
            yield content["ratio"] - 1
        for key, value in content.items():
            yield from (*numbers(key), *numbers(value))
    elif isinstance(content, list):
        for value in content:
            yield from numbers(value)
    elif isinstance(content, str):
        yield from (float(text.replace(",", "").rstrip(".")) for text in re.findall(r"\d[\d,]*\.?\d*", content))
    elif isinstance(content, int | float) and not isinstance(content, bool):
        yield float(content)


# What a command printed, and what a page says of it.
SCREEN = re.compile(r"```\n\$ (modhifi.*?)\n```\n\n", flags=re.S)


def paragraphs(text: str) -> list[str]:
    """The paragraphs, list items and tables of a page.

    A table belongs to the paragraph before it, and what a command printed to the one behind it.
    """
    text = SCREEN.sub(lambda screen: re.sub(r"\n+", "\n", screen[1]) + "\n", text)
    blocks: list[str] = []
    for part in re.split(r"\n\s*\n|\n(?=\s*[*-] )", text):
        if blocks and part.lstrip().startswith("|"):
            blocks[-1] += "\n" + part
        else:
            blocks.append(part)
    return blocks


def unmeasured(paragraph: str) -> list[str]:
    """The figures of a paragraph that the results files it names do not hold."""
    names = [name for name in re.findall(r"(\w+)\.(?:md|json)\b", paragraph) if (RESULTS / f"{name}.json").is_file()]
    if not names:
        return []
    contents = [json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8")) for name in names]
    measured = {abs(value) for value in numbers(contents) if math.isfinite(value)}
    shares = {100 * value for value in measured} | {100 * (1 - value) for value in measured if value <= 1}
    units = {value / scale for value in measured for scale in (1e-3, 1e3, 1e6)}
    text = re.sub(r"`[^`]*`|\]\([^)]*\)|arXiv [\d.]+", "", paragraph)
    missing = []
    for figure in FIGURE.findall(text):
        value, digits = float(figure.replace(",", "")), len(figure.partition(".")[2])
        # Half a unit of the last digit, whichever way a half was rounded.
        if not any(abs(known - value) <= 0.5001 * 10**-digits for known in measured | shares | units):
            missing.append(figure)
    return missing


@pytest.mark.parametrize("page", PAGES)
def test_figures_are_those_of_the_results(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    found = [figure for paragraph in paragraphs(text) for figure in unmeasured(paragraph)]
    assert [figure for figure in found if figure not in {**ELSEWHERE, **MEANS}.get(page, ())] == []


def test_figures_of_three_classes_are_their_means() -> None:
    content = json.loads((RESULTS / "unlearn_resnet.json").read_text(encoding="utf-8"))
    classes = content["details"]["erase-writers (default: 3 blocks, 3 passes)"]
    for figure, name in MEANS["docs/unlearning.md"].items():
        assert f"{100 * sum(classes[c][name] for c in '036') / 3:.1f}" == figure


def test_a_figure_that_nobody_measured_is_found() -> None:
    assert unmeasured("top-1 falls to 88.01 % ([results](eval/results/demo.md))") == ["88.01"]
    assert unmeasured("top-1 falls to 88.00 % and 73.2 % go ([results](eval/results/demo.md))") == []


def test_a_figure_on_a_quoted_screen_is_looked_up() -> None:
    screen = "```\n$ modhifi demo\n top-1   90.40 %   88.01 %\n\nAt most 9.62 %\n```\n"
    page = f"{screen}\nAs [measured](eval/results/demo.md).\n"
    (paragraph,) = paragraphs(page)
    assert unmeasured(paragraph) == ["88.01"]
