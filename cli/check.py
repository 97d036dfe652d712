"""`modhifi check`: is this model supported, what can go, what is refused and why."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from modhifi.errors import GateFailed
from modhifi.runs.check import check_model
from modhifi.runs.inputs import load_source

from .common import JsonOption, imported_for_good, print_json, print_warnings, stdout_console
from .options import Loading, takes


@takes(Loading, files=False)
def check(chosen: Loading, as_json: JsonOption = False) -> None:
    """Say what can be pruned of a model, and what not and why. Exit code 1 if nothing can."""
    with imported_for_good():
        loaded = load_source(chosen.model)
    report = check_model(loaded)
    print_warnings(report["warnings"])
    if as_json:
        print_json(report)
    else:
        _show(report)
    if not report["prunable"]:
        raise GateFailed("nothing of this model can be pruned; the reasons are above")


def _show(report: dict[str, Any]) -> None:
    console = stdout_console()
    console.print(f"loaded as {report['architecture']}", highlight=False)
    for note in report["notes"]:
        console.print(f"note: {note}", style="yellow", highlight=False)
    table = Table(
        "group",
        "kind",
        "components",
        "step",
        "readers",
        "parameters",
        "multiply-adds",
        title=f"{report['model']}: what half of each group would save, alone",
    )
    for g in report["groups"]:
        readers = g["readers"][0] + (f" and {len(g['readers']) - 1} more" if len(g["readers"]) > 1 else "")
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
    for kind in report["not_stock"]:
        console.print(f"fewer {kind}: no stock configuration says that; such an artefact loads with modhifi.load")
    console.print(f"{len(report['groups'])} groups can be pruned, {len(report['refused'])} cannot")
