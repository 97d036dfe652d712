"""A whole pruning run, from recipe to artefact: read top to bottom."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from modhifi.artifacts.export import export as export_model
from modhifi.artifacts.exports import EXPORTS
from modhifi.artifacts.reload_check import reload_alike
from modhifi.artifacts.report import data_uri
from modhifi.artifacts.save import save_artifact
from modhifi.bounds.held_out import tabulate
from modhifi.bounds.ladder import BoundReport, verify_model
from modhifi.calibration.batchnorm import reestimate_batchnorm
from modhifi.calibration.cache import MomentCache
from modhifi.calibration.distributed import processes
from modhifi.calibration.gram_quality import gram_warnings
from modhifi.data.contact_sheet import contact_sheet
from modhifi.data.quality import look
from modhifi.data.samples import describe_data, warn_degenerate
from modhifi.disk import check_output
from modhifi.errors import ModhifiError
from modhifi.models.repeatable import unrepeatable
from modhifi.progress import Clock, Progress, silent
from modhifi.pruning.prune import contribute, prune_model
from modhifi.runs.bound_report import add_bounds, add_groups
from modhifi.runs.defaults import complete
from modhifi.runs.inputs import NOTHING, Given, load_data, load_source, place
from modhifi.runs.prune_report import before_after, describe, measure_run, measured, skipped
from modhifi.runs.recipe import BudgetChoice, PruneRecipe
from modhifi.structure.expand import expand
from modhifi.structure.plan import Plan


@dataclass(frozen=True)
class PruneResult:
    """``report`` is JSON-able; ``model``, ``path`` and ``bounds`` are None after a dry run.

    A tolerance that is not met raises nothing here: ``bounds.enforce()`` does.
    """

    report: dict[str, Any]
    plan: Plan
    model: nn.Module | None = None
    path: Path | None = None
    bounds: BoundReport | None = None


def run_prune(
    recipe: PruneRecipe,
    *,
    device: torch.device | str = "cpu",
    dry_run: bool = False,
    force: bool = False,
    given: Given = NOTHING,
    cache: MomentCache | None = None,
    progress: Progress = silent,
    command: str = "",
) -> PruneResult:
    """Run a pruning recipe. Writes nothing before everything is computed, and nothing at all with ``dry_run``.

    Where a launcher started several processes, all but the main one measure their share of the calibration data and
    return an empty report.
    """
    clock, team = Clock(progress, command), processes()
    progress = clock.inner
    device = device if team.device is None else team.device
    cache = None if recipe.offload else cache  # whose sums lie with the weights
    plan = None if recipe.plan is None else Plan({name: tuple(kept) for name, kept in recipe.plan.items()})
    budget = None if plan is not None or recipe.method.eta is not None else recipe.budget.parse()
    if recipe.method.eta is not None and recipe.budget != BudgetChoice():
        raise ModhifiError("--eta keeps HiFi sets, whatever their size, in place of a budget; give one of the two")
    out = None if dry_run or recipe.out is None else Path(recipe.out)
    if out is not None:
        check_output(out, force)
    for kind in recipe.export:
        EXPORTS[kind].check()
    with clock.stage("load"):
        loaded = given.model or load_source(recipe.model)
        place(loaded, device, recipe.offload)
        tolerances = recipe.checks.tolerances()
        tolerances.fit(loaded.kind)
        if budget is not None:
            budget.fit(loaded.kind)
        recipe, remarks = complete(recipe, loaded, device)
    with clock.stage("data"):
        calibration, held = load_data(recipe, loaded, given, progress)
        warnings = [*remarks, *warn_degenerate(calibration), *skipped(calibration)]
        if (unsteady := unrepeatable(loaded)) is not None:
            clock.note(f"warning: {unsteady}")  # before groups are refused for it
    with clock.stage("prune"):
        settings = recipe.settings()
        if not team.main:
            contribute(loaded, calibration, settings, plan, team)
            return PruneResult({}, plan or Plan({}))
        pruned = prune_model(
            loaded, calibration, budget, settings, plan=plan, progress=progress, cache=cache, team=team
        )
        if recipe.method.reestimate_batchnorm:
            reestimate_batchnorm(pruned.model, loaded, calibration, settings.batch_size)
        warnings += gram_warnings(pruned.grams, len(calibration))
    for warning in warnings:
        clock.note(f"warning: {warning}")
    if unsteady is not None:
        warnings = [unsteady, *warnings]
    report = describe(recipe, loaded, calibration, held, pruned, warnings, command)
    if team.count > 1:
        report["data"]["moments"] = f"moments were measured by {team.count} processes"
        clock.note(report["data"]["moments"])
    if cache is not None and cache.remark:
        report["data"]["moments"] = cache.remark
        clock.note(cache.remark)
    if dry_run:
        report["timing"] = clock.seconds
        return PruneResult(report, pruned.plan)
    with clock.stage("measure"):
        report["calibration"] = {
            **look(loaded, calibration, settings.batch_size),
            "grams": [vars(q) for q in pruned.grams],
        }
        table = tabulate(loaded, pruned.model, held, settings.batch_size)
        report |= measure_run(loaded, pruned.model, held, table, progress)
        report["before_after"] = before_after(report)
        report["verdicts"] = [measured(report)]
        if loaded.kind == "image":
            report["contact_sheet"] = data_uri(contact_sheet(calibration, loaded, n=48, tile=64))
    with clock.stage("bound"):
        twin = expand(pruned.model, loaded.model, pruned.structure, pruned.plan)
        walked = recipe.checks.walked
        bounds = verify_model(
            loaded, pruned.model, twin, held, tolerances, walked=walked, table=table, progress=progress
        )
        add_bounds(report, bounds)
        add_groups(report, bounds, pruned.structure)
    path = None
    if out is not None:
        with clock.stage("save"):
            report["timing"] = clock.seconds
            path = save_artifact(
                out,
                pruned.model,
                loaded,
                pruned.structure,
                pruned.plan,
                manifest={
                    "task": "prune",
                    "seed": recipe.seed,
                    "calibration": describe_data(calibration),
                    "held_out": describe_data(held),
                    "metrics": {k: report[k] for k in ("errors", "size") if k in report},
                    "verdicts": report["verdicts"],
                },
                recipe=recipe.model_dump(mode="json"),
                report=report,
                log=clock.log(),
                force=force,
            )
        with clock.stage("reload"):
            batch = reload_alike(path, loaded, pruned.model.cpu(), held)
        for kind in recipe.export:
            with clock.stage(f"export {kind}"):
                export_model(pruned.model, batch, path / f"model{EXPORTS[kind].suffix}", kind)
    report["timing"] = clock.seconds
    return PruneResult(report, pruned.plan, pruned.model, path, bounds)
