"""Texts that others wrote stay texts: on cards, in summaries, in JUnit files and on pages."""

from __future__ import annotations

import io
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as XML

import pytest
import yaml
from markdown_it import MarkdownIt
from rich.console import Console

from modhifi.artifacts.escape import markdown_code, markdown_text, one_line, printable
from modhifi.artifacts.model_card import model_card
from modhifi.artifacts.report import render_html
from modhifi.artifacts.summary import junit, markdown, write_summary
from modhifi.cli import common
from modhifi.models.manifest import Manifest

PAYLOADS = {
    "script": "<script>alert(1)</script>",
    "handler": '<img src=x onerror="alert(1)">',
    "comment": "<!-- hidden",
    "end tags": "</td></tr></table></title></style></svg><h1>x",
    "attribute": "\" onmouseover='alert(1)' x=\"",
    "entity": "&lt;b&gt; &amp; &#x3c;",
    "cdata": "]]><evil/><![CDATA[",
    "heading": "# Certified by everyone",
    "headings": "x\n\n# Certified\n\nSetext\n======\n",
    "link": "[click](javascript:alert(1))",
    "image": "![x](https://example.org/pixel.png)",
    "autolink": "<javascript:alert(1)>",
    "reference": "[x]: javascript:alert(1)\n\n[x]",
    "code": "`a` ``b`` ``` c\n```\n~~~",
    "table": "a | b |\n|---|---|\n| PASS | c \\| d",
    "emphasis": "**PASS** _x_ ~~FAIL~~",
    "list": "1. a\n2. b\n- c\n+ d\n> e",
    "numbered": "12) a",
    "rule": "---",
    "front matter": "x\n---\nlicense: mit\n---\n",
    "yaml": '\'}": !!python/object/apply:os.system ["x"] # {a: &b [*b',
    "jinja": "{{ 7 * 7 }}{% raw %}",
    "mathematics": "$\\frac{$ \\(x\\)",
    "control characters": "a\x00b\x01c\x08d\x0be\x0cf\x1b[31mg\x7f\x9b31m",
    "lone surrogates": "a\ud800b\udfffc",
    "no characters": "a\ufffeb\uffff",
    "bidi marks": "a\u202eb\u2066c\u200fd\u061ce",
    "line separators": "a\r\nb\rc\u2028d\u2029e\x85f",
    "markup of the terminal": "[/bold] [red]x[/red] [link=file:///]y",
    "long": "x " * 2500,
    "nothing": "",
}
payloads = pytest.mark.parametrize("text", PAYLOADS.values(), ids=PAYLOADS)


def report_of(text: str) -> dict[str, Any]:
    group = {"n": 4, "kept": 2, "local_error": 0.1, "relative_error": 0.1, "fidelity": {"kept": [0.1, 0.2, 0.3]}}
    return {
        "title": text,
        "summary": text,
        "command": text,
        "model": {text: text, "b": {text: [text]}},
        "data": {"a": text},
        "settings": {"a": text},
        "errors": {text: 0.5},
        "before_after": [{"name": text, "before": text, "after": 1, "unit": text, "change": text}],
        "groups": [{"name": text, "kind": text, **group}],
        "tables": [{"title": text, "columns": [text, text], "rows": [[text, 1.0]]}],
        "refused": [{"name": text, "reason": text}],
        "verdicts": [{"name": text, "verdict": text, "text": text}, {"name": text, "verdict": "FAIL", "text": text}],
        "warnings": [text],
        "timing": {text: 1.0},
    }


def manifest_of(text: str) -> Manifest:
    return Manifest.model_validate(
        {
            "schema_version": 1,
            "task": text,
            "base": {"source": text, "repository": text, "revision": text, "licence": text},
            "model": {
                "framework": "transformers",
                "info": {"architecture": text},
                "differences": {"shapes": {}, "attributes": {}, "dtypes": {}},
                "stock": text,
                "remote": text,
            },
            "weights": {"files": {}},
        }
    )


def kinds(text: str) -> list[str]:
    """The kinds of elements in Markdown as GitHub and the hub read it, in their order."""
    tokens = MarkdownIt("gfm-like", {"linkify": False}).parse(text)
    return [t.type for token in tokens for t in (token, *(token.children or ())) if t.type != "text"]


ONCE = "x" * 8


