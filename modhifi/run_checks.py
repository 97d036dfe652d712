"""The bounds at the end of a run, as parts of its report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from .data import Samples
from .groups import Structure
from .ladder_units import forgetting
from .load import LoadedModel
from .report import number
from .verify import BoundReport

LAYERS_SHOWN = 20


def add_bounds(report: dict[str, Any], found: BoundReport) -> None:
    """Verdicts, bounds, warnings and the layers that spend the error, into a report."""
    content = found.to_json()
    report["verdicts"] = [*report.get("verdicts", []), *content["verdicts"]]
    report["bounds"] = content["bounds"]
    report["warnings"] = [*report.get("warnings", []), *found.warnings]
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


def add_forgetting(
    report: dict[str, Any],
    loaded: LoadedModel,
    edited: nn.Module,
    forgotten: Samples,
    classes: Sequence[int],
    alpha: float,
    batch_size: int,
) -> None:
    """How often, at least, the forgotten classes are no longer predicted on held-out samples of them, into a report.

    INFORMATIVE where that is more often than the original missed them, at most.
    """
    found = {}
    device = next(edited.parameters()).device
    for name, model in (("original", loaded.model), ("edited", edited)):
        with torch.inference_mode():
            top = [loaded.logits(b.to(device), model).argmax(1).cpu() for b in forgotten.batches(batch_size)]
        found[name] = forgetting(torch.cat(top), torch.tensor(classes), alpha)
    after, before = found["edited"], found["original"]
    report["verdicts"].append(
        {
            "name": "forgotten classes no longer predicted",
            "verdict": "INFORMATIVE" if after.lower > before.upper else "VACUOUS",
            "text": f"for at least {100 * after.lower:.3g} % of their images (Clopper-Pearson, {after.n} held-out "
            f"images, {100 * (1 - alpha):.4g} % confidence); measured {100 * after.measured:.3g} %, "
            f"{100 * before.measured:.3g} % before the edit; no proof that anything was erased",
        }
    )
    report["bounds"]["forgetting"] = {name: vars(value) for name, value in found.items()}
