"""An unlearning run, from recipe to artefact."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from modhifi.artifacts.reload_check import FreshProcess, check_reload
from modhifi.artifacts.save import save_artifact
from modhifi.bounds.ladder import BoundReport, verify_unlearned
from modhifi.calibration.distributed import launched
from modhifi.calibration.prefix_cache import Passes
from modhifi.data.labels import class_name
from modhifi.data.labels import populations as populations_of
from modhifi.data.samples import describe_data
from modhifi.disk import check_output, check_space
from modhifi.errors import ModhifiError
from modhifi.models.loaded import LoadedModel
from modhifi.progress import Clock, Progress, silent
from modhifi.runs.audit import load_members, load_reference, report_parts
from modhifi.runs.inputs import NOTHING, Given, forgotten_before, load_source, local_paths, located, seen_before
from modhifi.runs.measure import stored_bytes
from modhifi.runs.recipes.unlearn import UnlearnRecipe
from modhifi.runs.reports.bounds import add_bounds
from modhifi.runs.reports.head import head
from modhifi.runs.reports.outcome import add_outcome
from modhifi.runs.reports.pictures import seen_samples
from modhifi.runs.steady_memory import steady_memory
from modhifi.unlearning.audit import audit
from modhifi.unlearning.batchnorm import settle_norms, settled_names
from modhifi.unlearning.data import UnlearnData, find_classes, load_unlearn_data
from modhifi.unlearning.edit import Forgotten, blend, fit_strength, forget
from modhifi.unlearning.sites import Sites, find_sites


@dataclass(frozen=True)
class UnlearnResult:
    """The outcome of an unlearning run; ``report`` is JSON-able, ``path`` None where nothing was to be written."""

    report: dict[str, Any]
    model: nn.Module
    path: Path | None = None
    bounds: BoundReport | None = None


@steady_memory()
def run_unlearn(
    recipe: UnlearnRecipe,
    *,
    device: torch.device | str = "cpu",
    given: Given = NOTHING,
    force: bool = False,
    reads: Sequence[Path] = (),
    progress: Progress = silent,
    command: str = "",
) -> UnlearnResult:
    """Runs an unlearning recipe: load, edit, fit the strength, attack, bound, save, reload.

    ``given`` takes the place of what the recipe names, ``force`` replaces an earlier output, ``command`` goes into the
    report. ``reads`` are files beside those that the recipe names which ``force`` must not replace. Raises
    ModhifiError for bad input, and where a launcher started several processes.
    """
    if launched():
        raise ModhifiError("unlearning runs in one process; start it without a launcher")
    clock = Clock(progress, command)
    progress = clock.inner
    out = None if recipe.out is None else Path(recipe.out)
    if out is not None:
        check_output(out, force, (*reads, *local_paths(recipe.model_dump())))
    with clock.stage("load"):
        original = given.seen_by(given.model or load_source(recipe.model))
        original.model.to(device)
        if out is not None:
            check_space(out, stored_bytes(original.model))
        tolerances = recipe.checks.tolerances()
        tolerances.fit(original)
        classes = find_classes(recipe.forget, original)
        earlier = [c for c in forgotten_before(original) if c not in classes]
        sites = find_sites(original)
        reference = load_reference(recipe.reference, original, device, given)
    with clock.stage("data"):
        data = _load_data(recipe, original, classes, earlier, given)
        members = load_members(
            recipe.data.members,
            original,
            classes,
            samples=recipe.data.samples,
            seed=recipe.seed,
            batch_size=recipe.batch_size,
        )
    with clock.stage("edit"):
        edit = forget(original, sites, data.edit, data.groups, recipe.settings(), classes, progress)
    strength, loss = 1.0, None
    if recipe.method.retain_budget is not None:
        with clock.stage("fit strength"):
            edit, strength, loss = _within_budget(recipe, original, sites, data, edit, classes, earlier)
    with clock.stage("audit"):
        attacked = audit(
            original,
            edit.model,
            sites,
            data,
            classes,
            plain=edit.plain,
            reference=reference,
            members=members,
            earlier=earlier,
            batch_size=recipe.batch_size,
            progress=progress,
        )
    outcome = attacked.figures
    report = _report_of(recipe, original, data, edit, outcome, command)
    report["warnings"] += attacked.warnings
    report["strength"] = {"of_the_full_edit": strength, "retain_loss_on_held_out": loss}
    if strength == 0.0:
        report["warnings"].append("no strength of this method stays within the retain budget: nothing was changed")
    # Its imports take as long as the bounds.
    process = None if out is None else FreshProcess(original.framework)
    with clock.stage("bound"):
        bounds = verify_unlearned(
            original,
            edit.model,
            edit.model,
            data.test,
            classes,
            tolerances,
            earlier=earlier,
            walked=recipe.checks.walked,
            batch_size=recipe.batch_size,
            logits=attacked.logits,
            progress=progress,
        )
        add_bounds(report, bounds)
        add_outcome(report, bounds)
        if original.packing is None:
            report.update(seen_samples(data.edit, original))
    path = None
    if out is not None:
        forgotten = sorted({*classes, *forgotten_before(original)})
        path = _save(out, recipe, original, edit.model, forgotten, data, outcome, report, clock, force, process)
    report["timing"] = clock.seconds
    return UnlearnResult(report, edit.model, path, bounds)


def _save(
    out: Path,
    recipe: UnlearnRecipe,
    original: LoadedModel,
    edited: nn.Module,
    forgotten: Sequence[int],
    data: UnlearnData,
    outcome: Mapping[str, Any],
    report: dict[str, Any],
    clock: Clock,
    force: bool,
    process: FreshProcess | None,
) -> Path:
    """Writes the artefact and checks it in a fresh process; returns its path."""
    with clock.stage("save"):
        report["timing"] = clock.seconds
        path = save_artifact(
            out,
            edited.cpu(),
            original,
            None,
            None,
            manifest={
                "task": "unlearn",
                "seed": recipe.seed,
                "forgotten": [{"index": c, "name": class_name(original, c)} for c in forgotten],
                "calibration": describe_data(data.edit, seen_before(original)),
                "held_out": describe_data(data.test),
                "metrics": outcome["rows"]["edited"],
                "verdicts": report["verdicts"],
            },
            recipe=located(recipe.model_dump(mode="json")),
            report=report,
            log=clock.log(),
            force=force,
            process=process,
        )
    with clock.stage("reload"):
        check_reload(path, original, edited, data.test, process)
    clock.write_log(path)
    return path


def _load_data(
    recipe: UnlearnRecipe, original: LoadedModel, classes: Sequence[int], earlier: Sequence[int], given: Given
) -> UnlearnData:
    sources = recipe.data
    return load_unlearn_data(
        original,
        classes,
        source=sources.source if given.data is None else given.data,
        samples=sources.samples,
        forget_source=sources.forget,
        evaluate=sources.evaluate if given.evaluate is None else given.evaluate,
        evaluation_samples=sources.evaluation_samples,
        earlier=earlier,
        seed=recipe.seed,
        batch_size=recipe.batch_size,
    )


def _within_budget(
    recipe: UnlearnRecipe,
    original: LoadedModel,
    sites: Sites,
    data: UnlearnData,
    edit: Forgotten,
    classes: Sequence[int],
    earlier: Sequence[int],
) -> tuple[Forgotten, float, float]:
    """Weakens the edit to the largest share within the retain budget, on held-out retained images.

    Returns the edit, its share in [0, 1] and the loss of retain accuracy at it.
    """
    budget = recipe.method.retain_budget
    assert budget is not None and data.fit.labels is not None
    retained = data.fit.subset(torch.nonzero(populations_of(data.fit, classes, earlier) == 0).flatten())
    labels = retained.labels
    assert labels is not None

    def accuracy(model: nn.Module) -> float:
        outputs = [run().argmax(1).cpu() for _, run in Passes(original, model, retained, recipe.batch_size)]
        return float((torch.cat(outputs) == labels).double().mean())

    before = accuracy(original.model)
    strength, loss = fit_strength(lambda s: before - accuracy(blend(original.model, edit.plain, s)), budget)
    if strength == 1.0:
        return edit, strength, loss
    plain = blend(original.model, edit.plain, strength)
    model = blend(plain, plain, 1.0)
    names = settled_names(sites, [r.module for r in edit.records])
    if recipe.method.settle and names and strength > 0:
        settle_norms(Passes(original, model, data.edit, recipe.batch_size), names, data.groups == 0)
    return replace(edit, model=model, plain=plain), strength, loss


def _report_of(
    recipe: UnlearnRecipe,
    original: LoadedModel,
    data: UnlearnData,
    edit: Forgotten,
    outcome: Mapping[str, Any],
    command: str,
) -> dict[str, Any]:
    values, settings = edit.values, recipe.model_dump(mode="json")
    # Those that applied, where the method's own took the place of null.
    settings["method"] |= {
        "depth": values.depth,
        "passes": values.passes,
        "strength": f"{values.strength:g} ({values.unit})",
    }
    left_out = [f"{name} was left out: {reason}" for name, reason in dict(edit.left_out).items()]
    return {
        **head("unlearn", original.source, framework=original.framework),
        **report_parts(outcome),
        "data": {
            "edit": data.edit.description,
            "edit_samples": len(data.edit),
            "forget_samples": int((data.groups > 0).sum()),
            "fit_samples": len(data.fit),
            "test_samples": len(data.test),
        },
        "settings": settings,
        "edits": [{"module": r.module, "change": r.change, "damping": r.damping} for r in edit.records],
        "warnings": [*original.warnings, *data.notes, *left_out],
        "command": command,
    }
