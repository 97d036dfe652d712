"""The check of a model: its prunable groups, the reasons for the refused ones, and both in a few lines."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from modhifi.calibration.sampling import Sampling
from modhifi.models.loaded import LoadedModel
from modhifi.models.stock import can_say
from modhifi.pruning.stages import find_structure
from modhifi.runs.defaults import amounts
from modhifi.runs.forecast import forecast
from modhifi.structure.groups import Group, Structure
from modhifi.structure.mixtures import mixtures
from modhifi.structure.refusals import folded, pattern
from modhifi.structure.sizes import Sizes, sizes_of

# Rows of a convolution's Gram for each of its columns, which is the default of images.
ROWS_PER_COLUMN = 2


def check_model(loaded: LoadedModel) -> dict[str, Any]:
    """The prunable and the refused groups of a model, and the saving of half of each group, as JSON-able data.

    ``supported`` has the parameters that go with all components of the prunable groups, by pattern of names as well,
    and under ``on_request`` those of blocks, sublayers and ranks, which go where they are asked for; ``folded`` the
    refusals that say the same; ``prediction`` what :func:`predict` says.
    """
    structure = find_structure(loaded, on_request=True)
    # Most attentions have no ranks: who asks for them is told why.
    known = tuple(g for g in structure.groups if g.refused is None or g.kind != "ranks")
    structure = replace(structure, groups=known)
    sizes = sizes_of(loaded.model, structure)
    dense = {g.name: g.n for g in structure.prunable}
    kinds = dict.fromkeys(g.kind for g in structure.prunable if g.kind != "channels" and not g.parts)
    stock: dict[str, bool] = {kind: can_say(loaded, structure, kind) for kind in kinds}
    touching = sizes.touching()
    groups = []
    for g in structure.prunable:
        touched = touching[g.name]
        halved = {**dense, g.name: max(g.least, g.n // 2 // g.step * g.step)}
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
    return {
        "model": loaded.source,
        "architecture": loaded.info["architecture"],
        "notes": list(loaded.info.get("notes", [])),
        "parameters": sizes.parameters(dense),
        "supported": _supported(structure, sizes),
        "groups": groups,
        "mixtures": [
            {"name": m.block, "experts": m.group.n, "chosen": m.chosen} for m in mixtures(loaded.model, structure)
        ],
        "refused": [{"name": g.name, "n": g.n, "reason": g.refused} for g in structure.refused],
        "folded": folded(structure.refused, loaded.model),
        "prunable": bool(groups),
        "warnings": loaded.warnings,
        "not_stock": [kind for kind, said in stock.items() if not said],
        "loads_with": _loads_with(loaded, structure, sizes, stock),
        "prediction": predict(loaded, structure) if groups else None,
    }


def predict(loaded: LoadedModel, structure: Structure) -> dict[str, float]:
    """What :func:`modhifi.runs.forecast.forecast` says of a pruning run with default settings."""
    usual = amounts(loaded, next(loaded.model.parameters()).device)
    return forecast(loaded, structure, usual, Sampling(None if usual.window else ROWS_PER_COLUMN, usual.batch_size))


def _supported(structure: Structure, sizes: Sizes) -> dict[str, Any]:
    dense = {g.name: g.n for g in structure.prunable}
    total = sizes.parameters(dense)

    def without(groups: Iterable[Group]) -> float:
        return total - sizes.parameters(dense | {g.name: 0 for g in groups})

    def rows(groups: Iterable[Group]) -> list[dict[str, Any]]:
        alike: dict[tuple[str, str], list[Group]] = {}
        for g in groups:
            alike.setdefault((pattern(g.name), g.label), []).append(g)
        return [
            {
                "pattern": name if len(members) > 1 else members[0].name,
                "kind": kind,
                "groups": len(members),
                "components": sorted({g.n for g in members}),
                "parameters": without(members),
            }
            for (name, kind), members in alike.items()
        ]

    widths = [g for g in structure.prunable if not g.on_request]
    parameters = without(widths)
    return {
        "parameters": parameters,
        "share": parameters / total if total else 0.0,
        "patterns": rows(widths),
        "on_request": rows(g for g in structure.prunable if g.on_request),
    }


def _loads_with(loaded: LoadedModel, structure: Structure, sizes: Sizes, said_by_stock: Mapping[str, bool]) -> str:
    """What loads the model after a cut of some kinds of components, in words."""
    if loaded.framework == "torch":
        return "modhifi.load, which is given the module that was pruned"
    kinds = dict.fromkeys(g.kind for g in structure.prunable if not g.on_request)
    stock = [kind for kind in kinds if said_by_stock.get(kind)]
    rest = [kind for kind in kinds if kind not in stock]
    dense = {g.name: g.n for g in structure.prunable}
    gone = [dense | {g.name: 0 for g in structure.prunable if g.kind in among} for among in (stock, list(kinds))]
    reach, all_of_it = (1 - sizes.parameters(widths) / sizes.parameters(dense) for widths in gone)
    cost = f" (there lie {100 * reach:.0f} % of the parameters, of {100 * all_of_it:.0f} % that can go)" if rest else ""
    said = f"stock {loaded.framework} with fewer {' and '.join(stock)}, as many in every block{cost}" if stock else ""
    own = f"modhifi.load alone with fewer {' and '.join(rest)}" if rest else ""
    return "; ".join(filter(None, (said, own)))
