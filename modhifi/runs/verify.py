"""A verification run: bounds of an edited model against its original, on data that did not calibrate it."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from modhifi.bounds.ladder import BoundReport, verify_model, verify_unlearned
from modhifi.data.labels import label_samples
from modhifi.data.samples import Samples
from modhifi.data.sources import load_samples
from modhifi.errors import ModhifiError
from modhifi.models.artifact import load_artifact
from modhifi.models.loaded import LoadedModel
from modhifi.models.manifest import Manifest
from modhifi.models.plain_copy import in_order
from modhifi.models.skeleton import same_modules, same_shapes
from modhifi.models.weights import state_hash
from modhifi.progress import Progress, silent
from modhifi.pruning.stages import find_structure
from modhifi.runs.defaults import complete_verify
from modhifi.runs.inputs import NOTHING, Given, load_source, original_of
from modhifi.runs.recipes.prune import ModelSource
from modhifi.runs.recipes.tasks import VerifyRecipe
from modhifi.runs.reports.prune import skipped_warnings
from modhifi.runs.steady_memory import steady_memory
from modhifi.structure.expand import expand


@steady_memory()
def run_verify(
    recipe: VerifyRecipe,
    *,
    device: torch.device | str = "cpu",
    given: Given = NOTHING,
    progress: Progress = silent,
) -> tuple[BoundReport, VerifyRecipe]:
    """Bounds the change of an edited model's outputs; returns the bounds, and the recipe with every default.

    Raises ModhifiError for bad input, as :func:`load_pair` does, and where held-out samples took part in the
    calibration (unless the recipe allows it).
    """
    original, loaded, manifest = load_pair(recipe.directory, recipe.against, given)
    edited = loaded.model
    if reason := original.incomparable():
        raise ModhifiError(f"no bound is available: {reason}; wrap the model to return one tensor with a row an item")
    recipe = complete_verify(recipe, original, device)
    data, batch_size = recipe.data, recipe.batch_size
    assert data.samples is not None and batch_size is not None
    source = data.source if given.data is None else given.data
    held = load_samples(source, original, n=data.samples, seed=recipe.seed, window=data.window, progress=progress)
    if manifest is not None and not data.allow_overlap:
        require_unseen(manifest, held)
    warnings = [*original.warnings, *skipped_warnings(held)]
    dense_shape = in_dense_shape(edited, original, manifest)
    original.model.to(device)
    edited.to(device)
    tolerances, walked = recipe.checks.tolerances(), recipe.checks.walked
    forgotten = [] if manifest is None else [entry.index for entry in manifest.forgotten]
    if not forgotten:
        bounds = verify_model(
            original, edited, dense_shape, held, tolerances, walked=walked, batch_size=batch_size, progress=progress
        )
        return replace(bounds, warnings=(*warnings, *bounds.warnings)), recipe
    held, remark = label_samples(original, held, batch_size)
    bounds = verify_unlearned(
        original,
        edited,
        dense_shape,
        held,
        forgotten,
        tolerances,
        walked=walked,
        batch_size=batch_size,
        progress=progress,
    )
    return replace(bounds, warnings=(*warnings, *bounds.warnings, *([remark] if remark else []))), recipe


def load_pair(
    directory: str, against: ModelSource | None, given: Given
) -> tuple[LoadedModel, LoadedModel, Manifest | None]:
    """Loads the original, the edited model and, if that is an artefact, its manifest, None for a module.

    Raises ModhifiError where the artefact's weights are not those that were saved, and where the original is another
    model than the one it was made from.
    """
    if given.edited is not None:
        assert given.model is not None
        if any(module.training for module in given.edited.modules()):
            raise ModhifiError("the edited model is in train mode, where outputs are random; call .eval() first")
        original = given.seen_by(given.model)
        return original, replace(original, model=in_order(given.edited), artifact=None), None
    own = given.model is not None and given.model.framework == "torch"
    edited = load_artifact(directory, given.model.model if own and given.model is not None else None)
    assert edited.artifact is not None
    manifest = edited.artifact.manifest
    if not edited.artifact.intact:
        raise ModhifiError(
            f"the weights in {directory} are not those that were saved: their hash differs from the manifest's; "
            "restore the files or make the artefact again"
        )
    original = given.seen_by(given.model or load_source(against or original_of(manifest)))
    original = replace(original, values=original.values or manifest.base.values)
    if manifest.base.sha256 != state_hash(original.model):  # else it is the one, whatever blocks are gone
        if not same_modules(original.model, edited.model):
            raise ModhifiError(
                f"{original.source} has another architecture than {directory}; give the model it was made from, "
                f"{manifest.base.source}"
            )
        if manifest.base.sha256 is not None:
            raise ModhifiError(
                f"{original.source} has other weights than the one {directory} was made from; give that one"
            )
    return original, edited, manifest


def in_dense_shape(edited: nn.Module, original: LoadedModel, manifest: Manifest | None) -> nn.Module | None:
    """The edited model in the original's shapes, None where its manifest does not determine it."""
    if manifest is not None and manifest.groups:
        if not counts_in_original(manifest):
            return None
        if any(group.kind == "experts" for group in manifest.groups):
            return None
        return expand(edited, original.model, find_structure(original, on_request=True), manifest.plan())
    return edited if same_shapes(original.model, edited) else None


def counts_in_original(manifest: Manifest) -> bool:
    """Whether the groups count components of the original; after an earlier cut they count those of what it left."""
    return [*(edit["task"] for edit in manifest.base.edits_before), manifest.task].count("prune") <= 1


def require_unseen(manifest: Manifest, samples: Samples) -> None:
    """Raises ModhifiError if one of the samples calibrated the artefact."""
    seen = set(manifest.calibration.hashes)
    common = [name for name, content_hash in zip(samples.names, samples.hashes, strict=True) if content_hash in seen]
    if common:
        raise ModhifiError(
            f"{len(common)} of {len(samples)} samples calibrated this model ({common[0]}): bounds need data it has not "
            "seen; give other data, or --allow-overlap"
        )
