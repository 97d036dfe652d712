"""`modhifi check`: is this model supported, what can go, what is refused and why."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any

import typer
from rich.table import Table

from modhifi.artifacts.formatting import number
from modhifi.errors import GateFailed
from modhifi.runs.check import check_model
from modhifi.runs.inputs import load_source

from .common import JsonOption, imported_for_good, print_json, print_warnings, stdout_console, wide_table
from .options import Loading, takes
from .screens import demand, show_refusals


@takes(Loading, files=False)
def check(
    chosen: Loading,
    as_json: JsonOption = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Print every group by itself.", rich_help_panel="Output")
    ] = False,
) -> None:
    """Say what can be pruned of a model, and what not and why. Exit code 1 if nothing can."""
    with imported_for_good():
        loaded = load_source(chosen.model)
    report = check_model(loaded)
    print_warnings(report["warnings"])
    if as_json:
        print_json(report)
    else:
        _show(report, verbose)
    if not report["prunable"]:
        raise GateFailed("nothing of this model can be pruned; the reasons are above")


def _show(report: dict[str, Any], verbose: bool) -> None:
    console = stdout_console()
    for note in report["notes"]:
        console.print(f"note: {note}", style="yellow", highlight=False)
    supported, prediction = report["supported"], report["prediction"]
    print_line = partial(console.print, highlight=False)
    print_line(f"loaded as {report['architecture']}")
    total = number(round(report["parameters"]))
    print_line(f"{supported['share']:.0%} of its {total} parameters lie in groups that can be cut")
    if report["prunable"]:
        table = Table("groups", "kind", "number", "components", "parameters", title=report["model"])
        for row in (*supported["patterns"], *supported["on_request"]):
            least, *_, most = row["components"] * 2
            components = f"{least:,}" if least == most else f"{least:,} to {most:,}"
            table.add_row(row["pattern"], row["kind"], str(row["groups"]), components, number(round(row["parameters"])))
        console.print(table)
        print_line(f"a prune with default settings takes {demand(prediction)}")
        if report["loads_with"]:
            print_line(f"loads afterwards with {report['loads_with']}")
        if kinds := dict.fromkeys(row["kind"] for row in supported["on_request"]):
            print_line(f"{' and '.join(kinds)} go where --only {' or --only '.join(kinds)} asks for them")
    if report["mixtures"]:
        sizes = " or ".join(str(size) for size in sorted({m["experts"] for m in report["mixtures"]}))
        print_line(f"{len(report['mixtures'])} mixtures of {sizes} experts: --experts 0.75x removes whole ones")
    for title, rows, on_request in (
        ("groups can be pruned", supported["patterns"], False),
        ("groups go on request", supported["on_request"], True),
    ):
        refusals = [row for row in report["folded"] if row["on_request"] == on_request]
        if rows or refusals:
            print_line(f"{sum(row['groups'] for row in rows)} {title}, {sum(row['groups'] for row in refusals)} cannot")
            show_refusals(console, refusals)
    if verbose:
        _show_groups(report)
    else:
        print_line("each group by name: modhifi check -v")


def _show_groups(report: dict[str, Any]) -> None:
    console = stdout_console()
    table = wide_table(
        "group",
        "kind",
        "components",
        "step",
        "readers",
        "parameters",
        "multiply-adds",
        words=("group", "kind", "readers"),
        title=f"{report['model']}: what half of each group would save, alone",
    )
    for g in report["groups"]:
        first, *others = g["readers"] or [""]
        readers = first + (f" and {len(others)} more" if others else "")
        table.add_row(
            g["name"],
            g["kind"],
            str(g["n"]),
            str(g["step"]),
            readers,
            f"{g['parameters_saved_by_half']:,.0f}",
            f"{g['macs_saved_by_half']:,.0f}",
        )
    console.print(table)
    if report["refused"]:
        refused = Table("refused group", "components", "reason")
        for g in report["refused"]:
            refused.add_row(g["name"], str(g["n"]), g["reason"])
        console.print(refused)
