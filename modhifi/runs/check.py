"""The check of a model: its prunable groups, and the reasons for the refused ones."""

from __future__ import annotations

from typing import Any

from modhifi.models.loaded import LoadedModel
from modhifi.pruning.stages import find_structure
from modhifi.structure.families import says
from modhifi.structure.sizes import sizes_of


def check_model(loaded: LoadedModel) -> dict[str, Any]:
    """The prunable and the refused groups of a model, and the saving of half of each group, as JSON-able data."""
    structure = find_structure(loaded)
    sizes = sizes_of(loaded.model, structure)
    dense = {g.name: g.n for g in structure.prunable}
    touching = sizes.touching()
    groups = []
    for g in structure.prunable:
        touched = touching[g.name]
        halved = {**dense, g.name: max(g.step, g.n // 2 // g.step * g.step)}
        groups.append(
            {
                "name": g.name,
                "kind": g.label,
                "n": g.n,
                "step": g.step,
                "readers": [s.module for s in g.readers],
                "producers": [s.module for s in g.producers],
                "parameters_saved_by_half": touched.parameters(dense) - touched.parameters(halved),
                "macs_saved_by_half": touched.macs(dense) - touched.macs(halved),
            }
        )
    total = sizes.parameters(dense)
    refused = [{"name": g.name, "n": g.n, "reason": g.refused} for g in structure.refused]
    return {
        "model": loaded.source,
        "architecture": loaded.info["architecture"],
        "notes": list(loaded.info.get("notes", [])),
        "parameters": total,
        "groups": groups,
        "refused": refused,
        "prunable": bool(groups),
        "warnings": loaded.warnings,
        "not_stock": [
            kind
            for kind in ("neurons", "heads")
            if any(g.kind == kind for g in structure.prunable) and not says(loaded.model, kind)
        ],
    }
