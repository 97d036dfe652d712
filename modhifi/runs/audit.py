"""An audit run: attacks on a model that was made to forget, from an artefact to a report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from modhifi.data.labels import class_name, label_samples, populations
from modhifi.data.samples import Samples
from modhifi.data.sources import load_samples
from modhifi.errors import ModhifiError
from modhifi.models.load import load_model
from modhifi.models.loaded import LoadedModel
from modhifi.models.weights import state_hash
from modhifi.progress import Progress, silent
from modhifi.runs.inputs import NOTHING, Given, forgotten_before, load_source, original_of, seen_before
from modhifi.runs.recipes.tasks import AuditChecks, AuditRecipe
from modhifi.runs.reports.head import head
from modhifi.runs.steady_memory import steady_memory
from modhifi.unlearning.attacks import measures
from modhifi.unlearning.audit import audit
from modhifi.unlearning.audit_text import VERDICTS
from modhifi.unlearning.data import UnlearnData, count_classes, find_classes, load_unlearn_data
from modhifi.unlearning.sites import Sites, find_sites

CONTROL = (
    "head-mask is the control: it closes the output and erases nothing, so what an attack finds there is what the "
    "features of the original hold."
)


def load_reference(
    name: str | None, original: LoadedModel, device: torch.device | str, given: Given = NOTHING
) -> tuple[LoadedModel, Sites] | None:
    """Loads the classifier that was retrained without the classes, with its sites; None for no name.

    Raises ModhifiError where it has other classes than the original, or reads images of another size.
    """
    if name is None:
        return None
    loaded = given.seen_by(load_model(name))
    classes, own = count_classes(loaded), count_classes(original)
    if classes != own:
        raise ModhifiError(
            f"the reference {name} has {classes} classes and {original.source} has {own}: it must have the original's, "
            "the forgotten one among them, and be trained without images of that one"
        )
    sizes = [tuple(model.example.shape[1:]) for model in (loaded, original)]
    if sizes[0] != sizes[1]:
        raise ModhifiError(
            f"the reference {name} reads images of {sizes[0]} and {original.source} of {sizes[1]}: both must read the "
            "same ones"
        )
    loaded.model.to(device)
    return loaded, find_sites(loaded)


def load_members(
    source: str | None, original: LoadedModel, classes: Sequence[int], *, samples: int, seed: int, batch_size: int
) -> Samples | None:
    """Loads the training images for the membership attack; None for no source.

    Raises ModhifiError where none is of the forgotten ``classes``.
    """
    if source is None:
        return None
    members = label_samples(original, load_samples(source, original, n=samples, seed=seed), batch_size)[0]
    if not bool((populations(members, classes) > 0).any()):
        names = ", ".join(class_name(original, c) for c in classes)
        raise ModhifiError(
            f"--members {source} holds no image of {names}; give training images of the forgotten classes"
        )
    return members


@steady_memory()
def run_audit(
    recipe: AuditRecipe,
    *,
    device: torch.device | str = "cpu",
    given: Given = NOTHING,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Attacks a model that was made to forget; returns the JSON-able report.

    The original and the classes are those of its manifest unless given. Raises ModhifiError where the original is
    unknown, or is not the model that the manifest's hash names.
    """
    directory, data_recipe = recipe.directory, recipe.data
    edited = load_model(directory if given.edited is None else given.edited, example=_example(given))
    if given.edited is not None and given.model is not None:
        edited = replace(edited, packing=given.model.packing)
    original = given.seen_by(given.model or _load_original(recipe, edited))
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
    class_names = recipe.forget or [str(c) for c in forgotten_before(edited)]
    if not class_names:
        raise ModhifiError(f"{directory} does not say which classes it forgot; give --forget")
    classes = find_classes(class_names, original)
    earlier = [c for c in dict.fromkeys(forgotten_before(edited) + forgotten_before(original)) if c not in classes]
    reference = load_reference(recipe.reference, original, device, given)
    members = load_members(
        data_recipe.members,
        original,
        classes,
        samples=data_recipe.samples,
        seed=recipe.seed,
        batch_size=recipe.batch_size,
    )
    data = load_unlearn_data(
        original,
        classes,
        source=data_recipe.source if given.data is None else given.data,
        samples=data_recipe.samples,
        forget_source=data_recipe.forget,
        evaluate=data_recipe.evaluate if given.evaluate is None else given.evaluate,
        evaluation_samples=data_recipe.samples,
        earlier=earlier,
        seed=recipe.seed,
        batch_size=recipe.batch_size,
    )
    notes += _seen(edited, directory, data)
    attacked = audit(
        original,
        edited.model,
        find_sites(original),
        data,
        classes,
        reference=reference,
        members=members,
        earlier=earlier,
        batch_size=recipe.batch_size,
        progress=progress,
    )
    report = {
        **head("audit", directory, original=original.source),
        **report_parts(attacked.figures),
        "data": {"source": data.test.description, "test_samples": len(data.test), "fit_samples": len(data.fit)},
        "warnings": [*edited.warnings, *data.notes, *notes, *attacked.warnings],
    }
    report["verdicts"] += check_audit(recipe.checks, report["audit"])
    return report


