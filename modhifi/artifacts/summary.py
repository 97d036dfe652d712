"""Summaries of runs for continuous integration: Markdown (GitHub's job summary) and JUnit XML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as XML

from modhifi.artifacts.escape import markdown_text, printable
from modhifi.artifacts.formatting import asked, figures_table
from modhifi.disk import check_ending, check_file

FAILED = ("FAIL", "INCONCLUSIVE", "BUG")
# What says nothing of the edit: it was not looked at, or a constant predictor has the same bound.
UNMEASURED = ("not measured", "not available", "VACUOUS")
FORMATS = {"md": "Markdown", "xml": "JUnit"}
Report = Mapping[str, Any]


def check_summary(path: Path | None, out: str | Path | None = None) -> None:
    """Raises ModhifiError, before any work, where :func:`modhifi.disk.check_file` does, and for other endings.

    ``out`` is the directory that the run writes.
    """
    check_file(path, "--summary", within=out, **FORMATS)


def write_summary(path: Path, reports: Sequence[tuple[str, Report]]) -> None:
    """Writes the reports, each with its name, as one Markdown or JUnit file; raises ModhifiError for another ending."""
    check_ending(path, "--summary", **FORMATS)
    path.write_text(junit(reports) if path.suffix == ".xml" else markdown(reports), encoding="utf-8")


def markdown(reports: Sequence[tuple[str, Report]]) -> str:
    """The reports as Markdown: a heading, the outcome, the verdicts on what was asked for and the figures of each."""
    lines: list[str] = []
    for title, report in reports:
        lines += [f"### {markdown_text(title)}: {markdown_text(report.get('title', ''))}", ""]
        if (outcome := report.get("outcome") or {}).get("text"):
            lines += [f"**{markdown_text(outcome['text'])}**", ""]
        if verdicts := asked(report.get("verdicts") or []):
            lines += ["| verdict | on | |", "|---|---|---|"]
            for v in sorted(verdicts, key=lambda v: v["verdict"] not in FAILED):
                mark = "❌ " if v["verdict"] in FAILED else "✅ " if str(v["verdict"]).startswith("PASS") else ""
                verdict, name, text = map(markdown_text, (v["verdict"], v["name"], v.get("text") or ""))
                lines.append(f"| {mark}{verdict} | {name} | {text} |")
            lines.append("")
        if report.get("before_after"):
            lines += [*figures_table(report), ""]
        lines += [f"- {markdown_text(text)}" for text in report.get("warnings") or []]
    return "\n".join(lines).rstrip() + "\n"


def junit(reports: Sequence[tuple[str, Report]]) -> str:
    """The reports as JUnit XML: a test suite each, a test case a verdict (failed, an error, skipped or passed)."""
    root = XML.Element("testsuites", name="modhifi")
    for name, report in printable(list(reports)):
        verdicts = report.get("verdicts") or []
        seconds = sum((report.get("timing") or {}).values())
        kinds = [_kind(v["verdict"]) for v in verdicts]
        suite = XML.SubElement(
            root,
            "testsuite",
            name=name,
            tests=str(len(verdicts)),
            failures=str(kinds.count("failure")),
            errors=str(kinds.count("error")),
            skipped=str(kinds.count("skipped")),
            time=f"{seconds:.3f}",
        )
        for verdict, kind in zip(verdicts, kinds, strict=True):
            case = XML.SubElement(suite, "testcase", classname=f"modhifi.{name}", name=str(verdict["name"]))
            word, text = str(verdict["verdict"]), str(verdict.get("text") or "")
            text = text if text.startswith(word) else f"{word}: {text}"
            if kind is not None:
                XML.SubElement(case, kind, message=text)
            else:
                XML.SubElement(case, "system-out").text = text
    XML.indent(root)
    return XML.tostring(root, encoding="utf-8", xml_declaration=True).decode() + "\n"


def _kind(verdict: str) -> str | None:
    """What JUnit calls it; None for what passed."""
    if verdict == "BUG":
        return "error"
    if verdict in FAILED:
        return "failure"
    return "skipped" if verdict in UNMEASURED else None
