"""An audit on its own, from an artefact to a report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from modhifi.data.labels import label_samples
from modhifi.data.sources import load_samples
from modhifi.errors import ModhifiError
from modhifi.models.load import load_model
from modhifi.models.loaded import LoadedModel
from modhifi.models.weights import state_hash
from modhifi.progress import Progress, silent
from modhifi.runs.inputs import NOTHING, Given, forgotten_before, load_source, original_of
from modhifi.runs.recipe_tasks import AuditChecks, AuditRecipe
from modhifi.unlearning.attacks import measures
from modhifi.unlearning.audit import audit
from modhifi.unlearning.audit_text import VERDICTS
from modhifi.unlearning.data import count_classes, find_classes, load_unlearn_data
from modhifi.unlearning.sites import Sites, find_sites


def load_reference(name: str | None, device: torch.device | str) -> tuple[LoadedModel, Sites] | None:
    if name is None:
        return None
    loaded = load_model(name)
    count_classes(loaded)
    loaded.model.to(device)
    return loaded, find_sites(loaded)


def run_audit(
    recipe: AuditRecipe,
    *,
    device: torch.device | str = "cpu",
    given: Given = NOTHING,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Attack a model that was made to forget; the original and the classes come from its manifest unless given.

    Raises ModhifiError where the original is unknown, or is not the model that the manifest's hash names.
    """
    directory, chosen = recipe.directory, recipe.data
    edited = load_model(directory if given.edited is None else given.edited, example=_example(given))
    original = given.model or _original(recipe, edited)
    notes = []
    base = None if edited.artifact is None else edited.artifact.manifest.base
    if base is not None and base.sha256 not in (None, state_hash(original.model)):
        if recipe.original is None and given.model is None:
            raise ModhifiError(f"{base.source} is not the model that {directory} was made from; give --original")
        notes.append(f"{original.source} is not the model that the manifest names as the base; it stands in for it")
    shapes = {k: tuple(v.shape) for k, v in original.model.state_dict().items()}
    if shapes != {k: tuple(v.shape) for k, v in edited.model.state_dict().items()}:
        raise ModhifiError(f"{original.source} has other shapes than {directory}; give the model before the edit")
    original.model.to(device)
    edited.model.to(device)
    names = recipe.forget or [str(c) for c in forgotten_before(edited)]
    if not names:
        raise ModhifiError(f"{directory} does not say which classes it forgot; give --forget")
    classes = find_classes(names, original)
    data = load_unlearn_data(
        original,
        classes,
        source=chosen.source if given.data is None else given.data,
        samples=chosen.samples,
        forget_source=chosen.forget,
        evaluate=chosen.evaluate if given.evaluate is None else given.evaluate,
        evaluation_samples=chosen.samples,
        seed=recipe.seed,
        batch_size=recipe.batch_size,
    )
    members = None
    if chosen.members is not None:
        loaded = load_samples(chosen.members, original, n=chosen.samples, seed=recipe.seed)
        members = label_samples(original, loaded, recipe.batch_size)[0]
    attacked = audit(
        original,
        edited.model,
        find_sites(original),
        data,
        classes,
        reference=load_reference(recipe.reference, device),
        members=members,
        batch_size=recipe.batch_size,
        progress=progress,
    )
    report = {
        "schema_version": 1,
        "title": f"modhifi audit {directory}",
        "task": "audit",
        "model": {"source": directory, "original": original.source},
        **shown(attacked),
        "data": {"source": data.test.description, "test_samples": len(data.test), "fit_samples": len(data.fit)},
        "warnings": [*data.notes, *notes],
    }
    report["verdicts"] += check_audit(recipe.checks, report["audit"])
    return report


def _original(recipe: AuditRecipe, edited: LoadedModel) -> LoadedModel:
    if recipe.original is not None:
        return load_model(recipe.original)
    if edited.artifact is None:
        raise ModhifiError(f"{recipe.directory} has no manifest; give the model before the edit with --original")
    return load_source(original_of(edited.artifact.manifest))


def _example(given: Given) -> torch.Tensor | None:
    """An input for a module that a program hands over; a name says it itself."""
    return None if given.edited is None or given.model is None else given.model.example


def check_audit(checks: AuditChecks, attacked: Mapping[str, Any]) -> list[dict[str, str]]:
    """The verdict on each check that was asked for."""
    verdicts = []
    if checks.at_least is not None:
        reached = VERDICTS.index(attacked["verdict"]) >= VERDICTS.index(checks.at_least)
        verdicts.append(_verdict(f"at least {checks.at_least}", reached, f"the attacks found: {attacked['verdict']}"))
    if checks.max_retain_loss is not None:
        rows = attacked["rows"]
        loss = rows["original"]["retain"] - rows["edited"]["retain"]
        text = f"the other classes lost {100 * loss:.2f} points on {attacked['test_samples']} test images"
        verdicts.append(_verdict(f"max retain loss {checks.max_retain_loss:g}", loss <= checks.max_retain_loss, text))
    return verdicts


def _verdict(name: str, holds: bool, text: str) -> dict[str, str]:
    return {"name": name, "verdict": "PASS-ON-SAMPLES" if holds else "FAIL", "text": text}


def shown(attacked: Mapping[str, Any]) -> dict[str, Any]:
    """An audit as the parts that a report shows: rows, tables, verdict."""
    rows = attacked["rows"]
    names = list(rows)
    every = measures()
    shares = [m for m in every.values() if m.unit == "%" and any(rows[n].get(m.key) is not None for n in names)]
    tables = [
        {
            "title": "Attacks, model by model",
            "columns": ["share of test images", *names],
            "unit": "%",
            "rows": [[m.label, *(rows[n].get(m.key) for n in names)] for m in shares],
        },
        {
            "title": "Forgotten classes found by a linear probe, block by block",
            "columns": ["block", *names],
            "unit": "%",
            "rows": [[b["block"], *(b.get(n) for n in names)] for b in attacked["blocks"]],
        },
        {
            "title": "Accuracy by class",
            "columns": ["class", *names],
            "unit": "%",
            "rows": [[c["class"], *(c.get(n) for n in names)] for c in attacked["classes"]],
        },
    ]
    kept = [c for c in attacked["classes"] if c["class"] not in attacked["forgotten"]]
    worst = min(kept, key=lambda c: c["edited"] - c["original"])
    return {
        "summary": attacked["conclusion"],
        "verdicts": [{"name": "forgetting", "verdict": attacked["verdict"], "text": attacked["conclusion"]}],
        "before_after": [
            {"name": m.label, "before": rows["original"].get(m.key), "after": rows["edited"].get(m.key), "unit": m.unit}
            for m in every.values()
            if m.headline
        ]
        + [
            {
                "name": f"worst retained class ({worst['class']})",
                "before": worst["original"],
                "after": worst["edited"],
                "unit": "%",
            }
        ],
        "errors": {
            f"{every['kl'].label}, {every['kl'].unit}": rows["edited"]["kl"],
            every["membership"].label: rows["edited"]["membership"],
            "forgotten images go to": {m["class"]: _percentages(m["to"]) for m in attacked["moved"]},
        },
        "tables": tables,
        "audit": dict(attacked),
    }


def _percentages(shares: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {100 * share:.0f} %" for name, share in shares.items())
