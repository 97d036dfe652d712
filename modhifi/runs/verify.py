"""Check an artefact against its original on data it was not made from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from modhifi.bounds.ladder import BoundReport, verify_model, verify_unlearned
from modhifi.bounds.verdicts import Tolerances
from modhifi.data.in_memory import Source
from modhifi.data.labels import label_samples
from modhifi.data.samples import Samples
from modhifi.data.sources import load_samples
from modhifi.data.text import window_of
from modhifi.errors import ModhifiError
from modhifi.models.artifact import load_artifact
from modhifi.models.loaded import LoadedModel
from modhifi.models.manifest import Manifest
from modhifi.models.skeleton import same_modules, same_shapes
from modhifi.models.weights import state_hash
from modhifi.progress import Progress, silent
from modhifi.pruning.stages import find_structure
from modhifi.runs.defaults import Amounts, amounts
from modhifi.runs.inputs import load_source, original_of
from modhifi.runs.recipe import ModelSource
from modhifi.structure.expand import expand


def verify_artifact(
    directory: str | Path,
    against: ModelSource | LoadedModel | None,
    data: Source,
    tolerances: Tolerances,
    *,
    samples: int | None = None,
    window: int | None = None,
    walked: int | None = None,
    allow_overlap: bool = False,
    batch_size: int | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
    progress: Progress = silent,
) -> BoundReport:
    """The ladder of bounds for an artefact directory; ``samples``, ``window`` and ``batch_size`` as in `held_amounts`.

    ``against`` None is the model that the manifest names.
    Raises ModhifiError where its weights are not those that were saved, where ``against`` is another model than the one
    it was made from, and where held-out samples took part in the calibration (unless ``allow_overlap``).
    """
    edited = load_artifact(directory)
    assert edited.artifact is not None
    manifest = edited.artifact.manifest
    if not edited.artifact.intact:
        raise ModhifiError(
            f"the weights in {directory} are not those that were saved: their hash differs from the manifest's; "
            "restore the files or make the artefact again"
        )
    original = against if isinstance(against, LoadedModel) else load_source(against or original_of(manifest))
    if not same_modules(original.model, edited.model):
        raise ModhifiError(
            f"{original.source} has another architecture than {directory}; give the model it was made from, "
            f"{manifest.base.source}"
        )
    if manifest.base.sha256 not in (None, state_hash(original.model)):
        raise ModhifiError(f"{original.source} has other weights than the one {directory} was made from; give that one")
    usual = held_amounts(original, device)
    n, window = samples or usual.evaluation_samples, window or usual.window
    held = held_out(manifest, load_samples(data, original, n=n, seed=seed, window=window), allow_overlap)
    dense_shape = None
    cut_before = any(edit["task"] == "prune" for edit in manifest.base.edits_before)
    if manifest.groups:
        if not cut_before:  # else they count components of the artefact before
            dense_shape = expand(edited.model, original.model, find_structure(original), manifest.plan())
    elif same_shapes(original.model, edited.model):
        dense_shape = edited.model
    original.model.to(device)
    edited.model.to(device)
    size = batch_size or usual.batch_size
    gone = [c.index for c in manifest.forgotten]
    if gone:
        held, remark = label_samples(original, held, size)
        found = verify_unlearned(
            original,
            edited.model,
            dense_shape,
            held,
            gone,
            tolerances,
            walked=walked,
            batch_size=size,
            progress=progress,
        )
        return replace(found, warnings=(*found.warnings, *([remark] if remark else [])))
    return verify_model(
        original, edited.model, dense_shape, held, tolerances, walked=walked, batch_size=size, progress=progress
    )


def held_amounts(loaded: LoadedModel, device: torch.device | str) -> Amounts:
    """How much to check on where nothing is said: 1,000 images, or the windows that a pruning run would hold out."""
    usual = amounts(loaded, device)
    if usual.window is None:
        return replace(usual, evaluation_samples=1000)
    return replace(usual, window=min(usual.window, window_of(loaded, None)))


def held_out(manifest: Manifest, samples: Samples, allow_overlap: bool = False) -> Samples:
    """The samples, if none of them took part in the making of the artefact.

    Raises ModhifiError otherwise, unless ``allow_overlap``.
    """
    seen = set(manifest.calibration.hashes)
    common = [name for name, item in zip(samples.names, samples.hashes, strict=True) if item in seen]
    if common and not allow_overlap:
        raise ModhifiError(
            f"{len(common)} of {len(samples)} samples calibrated this model ({common[0]}): bounds need data it has not "
            "seen; give other data, or --allow-overlap"
        )
    return samples
