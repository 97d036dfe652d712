"""A whole pruning run, from recipe to artefact: read top to bottom."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import measure
from .artifact import check_output, describe_data, save_artifact, verify_reload
from .contact_sheet import contact_sheet
from .data import Samples, load_samples, warn_degenerate
from .defaults import complete
from .errors import ModhifiError
from .export import SUFFIXES, check_export
from .export import export as export_model
from .load import LoadedModel, load_model
from .moment_cache import MomentCache
from .own_data import Source
from .plan import Plan
from .pruning import (
    Progress,
    Pruned,
    find_structure,
    prune_model,
    reestimate_batchnorm,
    silent,
)
from .rebuild import expand
from .recipe import ModelSource, PruneRecipe
from .report import data_uri
from .run_checks import add_bounds, add_groups
from .sizes import sizes_of
from .verify import BoundReport, verify_model


@dataclass
class Clock:
    """Seconds spent in each stage."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


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
    """Run a pruning recipe. Writes nothing before everything is computed, and nothing at all with ``dry_run``."""
    clock = Clock()
    plan = None if recipe.plan is None else Plan({name: tuple(kept) for name, kept in recipe.plan.items()})
    budget = None if plan is not None or recipe.method.eta is not None else recipe.budget.parse()
    out = None if dry_run or recipe.out is None else Path(recipe.out)
    if out is not None:
        check_output(out, force)
    for kind in export:
        check_export(kind)
    with clock.stage("load"):
        loaded = given.model or load_source(recipe.model)
        loaded.model.to(device)
        tolerances = recipe.checks.tolerances()
        tolerances.fit(loaded.kind)
        recipe, remarks = complete(recipe, loaded, device)
        calibration, held = load_data(recipe, loaded, given, progress)
        warnings = [*remarks, *warn_degenerate(calibration), *_skipped(calibration)]
    with clock.stage("prune"):
        settings = recipe.settings()
        pruned = prune_model(loaded, calibration, budget, settings, plan=plan, progress=progress, cache=cache)
        if recipe.method.reestimate_batchnorm:
            reestimate_batchnorm(pruned.model, loaded, calibration, settings.batch_size)
    report = _describe(recipe, loaded, calibration, held, pruned, warnings, command)
    if cache is not None and cache.remark:
        report["data"]["moments"] = cache.remark
    if dry_run:
        report["timing"] = clock.seconds
        return PruneResult(report, pruned.plan)
    with clock.stage("measure"):
        report |= measure_run(loaded, pruned.model, held, settings.batch_size, progress)
        report["before_after"] = _before_after(report)
        report["verdicts"] = [_measured(report)]
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
                force=force,
            )
        with clock.stage("reload"):
            batch = next(held.batches(min(4, len(held))))
            with torch.no_grad():
                expected = loaded.logits(batch, pruned.model.cpu())
            verify_reload(path, batch, expected, own_skeleton(loaded))
        for kind in export:
            with clock.stage(f"export {kind}"):
                export_model(pruned.model, batch, path / f"model{SUFFIXES[kind]}", kind)
    report["timing"] = clock.seconds
    return PruneResult(report, pruned.plan, pruned.model, path, bounds)


def own_skeleton(loaded: LoadedModel) -> nn.Module | None:
    """The dense module where no library builds it anew, so that an artefact of it can be loaded."""
    return loaded.model if loaded.framework == "torch" else None


def _skipped(samples: Samples) -> list[str]:
    if not samples.skipped:
        return []
    names = "; ".join(f"{name} ({reason})" for name, reason in samples.skipped[:10])
    more = f"; and {len(samples.skipped) - 10} more" if len(samples.skipped) > 10 else ""
    return [f"{len(samples.skipped)} unreadable items were skipped: {names}{more}"]


def _describe(
    recipe: PruneRecipe,
    loaded: LoadedModel,
    calibration: Samples,
    held: Samples,
    pruned: Pruned,
    warnings: list[str],
    command: str,
) -> dict[str, Any]:
    structure, plan = pruned.structure, pruned.plan
    sizes = sizes_of(loaded.model, structure)
    widths = {g.name: len(plan.kept.get(g.name, range(g.n))) for g in structure.prunable}
    dense = {g.name: g.n for g in structure.prunable}
    by_reader = {e.reader: e for e in pruned.errors}
    groups = []
    for g in structure.prunable:
        errors = [by_reader[s.module] for s in g.readers if s.module in by_reader] if g.name in plan.kept else []
        local, energy = sum(e.error for e in errors), sum(e.energy for e in errors)
        groups.append(
            {
                "name": g.name,
                "kind": "coupled channels" if g.coupled else g.kind,
                "n": g.n,
                "kept": widths[g.name],
                "local_error": local if errors else 0.0,
                "relative_error": local / energy if energy > 0 else 0.0,
                "amplification": None,
            }
        )
    reached = {
        "components": sizes.components(widths) / sizes.components(dense),
        "parameters": sizes.parameters(widths) / sizes.parameters(dense),
        "macs": sizes.macs(widths) / sizes.macs(dense),
    }
    return {
        "schema_version": 1,
        "title": f"modhifi prune {loaded.source}",
        "task": "prune",
        "model": {"source": loaded.source, "framework": loaded.framework, **_plain(loaded.info)},
        "data": {
            "calibration": calibration.description,
            "held_out": held.description,
            "calibration_samples": len(calibration),
            "held_out_samples": len(held),
        },
        "settings": recipe.model_dump(mode="json"),
        "budget": {**recipe.budget.model_dump(), "reached": reached},
        "groups": groups,
        "refused": [{"name": g.name, "n": g.n, "reason": g.refused} for g in structure.refused],
        "warnings": warnings,
        "command": command,
    }


