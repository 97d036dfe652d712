"""Prune one model: moments, curves, plan, compensated weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

from modhifi.calibration.cache import MomentCache
from modhifi.calibration.distributed import ALONE, Processes, shared
from modhifi.calibration.gram_quality import gram_quality
from modhifi.calibration.moments import Moments
from modhifi.data.samples import Samples
from modhifi.errors import IndefiniteError, ModhifiError, UnfollowedError
from modhifi.models.loaded import LoadedModel
from modhifi.progress import Progress, silent
from modhifi.pruning.blockwise import contribute_in_blocks, fit_in_memory, prune_in_blocks
from modhifi.pruning.budget import Budget
from modhifi.pruning.compensations import COMPENSATIONS
from modhifi.pruning.curves import hifi_plan, ordered_curves, removal_curves
from modhifi.pruning.depth_order import depth_curves
from modhifi.pruning.elimination import Curve
from modhifi.pruning.layouts import LAYOUTS
from modhifi.pruning.layouts.base import EXACT
from modhifi.pruning.left_alone import UNFOLLOWED, UNSOLVED, leave, unmeasured
from modhifi.pruning.metered import Meter, Metered
from modhifi.pruning.metered_plan import metered_plan
from modhifi.pruning.planned import Planned, Way
from modhifi.pruning.rank_basis import in_leading_basis
from modhifi.pruning.readers import best_singletons, readers_of
from modhifi.pruning.selectors import SELECTORS
from modhifi.pruning.sensitivity import least_change
from modhifi.pruning.settings import PruneSettings
from modhifi.pruning.stages import (
    Pruned,
    Rounded,
    apply_plan,
    choose_groups,
    find_structure,
    follow_plans,
    make_plan,
    measure_moments,
)
from modhifi.pruning.weightings import WEIGHTINGS
from modhifi.structure.groups import Structure
from modhifi.structure.plan import Plan


def _chosen(loaded: LoadedModel, settings: PruneSettings, plan: Plan | None) -> Structure:
    structure = choose_groups(
        find_structure(loaded, on_request=bool(settings.only) or plan is not None), settings, plan
    )
    if plan is None:
        return structure
    plan.check(structure)
    return structure.select(plan.kept)


def needs_moments(structure: Structure, settings: PruneSettings, plan: Plan | None) -> bool:
    """Whether anything of a run asks what its layers do: the order, the budget's layout, or the compensation."""
    if any(group.kind == "ranks" or (plan is None and group.parts) for group in structure.prunable):
        return True
    if settings.sequential is not None or COMPENSATIONS[settings.compensate].needs_moments:
        return True
    ordered = not SELECTORS[settings.selector].needs_moments and not LAYOUTS[settings.layout].reads_costs
    return plan is None and (settings.eta is not None or not ordered)


def contribute(
    loaded: LoadedModel, samples: Samples, settings: PruneSettings, plan: Plan | None, team: Processes
) -> None:
    """Run this process's share of the calibration passes, for the main process that runs :func:`prune_model`."""
    structure = _chosen(loaded, settings, plan)
    if not needs_moments(structure, settings, plan):
        return
    if shared(None, team) and contribute_in_blocks(loaded, structure, samples, settings, team):
        return
    moments = measure_moments(loaded, structure, samples, settings.sampling, team=team)
    loaded, turned = in_leading_basis(loaded, structure, moments, settings.ridge)
    follow_plans(loaded, structure, samples, turned, settings, team)


def prune_model(
    loaded: LoadedModel,
    samples: Samples,
    budget: Budget | None,
    settings: PruneSettings = PruneSettings(),
    *,
    plan: Plan | None = None,
    progress: Progress = silent,
    cache: MomentCache | None = None,
    team: Processes = ALONE,
    meter: Meter | None = None,
) -> Pruned:
    """The whole method on one loaded model, which itself stays as it is.

    ``meter`` is needed for a budget of time or memory. ``budget`` None is allowed with ``settings.eta`` (keep HiFi
    sets) or with a given ``plan`` (replay it). Of a ``team`` of processes this is the main one; the others
    call :func:`contribute`.
    """
    structure = _chosen(loaded, settings, plan)
    if budget is not None:
        budget.require(structure)
    if budget is not None and meter is not None:
        budget = budget.gauged(meter.gauge(loaded, structure, settings.rounding))
    if not needs_moments(structure, settings, plan):
        return _prune_unmeasured(loaded, structure, budget, settings, plan, meter)
    blocks = plan is None and budget is not None and block_by_block(loaded, structure, settings, cache is not None)
    # The main process says so: what fits may differ between them.
    if shared(blocks, team) and budget is not None:
        pruned = prune_in_blocks(loaded, structure, samples, budget, settings, progress, meter, team)
        if pruned is not None:
            return pruned
    moments = measure_moments(loaded, structure, samples, settings.sampling, progress, cache, team)
    left = unmeasured(loaded, structure, moments, samples, settings.batch_size)
    while True:
        structure = leave(structure, left, settings.strict)
        try:
            turned, known = in_leading_basis(loaded, structure, moments, settings.ridge)
            pruned = solve(turned, structure, samples, budget, settings, plan, known, progress, meter=meter, team=team)
            shared(None, team)  # plan: there is no other
            return replace(pruned, left=left)
        except IndefiniteError as error:
            if not error.groups or settings.strict:
                raise
            left |= dict.fromkeys(error.groups, UNSOLVED)
        except UnfollowedError as error:
            if plan is not None or settings.strict or set(error.groups) <= left.keys():
                raise
            left |= dict.fromkeys(error.groups, UNFOLLOWED)
        except ModhifiError as error:
            if not left:
                raise
            name, reason = next(iter(left.items()))
            raise ModhifiError(f"{error} (the group '{name}' has to stay as it is: {reason})") from None


