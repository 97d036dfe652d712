"""A pruning run, from recipe to artefact."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from modhifi.artifacts.export import export as export_model
from modhifi.artifacts.export import require_export
from modhifi.artifacts.exports import EXPORTS
from modhifi.artifacts.reload_check import FreshProcess, check_reload
from modhifi.artifacts.save import save_artifact
from modhifi.bounds.held_out import HeldOut, tabulate
from modhifi.bounds.ladder import BoundReport, verify_model
from modhifi.calibration.cache import MomentCache
from modhifi.calibration.distributed import Processes, processes
from modhifi.calibration.gram_quality import gram_warnings
from modhifi.data.quality import look
from modhifi.data.samples import Samples, describe_data, warn_degenerate
from modhifi.disk import check_output, check_space
from modhifi.errors import ModhifiError
from modhifi.models.loaded import LoadedModel
from modhifi.models.trial import unrepeatable
from modhifi.progress import Clock, Progress, silent
from modhifi.pruning.budget import Budget
from modhifi.pruning.expert_removal import prune_experts
from modhifi.pruning.prune import block_by_block, contribute, prune_model
from modhifi.pruning.settings import PruneSettings
from modhifi.pruning.stages import Pruned
from modhifi.runs.defaults import Amounts, complete, rounding_for
from modhifi.runs.forecast import forecast
from modhifi.runs.inputs import (
    NOTHING,
    Given,
    load_data,
    load_source,
    local_paths,
    located,
    place,
    seen_before,
    shortage,
)
from modhifi.runs.measure import stored_bytes
from modhifi.runs.meters import meter_of
from modhifi.runs.recalibrate import reestimate_if_closer
from modhifi.runs.recipes.budgets import BudgetChoice
from modhifi.runs.recipes.prune import PruneRecipe
from modhifi.runs.reports.bounds import add_bounds, add_groups
from modhifi.runs.reports.continuations import continuations
from modhifi.runs.reports.entries import count_entries
from modhifi.runs.reports.measurements import before_after, measure_run, summary
from modhifi.runs.reports.outcome import add_outcome, prune_advice, without_bounds
from modhifi.runs.reports.pictures import seen_samples
from modhifi.runs.reports.prune import (
    idle_warnings,
    measured_verdict,
    metered_verdict,
    metered_warnings,
    report_of,
    rounding_verdict,
    skipped_warnings,
)
from modhifi.runs.steady_memory import steady_memory
from modhifi.structure.clone import clone
from modhifi.structure.expand import expand
from modhifi.structure.plan import Plan
from modhifi.structure.surgery import shrink


@dataclass(frozen=True)
class PruneResult:
    """The outcome of a pruning run; ``report`` is JSON-able.

    ``model``, ``path`` and ``bounds`` are None after a dry run, ``path`` also where nothing was to be written. Nothing
    is raised for a tolerance that is not met: ``bounds.enforce()`` raises it.
    """

    report: dict[str, Any]
    plan: Plan
    model: nn.Module | None = None
    path: Path | None = None
    bounds: BoundReport | None = None


@steady_memory()
def run_prune(
    recipe: PruneRecipe,
    *,
    device: torch.device | str = "cpu",
    dry_run: bool = False,
    force: bool = False,
    reads: Sequence[Path] = (),
    given: Given = NOTHING,
    cache: MomentCache | None = None,
    progress: Progress = silent,
    command: str = "",
) -> PruneResult:
    """Runs a pruning recipe: load, prune, measure, bound, save, reload, export.

    Nothing is written before everything is computed, and nothing at all with ``dry_run``. ``given`` takes the place of
    what the recipe names, ``force`` replaces an earlier output, ``command`` goes into the report. Where a launcher
    started several processes, all but the main one measure their share of the calibration data and return an empty
    report. ``reads`` are files beside those that the recipe names which ``force`` must not replace. Raises ModhifiError
    for bad input.
    """
    clock, team = Clock(progress, command), processes()
    progress = clock.inner
    device = device if team.device is None else team.device
    # Its sums would be on the device of the weights.
    cache = None if recipe.offload else cache
    plan = None if recipe.plan is None else Plan({name: tuple(components) for name, components in recipe.plan.items()})
    budget = None if plan is not None or recipe.method.eta is not None else recipe.budget.parse()
    if recipe.method.eta is not None and recipe.budget != BudgetChoice():
        raise ModhifiError("--eta keeps HiFi sets, whatever their size, in place of a budget; give one of the two")
    out = None if dry_run or recipe.out is None else Path(recipe.out)
    if out is not None:
        check_output(out, force, (*reads, *local_paths(recipe.model_dump())))
    if recipe.export and recipe.out is None:
        raise ModhifiError("an export is written beside the model, which has no place; give out")
    for kind in recipe.export:
        EXPORTS[kind].check()
    with clock.stage("load"):
        original = given.seen_by(given.model or load_source(recipe.model))
        place(original, device, recipe.offload)
        incomparable = _fit(recipe, original, budget)
        recipe, remarks = complete(recipe, original, device)
        if incomparable:
            recipe, more = _by_local_errors(recipe, incomparable)
            remarks = [*remarks, *more]
        if out is not None:
            check_space(out, stored_bytes(original.model) * _least(budget))
        meter = meter_of(recipe, original, budget, cache, progress)
    with clock.stage("data"):
        calibration, held = load_data(recipe, original, given, progress, seen_before(original))
        warnings = [*original.warnings, *remarks, *shortage(recipe, calibration, held)]
        warnings += [*warn_degenerate(calibration), *skipped_warnings(calibration, held)]
        if (unsteady := unrepeatable(original, calibration.first())) is not None:
            clock.note(f"warning: {unsteady}")  # before groups are refused for it
    with clock.stage("prune"):
        settings = recipe.settings()
        if recipe.method.round_to == "auto":
            settings = replace(settings, rounding=rounding_for(original, device, recipe.method.serve))
        if team.count > 1 and budget is not None and budget.measure == "experts":
            raise ModhifiError("experts are removed by one process; start it without a launcher")
        if not team.main:
            contribute(original, calibration, settings, plan, team)
            return PruneResult({}, plan or Plan({}))
        if budget is not None and budget.measure == "experts":
            pruned = prune_experts(original, calibration, budget.keep, settings, progress)
        else:
            pruned = prune_model(
                original,
                calibration,
                budget,
                settings,
                plan=plan,
                progress=progress,
                cache=cache,
                team=team,
                meter=meter,
            )
        if recipe.method.reestimate_batchnorm:
            warnings.append(reestimate_if_closer(pruned.model, original, calibration, settings.batch_size))
        warnings += [f"the group '{name}' stays as it is: {reason}" for name, reason in pruned.left.items()]
        warnings += [*idle_warnings(original, pruned), *metered_warnings(pruned)]
        warnings += gram_warnings(pruned.grams, len(calibration))
    report = report_of(recipe, original, calibration, held, pruned, warnings, command)
    _note(report, warnings, clock, team, cache)
    if dry_run:
        report["forecast"] = _forecast(recipe, original, pruned, settings, cache)
        report["timing"] = clock.seconds
        return PruneResult(report, pruned.plan)
    with clock.stage("measure"):
        table = _measure(report, original, pruned, calibration, held, settings.batch_size, progress, incomparable)
    # Its imports take as long as the bounds.
    process = None if out is None else FreshProcess(original.framework)
    bounds = None
    if table is None:
        without_bounds(report, incomparable)
    else:
        with clock.stage("bound"):
            spent = sum(clock.seconds.values())
            bounds = _bound(report, recipe, original, pruned, held, table, spent, progress)
    path = None
    if out is not None:
        path = _save(out, recipe, original, pruned, calibration, held, report, clock, force, process)
    report["timing"] = clock.seconds
    return PruneResult(report, pruned.plan, pruned.model, path, bounds)


def _least(budget: Budget | None) -> float:
    """The share of the parameters that is left, at about the least; 0 where nobody knows before the plan is made."""
    if budget is None or budget.measure in ("latency", "memory"):
        return 0.0
    # A width that is cut shortens the operators on both of its sides.
    return budget.keep if budget.measure == "parameters" else budget.keep**2


def _fit(recipe: PruneRecipe, original: LoadedModel, budget: Budget | None) -> str:
    """Raises ModhifiError for what the recipe asks of a model that has no such thing.

    Returns why the outputs of two such models cannot be compared, empty where they can.
    """
    require_export(original, recipe.export)
    tolerances = recipe.checks.tolerances()
    if budget is not None:
        budget.fit(original.kind)
    incomparable = original.incomparable()
    tolerances.require(incomparable)
    tolerances.fit(original)
    return incomparable


def _bound(
    report: dict[str, Any],
    recipe: PruneRecipe,
    original: LoadedModel,
    pruned: Pruned,
    held: Samples,
    table: HeldOut,
    spent: float,
    progress: Progress,
) -> BoundReport:
    """Adds bounds, what they say of each group, and the outcome to the report; returns the bounds."""
    # A mixture of fewer experts is no edit of layers in the original's shapes: its router chooses otherwise.
    whole = any(group.kind == "experts" for group in pruned.structure.groups)
    dense_shape = None if whole else expand(pruned.model, original.model, pruned.structure, pruned.plan)
    checks = recipe.checks
    bounds = verify_model(
        original,
        pruned.model,
        dense_shape,
        held,
        checks.tolerances(),
        walked=checks.walked,
        table=table,
        spent=spent,
        progress=progress,
    )
    add_bounds(report, bounds)
    add_groups(report, bounds, pruned.structure)
    add_outcome(report, bounds, prune_advice(report, recipe, bounds, original.kind))
    return bounds


def _forecast(
    recipe: PruneRecipe, original: LoadedModel, pruned: Pruned, settings: PruneSettings, cache: MomentCache | None
) -> dict[str, float]:
    """What the run itself takes, of a recipe that is complete."""
    data = recipe.data
    assert data.samples is not None and data.evaluation_samples is not None
    usual = Amounts(data.samples, data.evaluation_samples, settings.batch_size, data.window)
    blocks = block_by_block(original, pruned.structure, settings, cache is not None)
    figures = forecast(original, pruned.structure, usual, settings.sampling, settings.sequential, blocks)
    return figures | ({} if cache is not None else {"disk": 0.0})


def _by_local_errors(recipe: PruneRecipe, incomparable: str) -> tuple[PruneRecipe, list[str]]:
    """The recipe without what compares outputs, and a remark if that changes it."""
    if recipe.method.allocate == "energy":
        return recipe, []
    method = recipe.method.model_copy(update={"allocate": "energy"})
    return recipe.model_copy(update={"method": method}), [f"groups are weighted by their own energy: {incomparable}"]


def _note(
    report: dict[str, Any], warnings: Sequence[str], clock: Clock, team: Processes, cache: MomentCache | None
) -> None:
    """Adds the origin of the moments to the report, and it and the warnings to the log."""
    for warning in warnings:
        clock.note(f"warning: {warning}")
    if team.count > 1:
        report["data"]["moments"] = f"moments were measured by {team.count} processes"
        clock.note(report["data"]["moments"])
    if cache is not None and cache.remark:
        report["data"]["moments"] = cache.remark
        clock.note(cache.remark)


def _measure(
    report: dict[str, Any],
    original: LoadedModel,
    pruned: Pruned,
    calibration: Samples,
    held: Samples,
    batch_size: int,
    progress: Progress,
    incomparable: str,
) -> HeldOut | None:
    """Adds every measured figure to the report; returns the table of the outputs of both models on ``held``.

    Where these are ``incomparable``, for that reason, they are counted, and there is no table.
    """
    report["calibration"] = {
        **look(original, calibration, batch_size),
        "grams": [vars(quality) for quality in pruned.grams],
    }
    table = None if incomparable else tabulate(original, pruned.model, held, batch_size)
    if table is None:
        report["entries"] = count_entries(original, pruned.model, held, batch_size)
    exact = None
    if pruned.rounded is not None:
        exact = shrink(clone(original.model), pruned.structure, pruned.rounded.exact)
    report |= measure_run(original, pruned.model, held, table, batch_size, progress, exact=exact)
    report["before_after"] = before_after(report)
    report["summary"] = summary(report)
    report["verdicts"] = [
        measured_verdict(report),
        *rounding_verdict(report, pruned),
        *metered_verdict(original, pruned),
    ]
    if table is None:
        report["verdicts"].append({"name": "every bound", "verdict": "not available", "text": incomparable})
    else:
        try:
            report["texts"] = continuations(original, pruned.model, held)
        except ModhifiError as error:
            report["warnings"].append(str(error))
    if original.kind == "image":
        report.update(seen_samples(calibration, original))
    return table


def _save(
    out: Path,
    recipe: PruneRecipe,
    original: LoadedModel,
    pruned: Pruned,
    calibration: Samples,
    held: Samples,
    report: dict[str, Any],
    clock: Clock,
    force: bool,
    process: FreshProcess | None,
) -> Path:
    """Writes the artefact, checks it in a fresh process and exports it; returns its path."""
    with clock.stage("save"):
        report["timing"] = clock.seconds
        path = save_artifact(
            out,
            pruned.model.cpu(),
            original,
            pruned.structure,
            pruned.plan,
            manifest={
                "task": "prune",
                "seed": recipe.seed,
                "calibration": describe_data(calibration, seen_before(original)),
                "held_out": describe_data(held),
                "metrics": {k: report[k] for k in ("errors", "size") if k in report},
                "verdicts": report["verdicts"],
            },
            recipe=located(recipe.model_dump(mode="json")),
            report=report,
            log=clock.log(),
            force=force,
            process=process,
        )
    with clock.stage("reload"):
        batch = check_reload(path, original, pruned.model, held, process)
    for kind in recipe.export:
        with clock.stage(f"export {kind}"):
            export_model(pruned.model, batch, path / f"model{EXPORTS[kind].suffix}", kind)
    clock.write_log(path)
    return path