@payloads
def test_a_card_has_the_elements_that_it_has_of_harmless_texts(text: str) -> None:
    def parts(content: str) -> tuple[str, str]:
        card = model_card(content, manifest_of(content), report_of(content))
        _, front, body = card.split("---\n", 2)
        card.encode()
        return front, body

    front, body = parts(text)
    metadata = yaml.safe_load(front)
    assert set(metadata) <= {"library_name", "pipeline_tag", "tags", "license", "license_name"}
    assert metadata.get("license") in (None, "other") and metadata["tags"] == ["modhifi", "edited", "transformers"]
    assert kinds(body) == kinds(parts(ONCE + " y")[1]) or not text
    assert "javascript" not in "".join(line for line in body.splitlines() if "](" in line and "\\](" not in line)


@payloads
def test_a_summary_has_the_elements_that_it_has_of_harmless_texts(text: str, tmp_path: Path) -> None:
    write_summary(tmp_path / "s.md", [(text, report_of(text))])
    written = (tmp_path / "s.md").read_text("utf-8")
    assert kinds(written) == kinds(markdown([(ONCE, report_of(ONCE))])) or not text
    assert kinds(markdown_text(text)) == (["paragraph_open", "inline", "paragraph_close"] if text else [])


@payloads
def test_a_text_is_read_as_it_was(text: str) -> None:
    renderer = MarkdownIt("gfm-like", {"linkify": False})
    for written in (markdown_text(text), f"Text: {markdown_code(text)}" if text else ""):
        read = "".join(t.content for token in renderer.parse(written) for t in token.children or ())
        assert read.removeprefix("Text: ") == one_line(text)


@payloads
def test_junit_is_xml_with_the_right_counts(text: str, tmp_path: Path) -> None:
    write_summary(tmp_path / "s.xml", [(text, report_of(text))])
    root = XML.parse(tmp_path / "s.xml").getroot()
    assert [e.tag for e in root.iter()] == ["testsuites", "testsuite", "testcase", "system-out", "testcase", "failure"]
    suite = root[0]
    assert [suite.get(k) for k in ("tests", "failures", "errors", "skipped")] == ["2", "1", "0", "0"]


class Tags(HTMLParser):
    """The tags of a page with the names of their attributes, and its addresses."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[Any] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, [key for key, _ in attrs]))

    def handle_endtag(self, tag: str) -> None:
        self.tags.append(tag)

    def handle_comment(self, data: str) -> None:
        self.tags.append("comment")


def tags(report: dict[str, Any]) -> list[Any]:
    page = render_html(report)
    assert printable(page).encode() == page.encode()
    return Tags(page).tags


@payloads
def test_a_page_has_the_tags_that_it_has_of_harmless_texts(text: str) -> None:
    assert tags(report_of(text) | {"groups": []}) == tags(report_of(ONCE) | {"groups": []}) or not text


def test_charts_have_the_tags_that_they_have_of_harmless_texts() -> None:
    def drawn(names: list[str]) -> list[Any]:
        groups = [report_of(name)["groups"][0] for name in names]
        return tags({"title": "x", "groups": groups})

    names = [text for text in PAYLOADS.values() if text]
    assert drawn(names) == drawn([ONCE * 4] * len(names))


@payloads
def test_a_terminal_shows_what_is_written(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    console = common.stdout_console()
    assert isinstance(console, Console)
    console.file = shown = io.StringIO()
    console.print(text, soft_wrap=True, highlight=False)
    lines = shown.getvalue()
    assert "".join(lines.split()) == "".join(one_line(text).split()) and "\x1b" not in lines


VERDICTS = {
    "PASS-CERTIFIED": None,
    "PASS-STATISTICAL": None,
    "PASS-ON-SAMPLES": None,
    "HOLDS": None,
    "INFORMATIVE": None,
    "VACUOUS": "skipped",
    "not available": "skipped",
    "FAIL": "failure",
    "INCONCLUSIVE": "failure",
    "BUG": "error",
}


def test_junit_skips_what_was_not_measured() -> None:
    verdicts = [{"name": f"rung {v}", "verdict": v, "text": f"because {v}"} for v in VERDICTS]
    suite = XML.fromstring(junit([("run", {"verdicts": verdicts, "timing": {"bound": 1.5}})]))[0]
    assert suite.attrib == {
        **{"name": "run", "time": "1.500", "tests": "10", "failures": "2", "errors": "1", "skipped": "2"}
    }
    for case, (verdict, kind) in zip(suite, VERDICTS.items(), strict=True):
        (child,) = case
        assert child.tag == (kind or "system-out")
        assert (child.get("message") or child.text) == f"{verdict}: because {verdict}"


def test_values_of_any_kind_are_made_printable() -> None:
    value = {"a\x00": ["\ud800", ("x\u202e", 1.5, None)]}
    assert json.dumps(printable(value), ensure_ascii=False) == '{"a\ufffd": ["\ufffd", ["x\ufffd", 1.5, null]]}'