def _plain(info: Mapping[str, Any]) -> dict[str, Any]:
    return {k: info.get(k) for k in ("architecture", "revision", "licence", "notes") if info.get(k)}


def measure_run(
    loaded: LoadedModel, edited: nn.Module, held: Samples, batch_size: int, progress: Progress = silent
) -> dict[str, Any]:
    """Everything measured on the held-out samples and on this device, before and after."""
    device = next(edited.parameters()).device
    one = next(held.batches(1)).to(device)
    progress("checking", 0, 3)
    dense, after = loaded.logits, partial(loaded.logits, model=edited)
    errors: dict[str, Any]
    if loaded.kind == "text":
        # The loss of the next token comes out of the same passes.
        scored = (measure.NextTokens(dense), measure.NextTokens(after))
        errors = measure.compare(*scored, held, batch_size=batch_size, device=device).summary()
        errors |= {f"perplexity_{name}": s.perplexity for name, s in zip(("before", "after"), scored, strict=True)}
    else:
        errors = measure.compare(dense, after, held, batch_size=batch_size, device=device).summary()
    if held.labels is not None:
        errors["accuracy_before"] = measure.accuracy(dense, held, batch_size=batch_size, device=device)
        errors["accuracy_after"] = measure.accuracy(after, held, batch_size=batch_size, device=device)
    progress("checking", 1, 3)
    size = {
        "parameters": [measure.count_parameters(loaded.model), measure.count_parameters(edited)],
        "flops": [measure.count_flops(loaded.model, one), measure.count_flops(edited, one)],
    }
    progress("checking", 2, 3)
    latency = measure.compare_latency({"before": loaded.model, "after": edited}, one, rounds=9)
    progress("checking", 3, 3)
    return {
        "errors": errors,
        "size": size,
        "latency": {name: vars(value) for name, value in latency.items()},
    }


def _before_after(report: dict[str, Any]) -> list[dict[str, Any]]:
    def row(name: str, before: float | None, after: float | None, unit: str = "") -> dict[str, Any]:
        return {"name": name, "before": before, "after": after, "unit": unit}

    errors, size, latency = report["errors"], report["size"], report["latency"]
    text = "perplexity_before" in errors
    quality = row("top-1 accuracy", errors.get("accuracy_before"), errors.get("accuracy_after"), "%")
    if text:
        quality = row("perplexity", errors["perplexity_before"], errors["perplexity_after"])
    return [
        quality,
        row(f"{'next-token ' if text else ''}agreement with the original", 1.0, errors["agreement"], "%"),
        row("FLOPs per sample", *size["flops"]),
        row("parameters", *size["parameters"]),
        row("latency, one sample", latency["before"]["median"], latency["after"]["median"], "s"),
    ]


def _measured(report: dict[str, Any]) -> dict[str, str]:
    """What was measured, in a sentence: an observation on these samples, not a bound."""
    errors = report["errors"]
    worst = max(report["groups"], key=lambda g: g["relative_error"])
    return {
        "name": "local and global errors",
        "verdict": "MEASURED",
        "text": f"on {errors['n']} held-out samples the output moved by {errors['relative_error']:.3g} of its energy "
        f"(mean KL {errors['kl']:.3g} nats); the largest local error is {worst['relative_error']:.3g} of the energy, "
        f"at the readers of {worst['name']}; measured, not bounded",
    }


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
                "kind": "coupled channels" if g.coupled else g.kind,
                "n": g.n,
                "step": g.step,
                "readers": [s.module for s in g.readers],
                "producers": [s.module for s in g.producers],
                "parameters_saved_by_half": local.parameters(dense) - local.parameters(half),
                "macs_saved_by_half": local.macs(dense) - local.macs(half),
            }
        )
    total = sizes.parameters(dense)
    return {
        "model": loaded.source,
        "parameters": total,
        "groups": groups,
        "refused": [{"name": g.name, "n": g.n, "reason": g.refused} for g in structure.refused],
        "prunable": bool(groups),
    }
