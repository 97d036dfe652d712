"""`modhifi diff`: what differs between two runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .common import JsonOption, print_json, stdout_console

RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="An artefact's directory, or a report.json.")]


def diff(first: RunArgument, second: RunArgument, as_json: JsonOption = False) -> None:
    """Compare two artefacts or reports: figures, kept widths, settings, verdicts, and whether the weights are equal."""
    from modhifi.artifacts.diff import diff_runs

    differences = diff_runs(first, second)
    if as_json:
        print_json(differences)
    else:
        _show(differences)


def _show(differences: dict[str, Any]) -> None:
    from rich.table import Table

    from modhifi.artifacts.formatting import number, plain

    console = stdout_console()
    if differences["figures"]:
        table = Table("after the edit", "first", "second", "change")
        for row in differences["figures"]:
            table.add_row(row["name"], *(number(row[k], row["unit"]) for k in ("first", "second")), row["change"])
        console.print(table)
    if differences["held_out"]:
        first, second = differences["held_out"]
        console.print(f"the figures are of other held-out data: {first}, and {second}")
    if differences["widths"]:
        table = Table("group", "kept by the first", "by the second", "by one alone")
        for row in differences["widths"]:
            table.add_row(row["name"], *(plain(row[k]) for k in ("first", "second", "moved")))
        console.print(table)
    for title, key in (("setting", "settings"), ("verdict on", "verdicts")):
        if differences[key]:
            table = Table(title, "first", "second")
            for row in differences[key]:
                table.add_row(row["name"], plain(row["first"]), plain(row["second"]))
            console.print(table)
    sentences = {True: "the weights are the same", False: "the weights differ", None: "weights: not compared"}
    console.print(sentences[differences["same_weights"]])