def _seen(edited: LoadedModel, directory: str, data: UnlearnData) -> list[str]:
    """A warning where images of the attacks or of the test calibrated the edit, or taught the model after it."""
    seen = set(seen_before(edited))
    hashes = (*data.fit.hashes, *data.test.hashes)
    known = sum(content_hash in seen for content_hash in hashes)
    if not known:
        return []
    return [
        f"{known} of the {len(hashes)} images that the attacks learn from and are tested on calibrated {directory}, or "
        "it learnt from them: on images it has not seen the figures may be worse; give other data"
    ]


def _load_original(recipe: AuditRecipe, edited: LoadedModel) -> LoadedModel:
    if recipe.original is not None:
        return load_model(recipe.original)
    if edited.artifact is None:
        raise ModhifiError(f"{recipe.directory} has no manifest; give the model before the edit with --original")
    return load_source(original_of(edited.artifact.manifest))


def _example(given: Given) -> torch.Tensor | None:
    """The example batch for a module that a program hands over; None where the model brings its own."""
    return None if given.edited is None or given.model is None else given.model.example


def check_audit(checks: AuditChecks, outcome: Mapping[str, Any]) -> list[dict[str, str]]:
    """The verdict on each check of the recipe."""
    verdicts = []
    if checks.at_least is not None:
        holds = VERDICTS.index(outcome["verdict"]) >= VERDICTS.index(checks.at_least)
        verdicts.append(_verdict(f"at least {checks.at_least}", holds, f"the attacks found: {outcome['verdict']}"))
    if checks.max_retain_loss is not None:
        rows = outcome["rows"]
        loss = rows["original"]["retain"] - rows["edited"]["retain"]
        text = f"the other classes lost {100 * loss:.2f} points on {outcome['test_samples']} test images"
        verdicts.append(_verdict(f"max retain loss {checks.max_retain_loss:g}", loss <= checks.max_retain_loss, text))
    return verdicts


def _verdict(name: str, holds: bool, text: str) -> dict[str, str]:
    return {"name": name, "verdict": "PASS-ON-SAMPLES" if holds else "FAIL", "text": text}


def report_parts(outcome: Mapping[str, Any]) -> dict[str, Any]:
    """The parts of a report that present an audit: summary, verdict, rows before and after, tables."""
    rows = outcome["rows"]
    names = list(rows)
    attack_measures = measures()
    shares = [
        m for m in attack_measures.values() if m.unit == "%" and any(rows[n].get(m.key) is not None for n in names)
    ]
    tables = [
        {
            "title": "Attacks, model by model",
            "columns": ["share of test images", *names],
            "unit": "%",
            "rows": [[m.label, *(rows[n].get(m.key) for n in names)] for m in shares],
            "note": CONTROL,
        },
        {
            "title": "Forgotten classes found by a linear probe, block by block",
            "columns": ["block", *names],
            "unit": "%",
            "rows": [[b["block"], *(b.get(n) for n in names)] for b in outcome["blocks"]],
        },
        {
            "title": "Accuracy by class",
            "columns": ["class", *names],
            "unit": "%",
            "rows": [[c["class"], *(c.get(n) for n in names)] for c in outcome["classes"]],
        },
    ]
    gone = (*outcome["forgotten"], *outcome.get("earlier", ()))
    retained = [c for c in outcome["classes"] if c["class"] not in gone]
    worst = min(retained, key=lambda c: c["edited"] - c["original"])
    return {
        "summary": outcome["conclusion"],
        "verdicts": [{"name": "forgetting", "verdict": outcome["verdict"], "text": outcome["conclusion"]}],
        "before_after": [
            {"name": m.label, "before": rows["original"].get(m.key), "after": rows["edited"].get(m.key), "unit": m.unit}
            for m in attack_measures.values()
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
            f"{attack_measures['kl'].label}, {attack_measures['kl'].unit}": rows["edited"]["kl"],
            attack_measures["membership"].label: rows["edited"]["membership"],
            "forgotten images go to": {m["class"]: _percentages(m["to"]) for m in outcome["moved"]},
        },
        "tables": tables,
        "audit": dict(outcome),
    }


def _percentages(shares: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {100 * share:.0f} %" for name, share in shares.items())
