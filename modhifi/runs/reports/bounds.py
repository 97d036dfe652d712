"""The bounds of a run as parts of its report."""

from __future__ import annotations

from typing import Any

from modhifi.artifacts.formatting import number
from modhifi.bounds.ladder import BoundReport
from modhifi.structure.groups import Structure

LAYERS_SHOWN = 20


def add_bounds(report: dict[str, Any], bounds: BoundReport) -> None:
    """Adds verdicts, bounds, warnings and the table of the most sensitive layers to a report, in place."""
    parts = bounds.to_json()
    report["verdicts"] = [*report.get("verdicts", []), *parts["verdicts"]]
    report["bounds"] = parts["bounds"]
    report["warnings"] = [*dict.fromkeys([*report.get("warnings", []), *bounds.warnings])]
    total = sum(layer.change for layer in bounds.layers)
    if total > 0:
        largest = sorted(bounds.layers, key=lambda layer: -layer.change)[:LAYERS_SHOWN]
        table = {
            "title": "Which layers spend the error",
            "columns": ["layer", "own error", "change of the output", "share", "amplification", "its global bound"],
            "rows": [
                [
                    layer.where,
                    layer.local,
                    layer.change,
                    number(layer.change / total, "%"),
                    layer.amplification,
                    layer.constant,
                ]
                for layer in largest
            ],
        }
        report["tables"] = [*report.get("tables", []), table]


def add_groups(report: dict[str, Any], bounds: BoundReport, structure: Structure) -> None:
    """Adds to each group of a report the amplification of its readers and their share of the whole change, in place."""
    readers = {g.name: {s.module for s in g.readers} for g in structure.prunable}
    total = sum(layer.change for layer in bounds.layers)
    for row in report["groups"]:
        layers = [s for s in bounds.layers if {n.rpartition(".")[0] for n in s.parameters} & readers[row["name"]]]
        local, change = sum(s.local for s in layers), sum(s.change for s in layers)
        row["amplification"] = change / local if local > 0 else None
        row["share"] = change / total if total > 0 and layers else None
