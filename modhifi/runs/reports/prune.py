"""The parts of a pruning run's report: the edit, and the figures before and after it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from modhifi.artifacts.formatting import noisy
from modhifi.data.samples import Samples
from modhifi.models.loaded import LoadedModel
from modhifi.pruning.metered_plan import widths_of
from modhifi.pruning.stages import Pruned
from modhifi.runs.recipes.prune import PruneRecipe
from modhifi.runs.reports.head import head
from modhifi.structure.depth import inside
from modhifi.structure.refusals import folded, left_behind
from modhifi.structure.sizes import sizes_of

# The difference of two shares of the KV cache below which they count as equal.
STEP = 0.005
WORDS = {"latency": "time", "memory": "memory"}
# The quantiles of the components' fidelities that the report shows for each group.
QUANTILES = (0.1, 0.5, 0.9)
# How many layers a sentence names.
NAMED = 3


def skipped_warnings(*parts: Samples) -> list[str]:
    """The warning that unreadable items were skipped, with the first ten of them; empty if there were none.

    What one source left out stands in all parts of it, and counts once.
    """
    skipped = [*dict.fromkeys(item for samples in parts for item in samples.skipped)]
    if not skipped:
        return []
    names = "; ".join(f"{name} ({reason})" for name, reason in skipped[:10])
    more = f"; and {len(skipped) - 10} more" if len(skipped) > 10 else ""
    return [f"{len(skipped)} unreadable item{'s were' if len(skipped) > 1 else ' was'} skipped: {names}{more}"]


def report_of(
    recipe: PruneRecipe,
    original: LoadedModel,
    calibration: Samples,
    held: Samples,
    pruned: Pruned,
    warnings: list[str],
    command: str,
) -> dict[str, Any]:
    """The report of a pruning run before anything is measured, JSON-able; see :mod:`modhifi.artifacts.report`."""
    structure, plan = pruned.structure, pruned.plan
    sizes = sizes_of(original.model, structure).of(plan)
    widths = {g.name: len(plan.kept.get(g.name, range(g.n))) for g in structure.prunable}
    dense = {g.name: g.n for g in structure.prunable}
    by_reader = {e.reader: e for e in pruned.errors}
    groups = []
    for g in structure.prunable:
        names = [g.name] if g.kind == "experts" else [s.module for s in g.readers]
        errors = [by_reader[name] for name in names if name in by_reader] if g.name in plan.kept else []
        errors += [error for error in pruned.errors if inside(error.reader, g.parts)]
        error, energy = sum(e.error for e in errors), sum(e.energy for e in errors)
        unknown = g.name in plan.kept and not errors
        groups.append(
            {
                "name": g.name,
                "kind": g.label,
                "n": g.n,
                "kept": widths[g.name],
                "local_error": None if unknown else error,
                "relative_error": None if unknown else error / energy if energy > 0 else 0.0,
                "amplification": None,
                "fidelity": _distribution(pruned.fidelity.get(g.name), plan.mask(g)),
            }
        )
    reached = {
        "components": sizes.components(widths) / sizes.components(dense),
        "parameters": sizes.parameters(widths) / sizes.parameters(dense),
        "macs": sizes.macs(widths) / sizes.macs(dense),
    }
    if pruned.metered is not None:
        reached[pruned.metered.measure] = pruned.metered.taken.measured
    if structure.uncounted:
        left_out = ", ".join(structure.uncounted)
        warnings = [*warnings, f"FLOPs leave out {left_out}, whose work no formula tells"]
    if original.kind == "text" and sizes.cache(dense):
        reached["cache"] = sizes.cache(widths) / sizes.cache(dense)
        asked = recipe.budget.kv_cache
        if asked is not None and abs(reached["cache"] - recipe.budget.parse().keep) > STEP:
            remark = (
                f"{reached['cache']:.3g}x of the KV cache stays: whole KV groups go, and {asked} is between two steps"
            )
            warnings = [*warnings, remark]
    return {
        **head("prune", original.source, framework=original.framework, **plain_info(original.info)),
        "data": {
            "calibration": calibration.description,
            "held_out": held.description,
            "calibration_samples": len(calibration),
            "held_out_samples": len(held),
        },
        "settings": recipe.model_dump(mode="json"),
        "budget": {**recipe.budget.model_dump(), "reached": reached},
        "groups": groups,
        "plans_tried": dict(pruned.tried),
        "metered": None if pruned.metered is None else asdict(pruned.metered),
        "refused": [{"name": g.name, "n": g.n, "reason": g.refused} for g in structure.refused],
        "folded": folded(structure.refused, original.model),
        "warnings": warnings,
        "command": command,
    }


def _distribution(fidelity: Tensor | None, kept: Tensor) -> dict[str, list[float]] | None:
    """The quantiles of the components' best singleton fidelities, of the kept and of the removed ones."""
    if fidelity is None:
        return None
    points = torch.tensor(QUANTILES, dtype=fidelity.dtype)
    sides = {"kept": fidelity[kept], "removed": fidelity[~kept]}
    return {name: values.quantile(points).tolist() for name, values in sides.items() if len(values)}


