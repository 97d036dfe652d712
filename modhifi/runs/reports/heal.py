"""The parts of a healing run's report: what was learnt, and the figures of original, edited and healed model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from modhifi.artifacts.formatting import number
from modhifi.bounds.held_out import HeldOut
from modhifi.data.samples import Samples
from modhifi.healing.blocks import has_blocks
from modhifi.healing.healed import Healed
from modhifi.models.loaded import LoadedModel
from modhifi.models.manifest import Manifest
from modhifi.progress import Progress
from modhifi.runs.audit import report_parts
from modhifi.runs.recipes.heal import HealRecipe
from modhifi.runs.reports.head import head
from modhifi.runs.reports.measurements import before_after, measure_errors, measure_run
from modhifi.runs.reports.prune import plain_info
from modhifi.unlearning.attacks import measures

# What is healed, by the task that made it.
EDITED = {"prune": "pruned", "unlearn": "unlearned", "heal": "healed before"}
# What products were made in, by accelerate's name of it.
PRECISIONS = {"no": "", "bf16": ", in bfloat16", "fp16": ", in float16"}


def report_of(
    recipe: HealRecipe,
    original: LoadedModel,
    edited: LoadedModel,
    train: Samples,
    validation: Samples,
    held: Samples,
    healed: Healed,
    command: str,
) -> dict[str, Any]:
    """The report of a healing run before anything is measured, JSON-able; see :mod:`modhifi.artifacts.report`."""
    task = "prune" if edited.artifact is None else edited.artifact.manifest.task or "prune"
    warnings = list(healed.notes)
    if healed.steps == 0:
        warnings.append("the end came before the first step: the weights are those it came with; give more --minutes")
    elif healed.best == 0:
        warnings.append("no step made the model better on the validation samples: its weights are those it came with")
    if len(held) < (recipe.data.evaluation_samples or 0):
        warnings.append(
            f"{len(held):,} samples are held out, where {recipe.data.evaluation_samples:,} were asked for: there are "
            "no more"
        )
    forgot = edited.artifact is not None and edited.artifact.manifest.forgotten
    if recipe.method.blocks > 0 and not healed.blocks and not forgot:
        why = "the original has no list of blocks"
        if has_blocks(original.model):
            why = (
                "none has the original's shape and a row for each item, and which channels are left is known of one "
                "cut only"
            )
        warnings.append(f"no block is matched, since {why}: the student learnt from the output alone")
    lineage = [original.source, *_edits(edited), f"healed, {healed.best} steps"]
    return {
        **head(
            "heal",
            recipe.directory,
            original=original.source,
            lineage=" → ".join(lineage),
            framework=original.framework,
            **plain_info(original.info),
        ),
        "data": {
            "learnt from": train.description,
            "held_out": held.description,
            "samples": len(set(train.hashes)),
            "validation_samples": len(validation),
            "held_out_samples": len(held),
        },
        "settings": recipe.model_dump(mode="json"),
        "columns": {"before": "original", "between": EDITED.get(task, "edited"), "after": "healed"},
        "healing": {
            "gradients": "to the weights",
            "steps": healed.steps,
            "seconds": healed.seconds,
            "best": healed.best,
            "ended early": healed.early,
            "matched blocks": list(healed.blocks),
            "precision": healed.precision,
            "curve": [dict(entry) for entry in healed.curve],
        },
        "warnings": warnings,
        "command": command,
    }


def _edits(edited: LoadedModel) -> list[str]:
    """The edits on the way to an artefact, in words."""
    if edited.artifact is None:
        return ["edited"]
    manifest = edited.artifact.manifest
    tasks = [*(edit.get("task") for edit in manifest.base.edits_before), manifest.task]
    return [EDITED.get(str(task), str(task)) if task != "heal" else "healed" for task in tasks]


def measure_healing(
    report: dict[str, Any],
    original: LoadedModel,
    models: Sequence[nn.Module],
    held: Samples,
    tables: Sequence[HeldOut],
    batch_size: int,
    progress: Progress,
) -> None:
    """Adds every measured figure to a report, in place, each beside that of the model before it was healed.

    ``models`` are the one before and the healed one, and ``tables`` compare the original with each.
    """
    (edited, healed), (before, after) = models, tables
    report |= measure_run(original, healed, held, after, batch_size, progress)
    earlier = measure_errors(original, edited, held, before, batch_size)
    report["errors_before_healing"] = earlier
    rows, earlier_rows = before_after(report), before_after({**report, "errors": earlier})
    # Its shapes are those of the healed model, and so are its times, which were taken once.
    report["before_after"] = [{**row, "between": other["after"]} for row, other in zip(rows, earlier_rows, strict=True)]
    healing = report["healing"]
    report["summary"] = (
        f"distilled from the original with gradients to the weights for {healing['seconds'] / 60:.3g} minutes"
        f"{PRECISIONS[healing['precision']]}: those "
        f"after {healing['best']:,} of {healing['steps']:,} steps were the best, and are kept"
    )


def healing_verdicts(healed: Healed) -> list[dict[str, str]]:
    """The verdict that states what the validation samples showed, and the failure of a loss that is not finite."""
    first, best = healed.curve[0], next(e for e in healed.curve if e["step"] == healed.best)
    key, unit = ("divergence", "") if first["agreement"] is None else ("agreement", "%")
    ended = ", where it stopped getting better" if healed.early else ""
    text = (
        f"{key} with the original on the validation samples {number(first[key], unit)} before, "
        f"{number(best[key], unit)} after {healed.best:,} of {healed.steps:,} steps{ended}; "
        "gradients reached the weights"
    )
    verdicts = [{"name": "healing", "verdict": "MEASURED", "text": text}]
    if healed.broken is not None:
        text = (
            f"the loss was not finite before step {healed.broken}; the weights of step {healed.best} were kept: try a "
            "lower --learning-rate"
        )
        verdicts.append({"name": "finite loss", "verdict": "FAIL", "text": text})
    return verdicts


def add_audit(report: dict[str, Any], outcome: Mapping[str, Any], manifest: Manifest | None) -> None:
    """Adds what attacks on the healed model found, in place, beside what they found before it was healed."""
    parts = report_parts(outcome)
    earlier = {} if manifest is None else (manifest.model_extra or {}).get("metrics") or {}
    keys = {measure.label: measure.key for measure in measures().values()}
    rows = [{**row, "between": earlier.get(keys.get(row["name"], ""))} for row in parts["before_after"]]
    report["before_after"] = [*report["before_after"], *rows]
    report["verdicts"] = [*report["verdicts"], *parts["verdicts"]]
    report["tables"] = [*report.get("tables", []), *parts["tables"]]
    report["audit"] = parts["audit"]
