"""Check an edited model against its original on data it was not made from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from modhifi.bounds.ladder import BoundReport, verify_model, verify_unlearned
from modhifi.data.labels import label_samples
from modhifi.data.samples import Samples
from modhifi.data.sources import load_samples
from modhifi.errors import ModhifiError
from modhifi.models.artifact import load_artifact, read_manifest, weights_match
from modhifi.models.loaded import LoadedModel
from modhifi.models.skeleton import same_modules, same_shapes
from modhifi.models.weights import state_hash
from modhifi.progress import Progress, silent
from modhifi.pruning.stages import find_structure
from modhifi.runs.defaults import complete_verify
from modhifi.runs.inputs import NOTHING, Given, load_source, original_of
from modhifi.runs.recipe_tasks import VerifyRecipe
from modhifi.structure.expand import expand, plan_of


def run_verify(
    recipe: VerifyRecipe,
    *,
    device: torch.device | str = "cpu",
    given: Given = NOTHING,
    progress: Progress = silent,
) -> tuple[BoundReport, VerifyRecipe]:
    """Bound how far an edited model's outputs moved; returns the bounds, and the recipe with its defaults written out.

    Raises ModhifiError for bad input, as `load_edited` does, and where held-out samples took part in the calibration
    (unless the recipe allows it).
    """
    original = given.model or load_source(recipe.against or original_of(recipe.directory))
    edited, manifest = (given.edited, {}) if given.edited is not None else load_edited(recipe.directory, original)
    recipe = complete_verify(recipe, original, device)
    data, size = recipe.data, recipe.batch_size
    assert data.samples is not None and size is not None
    source = data.source if given.data is None else given.data
    held = load_samples(source, original, n=data.samples, seed=recipe.seed, window=data.window, progress=progress)
    held = held_out(manifest, held, data.allow_overlap)
    dense_shape = in_dense_shape(edited, original, manifest)
    original.model.to(device)
    edited.to(device)
    tolerances, walked = recipe.checks.tolerances(), recipe.checks.walked
    forgotten = [entry["index"] for entry in manifest.get("forgotten") or []]
    if not forgotten:
        bounds = verify_model(
            original, edited, dense_shape, held, tolerances, walked=walked, batch_size=size, progress=progress
        )
        return bounds, recipe
    held, remark = label_samples(original, held, size)
    bounds = verify_unlearned(
        original,
        edited,
        dense_shape,
        held,
        forgotten,
        tolerances,
        walked=walked,
        batch_size=size,
        progress=progress,
    )
    return replace(bounds, warnings=(*bounds.warnings, *([remark] if remark else []))), recipe


def load_edited(directory: str | Path, original: LoadedModel) -> tuple[nn.Module, dict[str, Any]]:
    """The model of an artefact, and its manifest.

    Raises ModhifiError where its weights are not those that were saved, and where ``original`` is another model than
    the one it was made from.
    """
    manifest = read_manifest(directory)
    if not weights_match(directory):
        raise ModhifiError(
            f"the weights in {directory} are not those that were saved: their hash differs from the manifest's; "
            "restore the files or make the artefact again"
        )
    edited = load_artifact(directory).model
    if not same_modules(original.model, edited):
        raise ModhifiError(
            f"{original.source} has another architecture than {directory}; give the model it was made from, "
            f"{manifest['base'].get('source')}"
        )
    expected = manifest["base"].get("sha256")
    if expected is not None and state_hash(original.model) != expected:
        raise ModhifiError(f"{original.source} has other weights than the one {directory} was made from; give that one")
    return edited, manifest


def in_dense_shape(edited: nn.Module, original: LoadedModel, manifest: Mapping[str, Any]) -> nn.Module | None:
    """The edited model in the original's shapes, None where its manifest does not tell how to get there."""
    if manifest.get("groups"):
        # After an earlier cut the groups count components of the artefact before.
        if any(edit["task"] == "prune" for edit in manifest["base"].get("edits_before", [])):
            return None
        return expand(edited, original.model, find_structure(original), plan_of(manifest))
    return edited if same_shapes(original.model, edited) else None


def held_out(manifest: Mapping[str, Any], samples: Samples, allow_overlap: bool = False) -> Samples:
    """The samples, if none of them took part in the making of the artefact.

    Raises ModhifiError otherwise, unless ``allow_overlap``.
    """
    seen = set(manifest.get("calibration", {}).get("hashes", []))
    common = [name for name, item in zip(samples.names, samples.hashes, strict=True) if item in seen]
    if common and not allow_overlap:
        raise ModhifiError(
            f"{len(common)} of {len(samples)} samples calibrated this model ({common[0]}): bounds need data it has not "
            "seen; give other data, or --allow-overlap"
        )
    return samples