def plain_info(info: Mapping[str, Any]) -> dict[str, Any]:
    """The facts of a loaded model that a report shows."""
    return {k: info.get(k) for k in ("architecture", "revision", "licence", "notes") if info.get(k)}


def measured_verdict(report: dict[str, Any]) -> dict[str, str]:
    """The verdict that states the measured errors: an observation on these samples, not a bound."""
    errors = report["errors"]
    local = "local errors were not measured"
    if all(g["relative_error"] is not None for g in report["groups"]):
        worst = max(report["groups"], key=lambda g: g["relative_error"])
        local = (
            f"the largest local error is {worst['relative_error']:.3g} of the energy, at the readers of {worst['name']}"
        )
    moved = "the outputs could only be counted"
    if "relative_error" in errors:
        divergence = f" (mean KL {errors['kl']:.3g} nats)" if "kl" in errors else ""
        moved = f"the output moved by {errors['relative_error']:.3g} of its energy{divergence}"
    return {
        "name": "local and global errors",
        "verdict": "MEASURED",
        "text": f"on {errors['n']} held-out samples {moved}; {local}; measured, not bounded",
    }


def rounding_verdict(report: dict[str, Any], pruned: Pruned) -> list[dict[str, str]]:
    """The verdict on rounded widths: what they cost by the plan's own prediction, and what they gain in time."""
    if pruned.rounded is None:
        return []
    after, exact = report["latency"]["after"], report["latency"]["exact"]
    cost = ""
    if pruned.rounded.predicted is not None and pruned.rounded.predicted_exact is not None:
        cost = (
            f"predicted change of the output {pruned.rounded.predicted:.3g}, "
            f"with exact widths {pruned.rounded.predicted_exact:.3g}; "
        )
    return [
        {
            "name": "rounded widths",
            "verdict": "MEASURED",
            "text": f"{cost}time of one sample {after['ratio']:.2f} ± {after['ratio_iqr']:.2f} x the original's, "
            f"with exact widths {exact['ratio']:.2f} ± {exact['ratio_iqr']:.2f} x",
        }
    ]


def idle_warnings(original: LoadedModel, pruned: Pruned) -> list[str]:
    """A sentence where layers that the example does not run may read what was cut."""
    idle = left_behind(original.model, pruned.model, pruned.structure)
    if not idle:
        return []
    names = ", ".join(idle[:NAMED]) + (f" and {len(idle) - NAMED} others" if len(idle) > NAMED else "")
    return [
        f"the example does not run {names}: if they read what was cut, they fail now; from Python, give an example= "
        "that runs them, or name the groups to leave alone (exclude)"
    ]


def metered_warnings(pruned: Pruned) -> list[str]:
    """The warnings that a time or memory asked for was not met, or that a time was too noisy to say."""
    metered, warnings = pruned.metered, []
    if metered is None:
        return []
    if not metered.met:
        warnings.append(
            f"{metered.keep:.3g}x of the {WORDS[metered.measure]} was asked for and {metered.taken.measured:.3g}x was "
            f"reached, the nearest of {len(metered.attempts)} plans that were measured"
        )
    if noisy(metered.taken.measured, metered.taken.spread):
        warnings.append(too_busy(metered.taken.measured, metered.taken.spread))
    return warnings


def too_busy(measured: float, spread: float) -> str:
    """The sentence on a ratio of times within its spread of 1."""
    return (
        f"the machine is too busy to say whether the model got faster: {measured:.2f} ± {spread:.2f}x; "
        "time it again on a quiet one, with `modhifi bench`"
    )


def metered_verdict(original: LoadedModel, pruned: Pruned) -> list[dict[str, str]]:
    """The verdict on a budget of time or memory: predicted, measured, and what limits it; empty without one."""
    metered = pruned.metered
    if metered is None:
        return []
    taken, spread = metered.taken, f" ± {metered.taken.spread:.3f}" if metered.taken.spread else ""
    text = (
        f"{metered.keep:.3g}x of the {WORDS[metered.measure]} asked for, {taken.measured:.3f}{spread}x measured, "
        f"{taken.predicted:.3f}x predicted, {len(metered.attempts)} measured in all"
    )
    text += _limits(original, pruned)
    return [{"name": f"{WORDS[metered.measure]} of a pass", "verdict": "MEASURED", "text": text}]


def _limits(original: LoadedModel, pruned: Pruned) -> str:
    """Where the time that is left goes, where every operator was timed inside both networks."""
    assert pruned.metered is not None
    seconds = pruned.metered.by_operator
    total = sum(after for _, after in seconds.values())
    if not total:
        return ""
    sizes = sizes_of(original.model, pruned.structure)
    kept = {t.module: sizes.share(t, widths_of(pruned.plan)) for t in sizes.terms if t.module in seconds}
    whole, slow = 0.0, 0.0
    for name, share in kept.items():
        before, after = seconds[name]
        if share == 1:
            whole += after
        elif before and 1 - after / before < (1 - share) / 2:
            slow += after
    return (
        f"; of the time left, {100 * whole / total:.0f} % is spent in layers that keep their widths, "
        f"{100 * slow / total:.0f} % in layers that got faster by less than half of what they lost in multiply-adds "
        "(memory and launches)"
    )
