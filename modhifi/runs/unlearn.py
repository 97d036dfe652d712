"""A whole unlearning run, and an audit on its own, from recipe to report: read top to bottom."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from modhifi.artifacts.reload_check import reload_alike
from modhifi.artifacts.report import data_uri
from modhifi.artifacts.save import save_artifact
from modhifi.bounds.ladder import BoundReport, verify_unlearned
from modhifi.calibration.distributed import launched
from modhifi.calibration.prefix_cache import Passes
from modhifi.data.contact_sheet import contact_sheet
from modhifi.data.labels import class_name, label_samples
from modhifi.data.labels import populations as populations_of
from modhifi.data.samples import Samples, describe_data
from modhifi.data.sources import load_samples
from modhifi.disk import check_output
from modhifi.errors import ModhifiError
from modhifi.models.loaded import LoadedModel
from modhifi.progress import Clock, Progress, silent
from modhifi.runs.audit import load_reference, shown
from modhifi.runs.bound_report import add_bounds
from modhifi.runs.inputs import NOTHING, Given, forgotten_before, load_source, local_paths
from modhifi.runs.unlearn_recipe import UnlearnRecipe
from modhifi.unlearning.audit import audit
from modhifi.unlearning.batchnorm import settle_norms, settled_names
from modhifi.unlearning.data import UnlearnData, find_classes, load_unlearn_data
from modhifi.unlearning.edit import Forgotten, blend, fit_strength, forget
from modhifi.unlearning.sites import Sites, find_sites


@dataclass(frozen=True)
class UnlearnResult:
    """``report`` is JSON-able; ``path`` is None where nothing was to be written."""

    report: dict[str, Any]
    model: nn.Module
    path: Path | None = None
    bounds: BoundReport | None = None


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
    """Run an unlearning recipe: load, edit, fit the strength, attack, save, reload.

    ``reads`` are files beside those that the recipe names which ``force`` must not replace.
    Raises ModhifiError for bad input, and where a launcher started several processes.
    """
    if launched():
        raise ModhifiError("unlearning runs in one process; start it without a launcher")
    clock = Clock(progress, command)
    progress = clock.inner
    out = None if recipe.out is None else Path(recipe.out)
    if out is not None:
        check_output(out, force, (*reads, *local_paths(recipe.model_dump())))
    with clock.stage("load"):
        loaded = given.model or load_source(recipe.model)
        loaded.model.to(device)
        tolerances = recipe.checks.tolerances()
        tolerances.fit(loaded.kind)
        classes = find_classes(recipe.forget, loaded)
        earlier = [c for c in forgotten_before(loaded) if c not in classes]
        sites = find_sites(loaded)
        reference = load_reference(recipe.reference, device)
    with clock.stage("data"):
        data = _load_data(recipe, loaded, classes, earlier, given)
        members = _load_members(recipe.data.members, loaded, recipe)
    with clock.stage("edit"):
        found = forget(loaded, sites, data.edit, data.groups, recipe.settings(), classes, progress)
    strength, loss = 1.0, None
    if recipe.method.retain_budget is not None:
        with clock.stage("fit strength"):
            found, strength, loss = _within_budget(recipe, loaded, sites, data, found, classes, earlier)
    with clock.stage("audit"):
        attacked = audit(
            loaded,
            found.model,
            sites,
            data,
            classes,
            plain=found.plain,
            reference=reference,
            members=members,
            earlier=earlier,
            batch_size=recipe.batch_size,
            progress=progress,
        )
    report = _describe(recipe, loaded, data, found, attacked, command)
    report["strength"] = {"of_the_full_edit": strength, "retain_loss_on_held_out": loss}
    if strength == 0.0:
        report["warnings"].append("no strength of this method stays within the retain budget: nothing was changed")
    with clock.stage("bound"):
        bounds = verify_unlearned(
            loaded,
            found.model,
            found.model,
            data.test,
            classes,
            tolerances,
            earlier=earlier,
            walked=recipe.checks.walked,
            batch_size=recipe.batch_size,
            progress=progress,
        )
        add_bounds(report, bounds)
        report["contact_sheet"] = data_uri(contact_sheet(data.edit, loaded, n=48, tile=64))
    path = None
    if out is not None:
        with clock.stage("save"):
            report["timing"] = clock.seconds
            everything = sorted({*classes, *forgotten_before(loaded)})
            path = save_artifact(
                out,
                found.model,
                loaded,
                None,
                None,
                manifest={
                    "task": "unlearn",
                    "seed": recipe.seed,
                    "forgotten": [{"index": c, "name": class_name(loaded, c)} for c in everything],
                    "calibration": describe_data(data.edit),
                    "held_out": describe_data(data.test),
                    "metrics": attacked["rows"]["edited"],
                    "verdicts": report["verdicts"],
                },
                recipe=recipe.model_dump(mode="json"),
                report=report,
                log=clock.log(),
                force=force,
            )
        with clock.stage("reload"):
            reload_alike(path, loaded, found.model.cpu(), data.test)
    report["timing"] = clock.seconds
    return UnlearnResult(report, found.model, path, bounds)


def _load_data(
    recipe: UnlearnRecipe, loaded: LoadedModel, classes: Sequence[int], earlier: Sequence[int], given: Given
) -> UnlearnData:
    data = recipe.data
    return load_unlearn_data(
        loaded,
        classes,
        source=data.source if given.data is None else given.data,
        samples=data.samples,
        forget_source=data.forget,
        evaluate=data.evaluate if given.evaluate is None else given.evaluate,
        evaluation_samples=data.evaluation_samples,
        earlier=earlier,
        seed=recipe.seed,
        batch_size=recipe.batch_size,
    )


def _load_members(spec: str | None, loaded: LoadedModel, recipe: UnlearnRecipe) -> Samples | None:
    if spec is None:
        return None
    found = load_samples(spec, loaded, n=recipe.data.samples, seed=recipe.seed)
    return label_samples(loaded, found, recipe.batch_size)[0]


def _within_budget(
    recipe: UnlearnRecipe,
    loaded: LoadedModel,
    sites: Sites,
    data: UnlearnData,
    found: Forgotten,
    classes: Sequence[int],
    earlier: Sequence[int],
) -> tuple[Forgotten, float, float]:
    """The largest share of the edit that costs no more retain accuracy than allowed, on held-out retained images."""
    budget = recipe.method.retain_budget
    assert budget is not None and data.fit.labels is not None
    kept = data.fit.subset(torch.nonzero(populations_of(data.fit, classes, earlier) == 0).flatten())
    labels = kept.labels
    assert labels is not None

    def right(model: nn.Module) -> float:
        outputs = [run().argmax(1).cpu() for _, run in Passes(loaded, model, kept, recipe.batch_size)]
        return float((torch.cat(outputs) == labels).double().mean())

    before = right(loaded.model)
    strength, loss = fit_strength(lambda s: before - right(blend(loaded.model, found.plain, s)), budget)
    if strength == 1.0:
        return found, strength, loss
    plain = blend(loaded.model, found.plain, strength)
    model = blend(plain, plain, 1.0)
    names = settled_names(sites, [r.module for r in found.records])
    if recipe.method.settle and names and strength > 0:
        settle_norms(Passes(loaded, model, data.edit, recipe.batch_size), names, data.groups == 0)
    return replace(found, model=model, plain=plain), strength, loss


def _describe(
    recipe: UnlearnRecipe,
    loaded: LoadedModel,
    data: UnlearnData,
    found: Forgotten,
    attacked: Mapping[str, Any],
    command: str,
) -> dict[str, Any]:
    values = found.values
    left_out = [f"{name} was left out: {reason}" for name, reason in dict(found.left_out).items()]
    return {
        "schema_version": 1,
        "title": f"modhifi unlearn {loaded.source}",
        "task": "unlearn",
        "model": {"source": loaded.source, "framework": loaded.framework},
        **shown(attacked),
        "data": {
            "edit": data.edit.description,
            "edit_samples": len(data.edit),
            "forget_samples": int((data.groups > 0).sum()),
            "fit_samples": len(data.fit),
            "test_samples": len(data.test),
        },
        "settings": {
            **recipe.model_dump(mode="json", exclude={"data", "method"}),
            "method": recipe.method.name,
            "depth": values.depth,
            "passes": values.passes,
            "strength": f"{values.strength:g} ({values.unit})",
        },
        "edits": [{"module": r.module, "change": r.change, "damping": r.damping} for r in found.records],
        "warnings": [*data.notes, *left_out],
        "command": command,
    }
