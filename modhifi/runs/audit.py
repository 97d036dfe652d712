"""An audit on its own, from an artefact to a report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from modhifi.data.labels import label_samples
from modhifi.data.sources import load_samples
from modhifi.errors import ModhifiError
from modhifi.models.load import load_model
from modhifi.models.loaded import LoadedModel
from modhifi.models.weights import state_hash
from modhifi.progress import Progress, silent
from modhifi.runs.inputs import forgotten_before, load_source, original_of
from modhifi.unlearning.audit import MEASURES, audit
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
    directory: str,
    *,
    source: str,
    forget_names: Sequence[str] = (),
    original: str | None = None,
    forget_source: str | None = None,
    evaluate: str | None = None,
    reference: str | None = None,
    members: str | None = None,
    samples: int = 2000,
    seed: int = 0,
    batch_size: int = 64,
    device: torch.device | str = "cpu",
    progress: Progress = silent,
) -> dict[str, Any]:
    """Attack a model that was made to forget; ``original`` and the classes come from its manifest unless given.

    Raises ModhifiError where the original is unknown, or is not the model that the manifest's hash names.
    """
    edited = load_model(directory)
    manifest = None if edited.artifact is None else edited.artifact.manifest
    if original is not None:
        loaded = load_model(original)
    elif manifest is not None:
        loaded = load_source(original_of(manifest))
    else:
        raise ModhifiError(f"{directory} has no manifest; give the model before the edit with --original")
    notes = []
    if manifest is not None and manifest.base.sha256 not in (None, state_hash(loaded.model)):
        if original is None:
            raise ModhifiError(f"{loaded.source} is not the model that {directory} was made from; give --original")
        notes.append(f"{original} is not the model that the manifest names as the base; it stands in for it")
    known = {k: tuple(v.shape) for k, v in loaded.model.state_dict().items()}
    if known != {k: tuple(v.shape) for k, v in edited.model.state_dict().items()}:
        raise ModhifiError(f"{loaded.source} has other shapes than {directory}; give the model before the edit")
    loaded.model.to(device)
    edited.model.to(device)
    names = list(forget_names) or [str(c) for c in forgotten_before(edited)]
    if not names:
        raise ModhifiError(f"{directory} does not say which classes it forgot; give --forget")
    classes = find_classes(names, loaded)
    data = load_unlearn_data(
        loaded,
        classes,
        source=source,
        samples=samples,
        forget_source=forget_source,
        evaluate=evaluate,
        evaluation_samples=samples,
        seed=seed,
        batch_size=batch_size,
    )
    member_set = None
    if members is not None:
        member_set = label_samples(loaded, load_samples(members, loaded, n=samples, seed=seed), batch_size)[0]
    attacked = audit(
        loaded,
        edited.model,
        find_sites(loaded),
        data,
        classes,
        reference=load_reference(reference, device),
        members=member_set,
        batch_size=batch_size,
        progress=progress,
    )
    return {
        "schema_version": 1,
        "title": f"modhifi audit {directory}",
        "task": "audit",
        "model": {"source": directory, "original": loaded.source},
        **shown(attacked),
        "data": {"source": data.test.description, "test_samples": len(data.test), "fit_samples": len(data.fit)},
        "warnings": [*data.notes, *notes],
    }


def shown(attacked: Mapping[str, Any]) -> dict[str, Any]:
    """An audit as the parts that a report shows: rows, tables, verdict."""
    rows = attacked["rows"]
    names = list(rows)
    measured = [key for key in MEASURES if any(rows[n].get(key) is not None for n in names)]
    tables = [
        {
            "title": "Attacks, model by model",
            "columns": ["share of test images", *names],
            "unit": "%",
            "rows": [[MEASURES[key], *(rows[n].get(key) for n in names)] for key in measured],
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
            {"name": MEASURES[key], "before": rows["original"].get(key), "after": rows["edited"].get(key), "unit": "%"}
            for key in MEASURES
            if key not in ("worst_loss", "recall_plain", "membership", "original_head")
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
            "KL to the original on retained images, over the classes that stay, nats": rows["edited"]["kl"],
            "membership AUC on forgotten classes": rows["edited"]["membership"],
            "forgotten images go to": {m["class"]: _percentages(m["to"]) for m in attacked["moved"]},
        },
        "tables": tables,
        "audit": dict(attacked),
    }


def _percentages(shares: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {100 * share:.0f} %" for name, share in shares.items())
