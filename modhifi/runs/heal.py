"""A healing run, from recipe to artefact."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from modhifi.artifacts.export import export as export_model
from modhifi.artifacts.exports import EXPORTS
from modhifi.artifacts.reload_check import FreshProcess, check_reload
from modhifi.artifacts.save import save_artifact
from modhifi.bounds.held_out import HeldOut, tabulate_several
from modhifi.bounds.ladder import BoundReport, verify_model, verify_unlearned
from modhifi.calibration.distributed import processes
from modhifi.data.labels import label_samples, populations
from modhifi.data.samples import Samples, describe_data, warn_degenerate
from modhifi.disk import check_output, check_space, home_path, unfinished
from modhifi.errors import ModhifiError
from modhifi.healing.checkpoint import Checkpoint
from modhifi.healing.distil import distil
from modhifi.healing.healed import Healed
from modhifi.models.skeleton import same_shapes
from modhifi.models.weights import state_hash
from modhifi.progress import Clock, Progress, silent
from modhifi.runs.defaults import complete_heal, with_end
from modhifi.runs.heal_inputs import LearningData, Patient, load_learning_data, load_patient, teacher_of
from modhifi.runs.inputs import NOTHING, Given, local_paths, located, seen_before
from modhifi.runs.measure import stored_bytes
from modhifi.runs.recipes.heal import HealRecipe
from modhifi.runs.reports.bounds import add_bounds
from modhifi.runs.reports.continuations import continuations
from modhifi.runs.reports.heal import add_audit, healing_verdicts, measure_healing, report_of
from modhifi.runs.reports.outcome import add_outcome, heal_advice
from modhifi.runs.reports.pictures import seen_samples
from modhifi.runs.reports.prune import skipped_warnings
from modhifi.runs.steady_memory import steady_memory
from modhifi.runs.verify import in_dense_shape
from modhifi.staging import stays
from modhifi.unlearning.audit import audit
from modhifi.unlearning.data import load_unlearn_data
from modhifi.unlearning.sites import find_sites


@dataclass(frozen=True)
class HealResult:
    """The outcome of a healing run; ``report`` is JSON-able.

    ``path`` is None where nothing was to be written. Nothing is raised for a tolerance that is not met:
    ``bounds.enforce()`` raises it. ``broken`` says that the loss was not finite at some step, and the weights from
    before it were kept.
    """

    report: dict[str, Any]
    model: nn.Module | None = None
    path: Path | None = None
    bounds: BoundReport | None = None
    broken: bool = False


@steady_memory()
def run_heal(
    recipe: HealRecipe,
    *,
    device: torch.device | str = "cpu",
    given: Given = NOTHING,
    force: bool = False,
    reads: Sequence[Path] = (),
    progress: Progress = silent,
    command: str = "",
) -> HealResult:
    """Runs a healing recipe: load, distil, measure, bound, save, reload, export.

    ``given`` takes the place of what the recipe names, ``force`` replaces an earlier output, ``command`` goes into the
    report. While it goes on its state is in ``OUT.healing``, from which the same run goes on after it was ended. Where
    a launcher started several processes, all but the main one return an empty report. ``reads`` are files beside those
    that the recipe names which ``force`` must not replace. Raises ModhifiError for bad input.
    """
    clock, team = Clock(progress, command), processes()
    device = device if team.device is None else team.device
    out = None if recipe.out is None else home_path(recipe.out).absolute()
    if out is not None and team.main:
        check_output(out, force, (*reads, *local_paths(recipe.model_dump())))
    if recipe.export and recipe.out is None:
        raise ModhifiError("an export is written beside the model, which has no place; give out")
    for kind in recipe.export:
        EXPORTS[kind].check()
    with clock.stage("load"):
        patient = load_patient(recipe, given)
        original = patient.original
        facts = {"forgot": bool(patient.closed), "whole": same_shapes(original.model, patient.edited.model)}
        recipe, remarks = complete_heal(recipe, original, device, teacher_of(recipe, patient), **facts)
        original.model.to(device)
        patient.edited.model.to(device)
        if out is not None:
            check_space(out, stored_bytes(patient.edited.model))
    with clock.stage("data"):
        data = load_learning_data(recipe, patient, given, clock.inner)
        recipe = with_end(recipe, data.learnt, one_pass=all(facts.values()))
        skipped = skipped_warnings(data.train, data.held)
        warnings = [*original.warnings, *remarks, *data.remarks(), *warn_degenerate(data.train), *skipped]
    checkpoint = None if out is None else _checkpoint(out, recipe, patient, data, force)
    with clock.stage("heal"):
        healed = _distil(recipe, patient, data, checkpoint, clock)
    if not team.main:
        return HealResult({})
    report = report_of(recipe, original, patient.edited, data.train, data.validation, data.held, healed, command)
    report["warnings"] = [*warnings, *report["warnings"]]
    with clock.stage("measure"):
        table = _measure(report, recipe, patient, data, healed, clock.inner)
    # Its imports take as long as the bounds.
    process = None if out is None else FreshProcess(original.framework)
    with clock.stage("bound"):
        bounds = _bound(report, recipe, patient, data.held, healed.model, table, clock.inner)
    if patient.closed:
        with clock.stage("audit"):
            _audit(report, recipe, patient, data, healed.model, clock.inner)
    path = None
    if out is not None:
        path = _save(out, recipe, patient, data, healed, report, clock, force, process)
    if checkpoint is not None:
        checkpoint.remove()
    report["timing"] = clock.seconds
    return HealResult(report, healed.model, path, bounds, healed.broken is not None)


def _checkpoint(out: Path, recipe: HealRecipe, patient: Patient, data: LearningData, force: bool) -> Checkpoint:
    content = {
        "recipe": recipe.model_dump(mode="json", exclude={"out", "summary", "export", "checks", "device"}),
        "models": [state_hash(model.model) for model in (patient.original, patient.edited)],
        "data": [samples.fingerprint() for samples in (data.train, data.validation)],
    }
    key = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return Checkpoint((out if stays(out) else out.parent) / unfinished(out), key, force)


def _distil(
    recipe: HealRecipe,
    patient: Patient,
    data: LearningData,
    checkpoint: Checkpoint | None,
    clock: Clock,
) -> Healed:
    try:
        return distil(
            patient.original,
            patient.edited.model,
            data.train,
            data.validation,
            recipe.settings(),
            closed=patient.closed,
            cut=patient.cut,
            checkpoint=checkpoint,
            progress=clock.inner,
            note=clock.note,
        )
    except KeyboardInterrupt as interrupt:
        if checkpoint is not None:
            interrupt.add_note(f"the same command goes on from {checkpoint.path}")
        raise


def _measure(
    report: dict[str, Any], recipe: HealRecipe, patient: Patient, data: LearningData, healed: Healed, progress: Progress
) -> HeldOut:
    """Adds every measured figure to the report; returns the table of original and healed outputs."""
    original, batch_size = patient.original, recipe.settings().batch_size
    models = (patient.edited.model, healed.model)
    tables = tabulate_several(original, models, data.held, batch_size)
    measure_healing(report, original, models, data.held, tables, batch_size, progress)
    report["verdicts"] = healing_verdicts(healed)
    try:
        report["texts"] = continuations(original, healed.model, data.held)
    except ModhifiError as error:
        report["warnings"].append(str(error))
    if original.kind == "image":
        report.update(seen_samples(data.train, original))
    return tables[1]


def _bound(
    report: dict[str, Any],
    recipe: HealRecipe,
    patient: Patient,
    held: Samples,
    model: nn.Module,
    table: HeldOut,
    progress: Progress,
) -> BoundReport:
    """Adds bounds against the original and the outcome to the report; returns the bounds."""
    original, checks = patient.original, recipe.checks
    dense_shape = in_dense_shape(model, original, patient.manifest)
    tolerances, batch_size = checks.tolerances(), recipe.settings().batch_size
    labelled = label_samples(original, held, batch_size)[0] if patient.closed else held
    counts = populations(labelled, patient.closed).clamp(max=1).bincount(minlength=2) if patient.closed else None
    if counts is not None and bool(counts.all()):
        bounds = verify_unlearned(
            original,
            model,
            dense_shape,
            labelled,
            patient.closed,
            tolerances,
            walked=checks.walked,
            batch_size=batch_size,
            progress=progress,
        )
    else:
        if patient.closed:
            report["warnings"].append("no held-out image of both kinds of classes: forgetting was not measured again")
        bounds = verify_model(
            original,
            model,
            dense_shape,
            held,
            tolerances,
            walked=checks.walked,
            batch_size=batch_size,
            table=table,
            progress=progress,
        )
    add_bounds(report, bounds)
    add_outcome(report, bounds, heal_advice(report, recipe, bounds, original.kind))
    return bounds


@torch.no_grad()
def _audit(
    report: dict[str, Any], recipe: HealRecipe, patient: Patient, data: LearningData, model: nn.Module, run: Progress
) -> None:
    """Adds the attacks on a model that had forgotten classes before it was healed; a warning where they cannot run."""
    original, batch_size = patient.original, recipe.settings().batch_size
    try:
        if not same_shapes(original.model, model):
            raise ModhifiError("it is smaller than the original, and the attacks compare layer by layer")
        samples = load_unlearn_data(
            original,
            patient.closed,
            source=data.given,
            samples=len(data.given),
            evaluate=data.held,
            evaluation_samples=len(data.held),
            seed=recipe.seed,
            batch_size=batch_size,
        )
        sites = find_sites(original)
        attacked = audit(original, model, sites, samples, patient.closed, batch_size=batch_size, progress=run)
        outcome = attacked.figures
    except ModhifiError as error:
        report["warnings"].append(f"the healed model was not attacked: {error}")
        return
    add_audit(report, outcome, patient.manifest)


def _save(
    out: Path,
    recipe: HealRecipe,
    patient: Patient,
    data: LearningData,
    healed: Healed,
    report: dict[str, Any],
    clock: Clock,
    force: bool,
    process: FreshProcess | None,
) -> Path:
    """Writes the artefact, checks it in a fresh process and exports it; returns its path."""
    before = patient.manifest
    with clock.stage("save"):
        report["timing"] = clock.seconds
        path = save_artifact(
            out,
            healed.model.cpu(),
            patient.original if before is None else patient.edited,
            None,
            None,
            manifest={
                "task": "heal",
                "seed": recipe.seed,
                "gradients": "weights",
                "groups": [] if before is None else [group.model_dump() for group in before.groups],
                # What calibrated the cut is in the weights, too.
                "calibration": {
                    **describe_data(data.given, [*data.train.hashes, *seen_before(patient.edited)]),
                    **({"description": data.train.description} if data.drawn else {}),
                },
                "held_out": describe_data(data.held),
                "metrics": {k: report[k] for k in ("errors", "size", "healing") if k in report},
                "verdicts": report["verdicts"],
            },
            recipe=located(recipe.model_dump(mode="json")),
            report=report,
            log=clock.log(),
            force=force,
            process=process,
        )
    with clock.stage("reload"):
        batch = check_reload(path, patient.original, healed.model, data.held, process)
    for kind in recipe.export:
        with clock.stage(f"export {kind}"):
            export_model(healed.model, batch, path / f"model{EXPORTS[kind].suffix}", kind)
    clock.write_log(path)
    return path
