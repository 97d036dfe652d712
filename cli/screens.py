"""Reports on one screen, by task."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from modhifi.artifacts.formatting import asked, change, columns, number, tone

from .common import stdout_console

if TYPE_CHECKING:
    from rich.console import Console


TONES = {"good": "green", "weak": "yellow", "open": "yellow", "bad": "red"}


def show_report(report: dict[str, Any], path: Path | None, *, ladder: bool = False) -> None:
    """Prints a report of any task, and the path of the artefact; of a verification also its ``ladder`` of bounds."""
    if report["task"] == "prune":
        show_prune(report, path)
    elif report["task"] == "heal":
        show_heal(report, path)
    elif report["task"] == "verify":
        show_verified(report, ladder=ladder)
    elif report["task"] == "unlearn":
        show_unlearn(report, path)
    else:
        show_audit(report, path)


def show_briefly(report: dict[str, Any], path: Path | None, step: str | None = None) -> None:
    """Prints the outcome of a report, and where the artefact is; of several steps behind the name of this one."""
    console = stdout_console()
    if step is not None:
        console.print(f"{step}:", highlight=False)
    if report["task"] == "prune" and "outcome" not in report:
        show_prediction(console, report)
    else:
        show_outcome(console, report, advice=False)
    if path is not None:
        console.print(path, soft_wrap=True, markup=False, highlight=False)


def show_prune(report: dict[str, Any], path: Path | None) -> None:
    """Prints the report of a pruning run."""
    console = stdout_console()
    for warning in report["warnings"]:
        console.print(f"warning: {warning}", style="yellow", highlight=False)
    if report["data"].get("moments"):
        console.print(report["data"]["moments"], highlight=False)
    if "before_after" in report:
        show_figures(console, report)
        show_outcome(console, report)
    else:
        table = Table("group", "kind", "components", "kept", "predicted local error", title=report["title"])
        for g in report["groups"]:
            table.add_row(g["name"], g["kind"], str(g["n"]), str(g["kept"]), number(g["relative_error"]))
        console.print(table)
        show_prediction(console, report)
    unable = [row for row in report["folded"] if "on request" not in row["reason"]]
    if any("the model's output" not in row["reason"] for row in unable):
        count = f"{len(report['groups'])} groups can be pruned, {sum(row['groups'] for row in unable)} cannot"
        if "before_after" in report:
            console.print(f"{count}; `modhifi check` says why", highlight=False)
        else:
            console.print(count, highlight=False)
            show_refusals(console, unable)
    show_written(console, path)


def show_refusals(console: Console, folded: Iterable[Mapping[str, Any]]) -> None:
    """Prints a line for each reason why groups are refused."""
    for row in folded:
        names = row["names"][0] + (f" and {len(row['names']) - 1} more" if len(row["names"]) > 1 else "")
        line = f"  {row['groups']} group{'s' * (row['groups'] > 1)}: {row['reason']} ({names})"
        console.print(line, markup=False, highlight=False)


def show_heal(report: dict[str, Any], path: Path | None) -> None:
    """Prints the report of a healing run."""
    console = stdout_console()
    for warning in report["warnings"]:
        console.print(f"warning: {warning}", style="yellow", highlight=False)
    show_figures(console, report)
    console.print(report["summary"], highlight=False)
    show_outcome(console, report)
    show_written(console, path)


def show_figures(console: Console, report: dict[str, Any]) -> None:
    """Prints the figures before and after an edit."""
    shown = columns(report)
    table = Table("", *shown.values(), "change", title=report["title"])
    for row in report["before_after"]:
        table.add_row(row["name"], *(number(row[key], row["unit"]) for key in shown), change(row))
    console.print(table)


def show_prediction(console: Console, report: dict[str, Any]) -> None:
    """Prints the size that the plan of a dry run reaches."""
    reached = report["budget"]["reached"]
    console.print(
        f"predicted: {reached['macs']:.3f}x of the FLOPs, {reached['parameters']:.3f}x of the parameters, "
        f"{reached['components']:.3f}x of the components; nothing was written"
    )
    if "forecast" in report:
        console.print(f"the run itself takes {demand(report['forecast'])}", highlight=False)


def demand(forecast: dict[str, float]) -> str:
    """Minutes, memory and disk that a run takes, in words."""
    minutes = math.ceil(forecast["seconds"] / 60)
    duration = f"{minutes} minute{'s' * (minutes > 1)}" if minutes < 120 else f"{minutes / 60:.0f} hours"
    memory, disk = number(float(forecast["bytes"]), "B"), number(float(forecast["disk"]), "B")
    return f"about {duration}, {memory} of memory and {disk} of disk for its cache (an estimate from one small pass)"


def show_outcome(console: Console, report: dict[str, Any], *, advice: bool = True) -> None:
    """Prints what a run means in one sentence, the verdicts on what was asked for, and what to do next.

    Of a verdict the first sentence is printed; the report has the others.
    """
    outcome = report.get("outcome", {"text": "", "advice": []})
    if outcome["text"]:
        console.print(Text(outcome["text"], style=TONES[outcome["tone"]]))
    for verdict in asked(report["verdicts"]):
        style = TONES[tone(verdict["verdict"])]
        first = re.split(r"(?<=\.) (?=[A-Z])", verdict["text"] or "", maxsplit=1)[0]
        console.print(Text(verdict["verdict"], style=f"bold {style}"), f"({verdict['name']}): {first}")
    for sentence in outcome["advice"] if advice else ():
        console.print(f"→ {sentence}", highlight=False, markup=False)


def show_written(console: Console, path: Path | None) -> None:
    """Prints where the artefact is, and the line of Python that loads it."""
    # They import the libraries of models.
    from modhifi.artifacts.model_card import loading
    from modhifi.disk import MANIFEST
    from modhifi.models.manifest import read_manifest

    if path is None or not (path / MANIFEST).is_file():
        return
    console.print(f"model and report: {path}/report.html", soft_wrap=True, markup=False)
    model = read_manifest(path).model
    library, call = loading(model.framework, model.stock, str(path))
    console.print(f"load it: {library}; model = {call}", soft_wrap=True, markup=False, highlight=False)


def show_verified(report: dict[str, Any], *, ladder: bool) -> None:
    """Prints the outcome of a verification and, with ``ladder``, every rung and the most sensitive layers."""
    console = stdout_console()
    for warning in report["bounds"]["warnings"]:
        console.print(f"warning: {warning}", style="yellow", highlight=False)
    show_outcome(console, report)
    if ladder:
        _show_ladder(console, report)


def _show_ladder(console: Console, report: dict[str, Any]) -> None:
    title = f"how far the outputs of {report['model']['source']} moved"
    table = Table("", "verdict", "", title=title)
    for row in report["verdicts"]:
        table.add_row(row["name"], row["verdict"], row["text"])
    console.print(table)
    layers = sorted(report["bounds"]["layers"], key=lambda layer: -layer["change"])
    if layers:
        layer_table = Table("layer", "own error", "change of the output", "amplification", "its global bound")
        for layer in layers[:10]:
            figures = (layer[k] for k in ("local", "change", "amplification", "constant"))
            layer_table.add_row(layer["where"] or "(top level)", *(_figure(f) for f in figures))
        console.print(layer_table)


def _figure(value: Any) -> str:
    return "not available" if not isinstance(value, int | float) else f"{value:.3g}"


def show_unlearn(report: dict[str, Any], path: Path | None) -> None:
    """Prints the report of an unlearning run; the attacks beside their control are on its page."""
    console = stdout_console()
    for warning in report["warnings"]:
        console.print(f"note: {warning}", style="yellow", highlight=False)
    show_figures(console, report)
    _show_moved(console, report)
    show_outcome(console, report)
    show_written(console, path)


def show_audit(report: dict[str, Any], path: Path | None) -> None:
    """Prints the report of an audit: every attack, beside its control."""
    console = stdout_console()
    for warning in report["warnings"]:
        console.print(f"note: {warning}", style="yellow", highlight=False)
    first = report["tables"][0]
    table = Table(*first["columns"], title=report["title"])
    for name, *values in first["rows"]:
        table.add_row(name, *("not measured" if v is None else f"{100 * v:.1f} %" for v in values))
    console.print(table)
    _show_worst(console, next(t for t in report["tables"] if t["title"] == "Accuracy by class"), report)
    _show_moved(console, report)
    show_outcome(console, report)
    show_written(console, path)


def _show_worst(console: Console, table: dict[str, Any], report: dict[str, Any]) -> None:
    """Prints the retained class that lost most."""
    forgotten = report["audit"]["forgotten"]
    retained = [row for row in table["rows"] if row[0] not in forgotten]
    worst = min(retained, key=lambda row: row[2] - row[1])
    console.print(
        f"worst retained class: {worst[0]}, {100 * worst[1]:.1f} % before, {100 * worst[2]:.1f} % after",
        highlight=False,
    )


def _show_moved(console: Console, report: dict[str, Any]) -> None:
    """Prints where images of the forgotten classes go."""
    for moved in report["audit"]["moved"]:
        destinations = ", ".join(f"{name} {100 * share:.0f} %" for name, share in moved["to"].items())
        console.print(f"images of {moved['class']} are now called: {destinations}", highlight=False)
