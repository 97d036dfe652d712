"""Many selectors, compensations and budgets on one set of moments: a model is measured once and pruned often."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from modhifi.calibration.cache import MomentCache
from modhifi.calibration.moments import Moments
from modhifi.data.samples import Samples
from modhifi.errors import IndefiniteError
from modhifi.models.loaded import LoadedModel
from modhifi.progress import Progress, silent
from modhifi.pruning.budget import Budget
from modhifi.pruning.curves import removal_curves
from modhifi.pruning.elimination import Curve
from modhifi.pruning.left_alone import UNSOLVED, leave, unmeasured
from modhifi.pruning.prune import solve, trial_share
from modhifi.pruning.settings import PruneSettings
from modhifi.pruning.stages import Pruned, choose_groups, find_structure, measure_moments
from modhifi.structure.groups import Structure


@dataclass(frozen=True)
class Measured:
    """A model with the moments of every reader of its prunable groups, on some samples.

    ``left`` has the groups that could not be measured or solved, each with the reason.
    """

    loaded: LoadedModel
    samples: Samples
    structure: Structure
    moments: Mapping[str, Moments]
    left: Mapping[str, str]


def measure_once(
    loaded: LoadedModel,
    samples: Samples,
    settings: PruneSettings,
    progress: Progress = silent,
    cache: MomentCache | None = None,
) -> Measured:
    """Finds the groups that ``settings`` allow and measures their readers, in one pass per sample.

    Raises ModhifiError where no group is left, and where the Grams do not fit into memory together.
    """
    structure = choose_groups(find_structure(loaded), settings)
    moments = measure_moments(loaded, structure, samples, settings.sampling, progress, cache)
    left = unmeasured(loaded, structure, moments, samples, settings.batch_size)
    return Measured(loaded, samples, leave(structure, left, settings.strict), moments, left)


def order_once(
    measured: Measured, settings: Sequence[PruneSettings], progress: Progress = silent
) -> tuple[Measured, dict[str, Curve]]:
    """The removal curves that runs of one selector share, for all their compensations and budgets.

    The model comes back without the groups that cannot be solved. Raises :class:`modhifi.errors.ModhifiError` where
    none is left.
    """
    trial = max((share for s in settings if (share := trial_share(s)) is not None), default=None)
    while True:
        try:
            curves = removal_curves(
                measured.loaded.model, measured.structure, measured.moments, settings[0], progress, trial
            )
            return measured, curves
        except IndefiniteError as error:
            if not error.groups:
                raise
            unsolved = dict.fromkeys(error.groups, UNSOLVED)
            structure = leave(measured.structure, unsolved, settings[0].strict)
            measured = replace(measured, structure=structure, left={**measured.left, **unsolved})


def prune_measured(
    measured: Measured,
    curves: Mapping[str, Curve],
    budget: Budget,
    settings: PruneSettings,
    progress: Progress = silent,
) -> Pruned:
    """Prunes as :func:`modhifi.pruning.prune.prune_model` does with these settings, from known moments and curves.

    Raises ModhifiError as that does.
    """
    if trial_share(settings) is None:  # those of another compensation
        curves = {name: replace(curve, trial=None) for name, curve in curves.items()}
    budget.require(measured.structure)
    pruned = solve(
        measured.loaded,
        measured.structure,
        measured.samples,
        budget,
        settings,
        None,
        measured.moments,
        progress,
        curves,
    )
    return replace(pruned, left=measured.left)
