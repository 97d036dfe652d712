"""`modhifi check`: is this model supported, what can go, what is refused and why."""

from __future__ import annotations

from typing import Any

from modhifi.errors import GateFailed

from .common import JsonOption, print_json, stdout_console
from .prune import (
    GgufOption,
    ModelArgOption,
    ModelArgument,
    RandomOption,
    RevisionOption,
    TrustOption,
    WeightsOption,
    model_source,
)


def check(
    model: ModelArgument,
    model_arg: ModelArgOption = None,
    weights: WeightsOption = None,
    revision: RevisionOption = None,
    random_weights: RandomOption = False,
    trust_remote_code: TrustOption = False,
    gguf_file: GgufOption = None,
    as_json: JsonOption = False,
) -> None:
    """Say what can be pruned of a model, and what not and why. Exit code 1 if nothing can."""
    from modhifi.runs.check import check_model
    from modhifi.runs.inputs import load_source
    from modhifi.runs.recipe import ModelSource

    source = model_source(model, model_arg, weights, revision, random_weights, trust_remote_code, gguf_file)
    found = check_model(load_source(ModelSource(**source)))
    if as_json:
        print_json(found)
    else:
        _show(found)
    if not found["prunable"]:
        raise GateFailed("nothing of this model can be pruned; the reasons are above")


def _show(found: dict[str, Any]) -> None:
    from rich.table import Table

    console = stdout_console()
    table = Table(
        "group",
        "kind",
        "components",
        "step",
        "readers",
        "parameters",
        "multiply-adds",
        title=f"{found['model']}: what half of each group would save, alone",
    )
    for g in found["groups"]:
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
    if found["refused"]:
        refused = Table("refused group", "components", "reason")
        for g in found["refused"]:
            refused.add_row(g["name"], str(g["n"]), g["reason"])
        console.print(refused)
    for kind in found["not_stock"]:
        console.print(f"fewer {kind}: no stock configuration says that; such an artefact loads with modhifi.load")
    console.print(f"{len(found['groups'])} groups can be pruned, {len(found['refused'])} cannot")
