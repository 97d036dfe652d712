from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from modhifi.artifacts.formatting import change, number, plain
from modhifi.artifacts.report import data_uri, render_html, told_apart, tone
from modhifi.disk import jsonable

REPORT = {
    "schema_version": 1,
    "title": "resnet18 pruned to half its FLOPs",
    "task": "prune",
    "summary": "48 of 96 components removed by obs, compensated by least squares.",
    "model": {"source": "timm:resnet18", "revision": None, "input": {"size": [3, 32, 32]}},
    "data": {"description": "images:calibration, 500 images, seed 0"},
    "settings": {"flops": "0.5x", "compensate": "lstsq"},
    "before_after": [
        {"name": "Accuracy", "before": 0.913, "after": 0.9, "unit": "%"},
        {"name": "Parameters", "before": 11_689_512, "after": 5_844_756, "unit": ""},
        {"name": "Latency", "before": 0.0123, "after": None, "unit": "s"},
    ],
    "groups": [
        {
            "name": f"layer{i}.0.conv1",
            "kind": "channels",
            "n": 16,
            "kept": 4 + i,
            "local_error": 0.1 * i,
            "relative_error": 0.01 * i,
            "amplification": None,
            "fidelity": {"kept": [0.1, 0.2, 0.5], "removed": [0, 0.1, 0.2]},
        }
        for i in range(1, 5)
    ],
    "refused": [{"name": "conv1", "reason": "a <softmax> runs across these channels"}],
    "errors": {"relative error": 0.0123, "held out": {"agreement": 0.97, "kl": None}},
    "verdicts": [
        {"name": "tolerance on flips", "verdict": "PASS-STATISTICAL", "text": "flip rate at most 2.9 % (95 %)"},
        {"name": "R1", "verdict": "VACUOUS", "text": None},
        {"name": "tolerance on error", "verdict": "FAIL", "text": "above 1 %"},
    ],
    "warnings": ["3 images could not be read: a.png, b.png, c.png"],
    "command": "modhifi prune timm:resnet18 --flops 0.5x --out out",
    "timing": {"collect": 1.5, "plan": 0.02},
}


class Page(HTMLParser):
    """Collects the text, and checks that tags are balanced and nothing comes from elsewhere."""

    void = {"meta", "img", "br", "link", "input"}

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""
        self.sources: list[str] = []

    def handle_starttag(self, tag, attrs):
        if tag not in self.void:
            self.open.append(tag)
        self.sources += [v for k, v in attrs if k in ("src", "href", "xlink:href") and v and not v.startswith("#")]

    def handle_startendtag(self, tag, attrs):
        self.sources += [v for k, v in attrs if k in ("src", "href", "xlink:href") and v and not v.startswith("#")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data.replace("\u00a0", " ")


def parse(html: str) -> Page:
    page = Page()
    page.feed(html)
    assert page.open == []
    return page


def test_page_holds_every_part_and_needs_nothing_else():
    image = Image.fromarray(np.zeros((8, 8, 3), dtype=np.uint8))
    html = render_html(json.loads(json.dumps(REPORT | {"contact_sheet": data_uri(image)})))
    page = parse(html)
    for words in (
        REPORT["title"],
        "91.30 %",
        "−1.30 points",
        "11.69 M",
        "−50.0 %",
        "12.3 ms",
        "not measured",
        "layer3.0.conv1",
        "7 of 16",
        "PASS-STATISTICAL",
        "VACUOUS",
        "a <softmax> runs",
        "3 images could not be read",
        "held out: agreement",
        REPORT["command"],
        "1.5 s",
        "20 ms",
        "3, 32, 32",
    ):
        assert words in page.text, words
    assert [s[:23] for s in page.sources] == ["data:image/jpeg;base64,"]
    assert "@import" not in html and not re.search(r"url\((?!#)", html) and "<script" not in html
    assert html.count("<svg") == 3 and "#010203" not in html and "currentColor" in html
    assert '<div class="verdict good"><b>PASS-STATISTICAL' in html and '<div class="verdict bad"><b>FAIL' in html


def test_missing_parts_are_left_out_or_called_not_measured():
    page = parse(render_html({"title": "nothing but a title"}))
    assert "Before and after" in page.text and "not measured" in page.text
    for heading in ("Verdicts", "Warnings", "Width kept", "Time", "Do it again"):
        assert heading not in page.text


def test_markup_in_values_is_escaped():
    groups = [{"name": "<b>&", "kind": "channels", "n": 4, "kept": 2}]
    html = render_html(
        {"title": "<script>alert(1)</script>", "groups": groups, "contact_sheet": "http://elsewhere/a.png"}
    )
    assert "<script>" not in html and "elsewhere" not in html and "<b>&" not in html
    assert "<b>&" in parse(html).text


def test_hundreds_of_groups_stay_one_readable_chart():
    groups = [{"name": f"stages.{i}.blocks.{i}.a.very.long.module.name", "n": 8, "kept": i % 9} for i in range(300)]
    html = render_html({"title": "many", "groups": groups})
    assert 60 <= html.count(" of 8<") <= 100
    parse(html)


def test_rungs_of_the_ladder_stand_apart_from_verdicts():
    report = REPORT | {"outcome": {"tone": "weak", "text": "At most 9.7 % flip.", "advice": ["more <samples>"]}}
    html = render_html(report)
    text = parse(html).text
    places = [text.index(words) for words in ("Before and after", "At most 9.7 %", "tolerance on error", "VACUOUS")]
    assert places == sorted(places) and '<div class="verdict outcome weak">' in html
    folded = text[text.index("can have moved") :]
    assert "VACUOUS" in folded and "PASS-STATISTICAL" not in folded
    assert "more <samples>" in text and "more <samples>" not in html


def test_bounds_missing_for_one_reason_make_one_entry():
    missing = [{"name": n, "verdict": "not available", "text": "no sample was walked"} for n in ("R1", "R2", "R4")]
    text = parse(render_html({"title": "t", "verdicts": missing})).text
    assert text.count("no sample was walked") == 1 and "R1, R2, R4" in text


def test_the_same_report_gives_the_same_page():
    assert render_html(REPORT) == render_html(REPORT)


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (None, "%", "not measured"),
        (0.913, "%", "91.30 %"),
        (0.0123, "s", "12.3 ms"),
        (2e-5, "s", "20 µs"),
        (3, "s", "3 s"),
        (0.0, "s", "0 s"),
        (0, "B", "0 B"),
        (46_800_000, "B", "46.8 MB"),
        (1_817_000_000, "FLOP", "1.817 GFLOP"),
        (11_689_512, "", "11.69 M"),
        (11_690, "", "11,690"),
        (0.012346, "", "0.01235"),
        (math.nan, "", "not measured"),
        (math.inf, "", "infinite"),
        (1e38, "", "1e+38"),
        ("Infinity", "", "Infinity"),
    ],
)
def test_numbers(value, unit, text):
    assert number(value, unit) == text


