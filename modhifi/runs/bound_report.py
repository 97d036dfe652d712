"""The bounds at the end of a run, as parts of its report."""

from __future__ import annotations

from typing import Any

from modhifi.artifacts.report import number
from modhifi.bounds.ladder import BoundReport
from modhifi.structure.groups import Structure

LAYERS_SHOWN = 20


def add_bounds(report: dict[str, Any], found: BoundReport) -> None:
    """Verdicts, bounds, warnings and the layers that spend the error, into a report."""
    content = found.to_json()
    report["verdicts"] = [*report.get("verdicts", []), *content["verdicts"]]
    report["bounds"] = content["bounds"]
    report["warnings"] = [*dict.fromkeys([*report.get("warnings", []), *found.warnings])]
    spent = sum(layer.change for layer in found.layers)
    if spent > 0:
        largest = sorted(found.layers, key=lambda layer: -layer.change)[:LAYERS_SHOWN]
        table = {
            "title": "Which layers spend the error",
            "columns": ["layer", "own error", "change of the output", "share", "amplification", "its global bound"],
            "rows": [
                [
                    layer.where,
                    layer.local,
                    layer.change,
                    number(layer.change / spent, "%"),
                    layer.amplification,
                    layer.constant,
                ]
                for layer in largest
            ],
        }
        report["tables"] = [*report.get("tables", []), table]


def add_groups(report: dict[str, Any], found: BoundReport, structure: Structure) -> None:
    """The measured amplification of each group's readers, and their share of the changes that all layers cause."""
    readers = {g.name: {s.module for s in g.readers} for g in structure.prunable}
    spent = sum(layer.change for layer in found.layers)
    for row in report["groups"]:
        layers = [s for s in found.layers if {n.rpartition(".")[0] for n in s.parameters} & readers[row["name"]]]
        local, change = sum(s.local for s in layers), sum(s.change for s in layers)
        row["amplification"] = change / local if local > 0 else None
        row["share"] = change / spent if spent > 0 and layers else None
