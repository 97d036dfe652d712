"""Each group's error counts by its share of its readers' output energy, which costs no forward pass."""

from __future__ import annotations

from collections.abc import Mapping

from modhifi.calibration.moments import Moments
from modhifi.data.samples import Samples
from modhifi.models.loaded import LoadedModel
from modhifi.progress import Progress
from modhifi.pruning.budget import Budget
from modhifi.pruning.elimination import Curve
from modhifi.pruning.planned import Planned
from modhifi.pruning.settings import PruneSettings
from modhifi.pruning.stages import make_plan
from modhifi.pruning.weightings.base import WEIGHTINGS, Weighting
from modhifi.structure.groups import Structure


def plan(
    loaded: LoadedModel,
    structure: Structure,
    curves: Mapping[str, Curve],
    moments: Mapping[str, Moments],
    samples: Samples,
    budget: Budget,
    settings: PruneSettings,
    progress: Progress,
) -> Planned:
    """The allocation by the curves alone."""
    return Planned(make_plan(loaded.model, structure, curves, budget, settings))


WEIGHTINGS.register(Weighting("energy", "by 1 over the output energy of its own readers", "ours", plan))