def block_by_block(loaded: LoadedModel, structure: Structure, settings: PruneSettings, cached: bool) -> bool:
    """Whether a run that meets a budget measures one block after the other, if the model is made of blocks.

    So it does where the layout asks for no costs, and where the Grams of all blocks cannot be ``cached`` or do not fit.
    """
    if LAYOUTS[settings.layout].reads_costs or settings.eta is not None or settings.sequential is not None:
        return False
    if any(group.kind == "ranks" for group in structure.prunable):
        return False
    return loaded.reads_tokens and not (cached and fit_in_memory(loaded.model, structure))


def trial_share(settings: PruneSettings) -> float | None:
    """The share of a group's components that removal curves try out for the plan, None where it tries none."""
    wanted = LAYOUTS[settings.layout].reads_costs and COMPENSATIONS[settings.compensate].least_squares
    return WEIGHTINGS[settings.weighting].trial if wanted else None


def solve(
    loaded: LoadedModel,
    structure: Structure,
    samples: Samples,
    budget: Budget | None,
    settings: PruneSettings,
    plan: Plan | None,
    moments: Mapping[str, Moments],
    progress: Progress = silent,
    curves: Mapping[str, Curve] | None = None,
    meter: Meter | None = None,
    team: Processes = ALONE,
) -> Pruned:
    """What :func:`prune_model` returns, from moments; raises :class:`IndefiniteError` for groups without a solution.

    ``curves`` are those of the selector, with trials where :func:`trial_share` asks for them, if they are known.
    """
    if plan is not None:
        able = {g.name for g in structure.prunable}
        plan = Plan({name: kept for name, kept in plan.kept.items() if name in able})
    used: Mapping[str, Curve] = {}
    tried: Mapping[str, float] = {}
    rounded: Rounded | None = None
    metered: Metered | None = None
    if plan is None and settings.eta is not None:
        plan = hifi_plan(loaded.model, structure, moments, settings)
    elif plan is None:
        budget = _given(budget)
        weighting, reads_costs = WEIGHTINGS[settings.weighting], LAYOUTS[settings.layout].reads_costs
        used = curves or removal_curves(loaded.model, structure, moments, settings, progress, trial_share(settings))
        if any(group.parts for group in structure.prunable):
            measured = weighting.trial is not None
            used = {**used, **depth_curves(loaded, structure, samples, budget, settings, measured, progress)}
        if reads_costs:
            planned = weighting.plan(loaded, structure, used, moments, samples, budget, settings, progress)
        else:
            planned = Planned(make_plan(loaded.model, structure, used, budget, settings))
        if meter is not None:
            choose = partial(
                least_change, loaded, structure, moments=moments, samples=samples, settings=settings, progress=progress
            )
            metered, budget, planned = metered_plan(loaded, structure, used, budget, settings, planned, meter, choose)
        if reads_costs:
            way = planned.ways[0] if planned.ways else Way(structure, settings)
            rounded = _rounded(loaded, way, used, budget, planned)
        plan, tried = planned.plan, planned.tried
    fidelity = {name: curve.fidelity for name, curve in used.items() if curve.fidelity is not None}
    if not used:
        for g in structure.prunable:
            if g.parts:
                continue
            fidelity[g.name] = best_singletons(readers_of(loaded.model, structure, g, moments), g.n)
    pruned = apply_plan(loaded, structure, plan, moments, settings, samples, progress, team)
    return replace(
        pruned,
        curves=used,
        fidelity=fidelity,
        grams=gram_quality(moments),
        tried=tried,
        rounded=rounded,
        metered=metered,
    )


def _rounded(
    loaded: LoadedModel,
    way: Way,
    curves: Mapping[str, Curve],
    budget: Budget,
    planned: Planned,
) -> Rounded | None:
    """The plan that rounds nothing, beside the one that does; None where no width is."""
    if way.settings.rounding.to == 1:
        return None
    settings = replace(way.settings, rounding=EXACT)
    exact = make_plan(loaded.model, way.structure, curves, budget, settings, planned.weights)
    return Rounded(exact, planned.predicted(planned.plan), planned.predicted(exact))


def _given(budget: Budget | None) -> Budget:
    if budget is None:
        raise ModhifiError("give a budget: --ratio, --params, --flops, --kv-cache, --latency or --memory")
    return budget


def _prune_unmeasured(
    loaded: LoadedModel,
    structure: Structure,
    budget: Budget | None,
    settings: PruneSettings,
    plan: Plan | None,
    meter: Meter | None,
) -> Pruned:
    """A run that reads no moments collects none; what it does to its layers is then not known."""
    metered: Metered | None = None
    if plan is None:
        curves, budget = ordered_curves(loaded.model, structure, settings), _given(budget)
        planned = Planned(make_plan(loaded.model, structure, curves, budget, settings))
        if meter is not None:
            metered, _, planned = metered_plan(loaded, structure, curves, budget, settings, planned, meter)
        plan = replace(planned.plan, removal_cost={})
    return replace(apply_plan(loaded, structure, plan, None, settings), metered=metered)