def test_changes():
    assert change({"before": 100, "after": 50}) == "−50.0 %"
    assert change({"before": 0.5, "after": 0.75, "unit": "%"}) == "+25.00 points"
    assert change({"before": 0, "after": 5}) == "" and change({"before": None, "after": 5}) == ""
    assert change({"before": 1, "after": 2, "change": "twice"}) == "twice"


def test_jsonable_survives_strict_json():
    value = {"a": (1, 2.5), "nan": math.nan, "inf": -math.inf, "t": torch.tensor([1, 2]), "n": np.float32(0.5), 3: {1}}
    expected = {"a": [1, 2.5], "nan": None, "inf": "-Infinity", "t": [1, 2], "n": 0.5, "p": "x", "3": [1]}
    value["p"] = Path("x")
    assert json.loads(json.dumps(jsonable(value), allow_nan=False)) == expected


def test_words():
    assert (plain(None), plain([1, 2]), plain(True)) == ("none", "1, 2", "yes")
    assert [tone(v) for v in ("PASS-ON-SAMPLES", "FAIL", "INCONCLUSIVE", "VACUOUS")] == ["good", "bad", "open", "open"]


def test_a_budget_of_time_is_drawn_by_layer() -> None:
    timed = {"operators": {"layer1.conv": [2e-3, 1e-3]}, "rest": 5e-4}
    page = render_html({"title": "t", "metered": timed})
    assert "Time by layer" in page and "2 ms to 1 ms" in page and "the rest" in page
    assert "Time by layer" not in render_html({"title": "t", "metered": None})
    page = render_html({"title": "t", "metered": {**timed, "by_operator": {"layer1.conv": [3e-3, 2e-3]}}})
    assert "3 ms to 2 ms (1 ms)" in page and "the rest" not in page


def test_an_option_in_a_sentence_is_not_broken_between_lines() -> None:
    advice = "fell by 9 <points>: try --flops 0.7x or more samples (--samples 1000), or well--known"
    page = render_html({**REPORT, "outcome": {"tone": "weak", "text": "so", "advice": [advice]}})
    assert re.findall(r'<code class="option">(.*?)</code>', page)[:2] == ["--flops 0.7x", "--samples 1000"]
    assert "&lt;points&gt;" in page


def test_settings_without_a_value_are_left_out() -> None:
    page = render_html({**REPORT, "settings": {"out": None, "method": {"only": [], "strict": False, "eta": None}}})
    assert "method: strict" in page
    assert "method: only" not in page and "method: eta" not in page and "<dt>out" not in page


def test_names_are_told_apart_where_they_differ() -> None:
    blocks = [f"model.layers.{n}.mlp.gate_proj" for n in (0, 1, 10)]
    assert told_apart(blocks) == ["0.mlp.gate_proj", "1.mlp.gate_proj", "10.mlp.gate_proj"]
    assert told_apart(["layer1", "layer1.0"]) == ["layer1", "layer1.0"]
    assert told_apart(["a" * 30]) == ["a" * 11 + "…" + "a" * 11]
