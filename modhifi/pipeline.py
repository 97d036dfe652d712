"""A whole pruning run, from recipe to artefact: read top to bottom."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from modhifi.artifacts.export import SUFFIXES, check_export
from modhifi.artifacts.export import export as export_model
from modhifi.artifacts.reload_check import reload_alike
from modhifi.artifacts.report import data_uri
from modhifi.artifacts.save import save_artifact
from modhifi.bounds.ladder import BoundReport, verify_model
from modhifi.calibration.batchnorm import reestimate_batchnorm
from modhifi.calibration.block_stream import find_blocks
from modhifi.calibration.cache import MomentCache
from modhifi.calibration.distributed import processes
from modhifi.calibration.gram_quality import gram_warnings
from modhifi.data.contact_sheet import contact_sheet
from modhifi.data.in_memory import Source
from modhifi.data.quality import look
from modhifi.data.samples import Samples, describe_data, warn_degenerate
from modhifi.data.sources import load_samples
from modhifi.defaults import complete
from modhifi.disk import check_output
from modhifi.errors import ModhifiError
from modhifi.models.artifact import read_manifest
from modhifi.models.load import load_model
from modhifi.models.loaded import LoadedModel
from modhifi.models.offload import let_visit
from modhifi.progress import Clock, Progress, silent
from modhifi.prune_report import before_after, describe, measure_run, measured, skipped
from modhifi.pruning.prune import contribute, prune_model
from modhifi.pruning.stages import find_structure
from modhifi.recipe import ModelSource, PruneRecipe
from modhifi.run_checks import add_bounds, add_groups
from modhifi.structure.expand import expand
from modhifi.structure.families import says
from modhifi.structure.plan import Plan
from modhifi.structure.sizes import sizes_of


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


@dataclass(frozen=True)
class Given:
    """What a Python program hands over itself; it takes the place of what the recipe names."""

    model: LoadedModel | None = None
    data: Source | None = None
    evaluate: Source | None = None


NOTHING = Given()


def load_source(source: ModelSource) -> LoadedModel:
    """Load what a recipe names."""
    return load_model(
        source.name,
        pretrained=source.pretrained,
        model_args=source.args,
        weights=source.weights,
        revision=source.revision,
        gguf_file=source.gguf_file,
        trust_remote_code=source.trust_remote_code,
    )


def original_of(directory: str | Path) -> ModelSource:
    """What to load to have the model that an artefact was made from, by its manifest."""
    manifest = read_manifest(directory)
    base, named = manifest["base"], (manifest.get("recipe") or {}).get("model") or {}
    if named.get("name") != base["source"]:
        named = {"name": base["source"], "revision": base.get("revision")}
    if str(base["source"]).startswith("timm:"):  # a directory states its own
        named = {**named, "args": named.get("args") or base.get("args") or {}}
    return ModelSource(**named)


def load_data(
    recipe: PruneRecipe, loaded: LoadedModel, given: Given = NOTHING, progress: Progress = silent
) -> tuple[Samples, Samples]:
    """Calibration and held-out samples, disjoint by content, and by document where text is cut from documents.

    Raises ModhifiError where too few samples are left for either.
    """
    data, seed = recipe.data, recipe.seed
    source = data.source if given.data is None else given.data
    evaluate = data.evaluate if given.evaluate is None else given.evaluate
    assert data.samples is not None and data.evaluation_samples is not None

    def load(spec: Source, n: int) -> Samples:
        return load_samples(spec, loaded, n=n, seed=seed, window=data.window, progress=progress)

    # Both from one source are told apart by document, which hashes of windows cannot do.
    same = isinstance(evaluate, str) and isinstance(source, str) and evaluate == source
    if evaluate is not None and not same:
        calibration = load(source, data.samples)
        seen = set(calibration.hashes)
        held = load(evaluate, data.evaluation_samples + len(seen))
        fresh = [i for i, h in enumerate(held.hashes) if h not in seen][: data.evaluation_samples]
        if not fresh:
            raise ModhifiError("every evaluation sample is also a calibration sample; give other data to --evaluate")
        return calibration, held if len(fresh) == len(held) else held.subset(fresh)
    both = load(source, data.samples + data.evaluation_samples)
    if len(both) < 4:
        raise ModhifiError(
            f"{both.description}: {len(both)} different usable samples are too few to calibrate and to check; "
            "give at least 4"
        )
    return both.split(data.samples, data.evaluation_samples)


def run_prune(
    recipe: PruneRecipe,
    *,
    device: torch.device | str = "cpu",
    dry_run: bool = False,
    force: bool = False,
    given: Given = NOTHING,
    cache: MomentCache | None = None,
    export: tuple[str, ...] = (),
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
    out = None if dry_run or recipe.out is None else Path(recipe.out)
    if out is not None:
        check_output(out, force)
    for kind in export:
        check_export(kind)
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
        report |= measure_run(loaded, pruned.model, held, settings.batch_size, progress)
        report["before_after"] = before_after(report)
        report["verdicts"] = [measured(report)]
        if loaded.kind == "image":
            report["contact_sheet"] = data_uri(contact_sheet(calibration, loaded, n=48, tile=64))
    with clock.stage("bound"):
        twin = expand(pruned.model, loaded.model, pruned.structure, pruned.plan)
        walked, size = recipe.checks.walked, settings.batch_size
        bounds = verify_model(
            loaded, pruned.model, twin, held, tolerances, walked=walked, batch_size=size, progress=progress
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
        for kind in export:
            with clock.stage(f"export {kind}"):
                export_model(pruned.model, batch, path / f"model{SUFFIXES[kind]}", kind)
    report["timing"] = clock.seconds
    return PruneResult(report, pruned.plan, pruned.model, path, bounds)


def place(loaded: LoadedModel, device: torch.device | str, offload: bool) -> None:
    """Put a model on a device, in place: all of it, or with ``offload`` all but its blocks, which visit it."""
    if offload:
        let_visit(loaded.model, find_blocks(loaded.model, lambda: loaded.run(loaded.example)), device)
    else:
        loaded.model.to(device)


def check_model(loaded: LoadedModel) -> dict[str, Any]:
    """What can be pruned of a model and what not, as JSON-able data."""
    structure = find_structure(loaded)
    sizes = sizes_of(loaded.model, structure)
    dense = {g.name: g.n for g in structure.prunable}
    touching = sizes.touching()
    groups = []
    for g in structure.prunable:
        local = touching[g.name]
        half = {**dense, g.name: max(g.step, g.n // 2 // g.step * g.step)}
        groups.append(
            {
                "name": g.name,
                "kind": g.label,
                "n": g.n,
                "step": g.step,
                "readers": [s.module for s in g.readers],
                "producers": [s.module for s in g.producers],
                "parameters_saved_by_half": local.parameters(dense) - local.parameters(half),
                "macs_saved_by_half": local.macs(dense) - local.macs(half),
            }
        )
    total = sizes.parameters(dense)
    refused = [{"name": g.name, "n": g.n, "reason": g.refused} for g in structure.refused]
    return {
        "model": loaded.source,
        "parameters": total,
        "groups": groups,
        "refused": refused,
        "prunable": bool(groups),
        "not_stock": [
            kind
            for kind in ("neurons", "heads")
            if any(g.kind == kind for g in structure.prunable) and not says(loaded.model, kind)
        ],
    }
