"""Summaries of runs for continuous integration: Markdown (GitHub's job summary) and JUnit XML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as XML

from modhifi.artifacts.formatting import change, number
from modhifi.disk import check_file

FAILED = ("FAIL", "INCONCLUSIVE", "BUG")
Report = Mapping[str, Any]


def check_summary(path: Path | None, out: str | Path | None = None) -> None:
    """Raises ModhifiError, before any work, for another ending than .md and .xml or a missing directory.

    ``out`` is the directory that the run writes.
    """
    check_file(path, "--summary", within=out, md="Markdown", xml="JUnit")


def write_summary(path: Path, reports: Sequence[tuple[str, Report]]) -> None:
    """Writes the reports, each with its name, as one Markdown or JUnit file; raises as :func:`check_summary`."""
    check_summary(path)
    path.write_text(junit(reports) if path.suffix == ".xml" else markdown(reports), encoding="utf-8")


def markdown(reports: Sequence[tuple[str, Report]]) -> str:
    """The reports as Markdown: a heading, the verdicts and the before/after table of each."""
    lines: list[str] = []
    for name, report in reports:
        lines += [f"### {_cell(name)}: {_cell(report.get('title', ''))}", ""]
        if report.get("verdicts"):
            lines += ["| verdict | | |", "|---|---|---|"]
            for v in report["verdicts"]:
                mark = "❌ " if v["verdict"] in FAILED else "✅ " if str(v["verdict"]).startswith("PASS") else ""
                lines.append(f"| {mark}{_cell(v['verdict'])} | {_cell(v['name'])} | {_cell(v.get('text') or '')} |")
            lines.append("")
        if report.get("before_after"):
            lines += ["| | before | after | change |", "|---|---|---|---|"]
            for row in report["before_after"]:
                unit = row.get("unit") or ""
                cells = (row["name"], number(row.get("before"), unit), number(row.get("after"), unit), change(row))
                lines.append("| " + " | ".join(map(_cell, cells)) + " |")
            lines.append("")
        lines += [f"- {_cell(text)}" for text in report.get("warnings") or []]
    return "\n".join(lines).rstrip() + "\n"


def junit(reports: Sequence[tuple[str, Report]]) -> str:
    """The reports as JUnit XML: a test suite each, a test case a verdict; a bug of ours is an error."""
    root = XML.Element("testsuites", name="modhifi")
    for name, report in reports:
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
            time=f"{seconds:.3f}",
        )
        for verdict, kind in zip(verdicts, kinds, strict=True):
            case = XML.SubElement(suite, "testcase", classname=f"modhifi.{name}", name=str(verdict["name"]))
            text = f"{verdict['verdict']}: {verdict.get('text') or ''}"
            if kind is not None:
                XML.SubElement(case, kind, message=text)
            else:
                XML.SubElement(case, "system-out").text = text
    XML.indent(root)
    return XML.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def _kind(verdict: str) -> str | None:
    return "error" if verdict == "BUG" else "failure" if verdict in FAILED else None


def _cell(value: Any) -> str:
    return " ".join(str(value).split()).replace("|", "\\|").replace("<", "&lt;")
