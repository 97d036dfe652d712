"""The stages of a pruning run, each callable on its own: structure, groups, moments, plan, edited model."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial

from torch import Tensor, nn

from modhifi.calibration.cache import MomentCache
from modhifi.calibration.collect import collect
from modhifi.calibration.distributed import ALONE, Processes, batches_at, merged, share_of, shared
from modhifi.calibration.gram_quality import GramQuality
from modhifi.calibration.memory import check_room
from modhifi.calibration.moments import Moments, combined
from modhifi.calibration.sampling import Sampling
from modhifi.data.samples import Samples, examples_in
from modhifi.errors import IndefiniteError, ModhifiError, UnfollowedError
from modhifi.models.loaded import LoadedModel
from modhifi.models.stock import stating
from modhifi.progress import Progress, silent
from modhifi.pruning.allocation import allocate
from modhifi.pruning.budget import Budget
from modhifi.pruning.compensations import COMPENSATIONS
from modhifi.pruning.depth import moments_of_plans, remove_branches
from modhifi.pruning.editing import LayerError, edit_readers, edited_readers
from modhifi.pruning.elimination import Curve
from modhifi.pruning.metered import Metered
from modhifi.pruning.sequential import edit_sequentially
from modhifi.pruning.settings import PruneSettings
from modhifi.structure.clone import clone
from modhifi.structure.depth import removed_parts, spans
from modhifi.structure.groups import Group, Structure
from modhifi.structure.operators import operator_modules
from modhifi.structure.plan import Plan
from modhifi.structure.ranks import confirm_ranks
from modhifi.structure.refusals import folded
from modhifi.structure.sizes import sizes_of
from modhifi.structure.stacked import Stacked
from modhifi.structure.surgery import shrink
from modhifi.structure.tracing.residual import with_depth
from modhifi.structure.tracing.tracer import trace, trace_ranks
from modhifi.structure.trial_cut import confirm, drawn_alike, wrong_output

# How many reasons an error names.
TOLD = 3


@dataclass(frozen=True)
class Rounded:
    """What rounding widths costs: the plan that meets the same budget without it, and the weighted costs of both.

    The costs are None where no weights were measured.
    """

    exact: Plan
    predicted: float | None
    predicted_exact: float | None


# Tokens on which a causal model is tried out: it reads any beginning of a text, and a prime number of them is hardly
# one of its widths.
TRIAL_TOKENS = 5
# Samples, and tokens of each, on which a plan is tried; groups that are tried alone where it fails.
TRIED, TRIED_TOKENS, ALONE_TRIED = 8, 64, 50


@dataclass(frozen=True)
class Pruned:
    """``model`` is physically smaller; `structure.expand` gives the same function in the dense model's shapes.

    ``fidelity`` has the best singleton fidelity of every component, float64 ``(n,)`` by group. ``tried`` has, where
    several plans were tried, what each does to the output: its divergence on a few samples in nats. ``left`` has the
    groups that could not be measured or solved and stay as they are, each with the reason. ``rounded`` compares rounded
    widths with exact ones, ``timed`` says what a budget of time came to.
    """

    model: nn.Module
    structure: Structure
    plan: Plan
    curves: Mapping[str, Curve]
    errors: tuple[LayerError, ...]
    fidelity: Mapping[str, Tensor] = field(default_factory=dict)
    grams: tuple[GramQuality, ...] = ()
    tried: Mapping[str, float] = field(default_factory=dict)
    left: Mapping[str, str] = field(default_factory=dict)
    rounded: Rounded | None = None
    metered: Metered | None = None


def find_structure(loaded: LoadedModel, on_request: bool = False) -> Structure:
    """Trace the model on its example batch, and refuse what its code would not survive.

    With ``on_request``, those that go on request are among its groups: blocks, sublayers, ranks. Raises ModhifiError
    where the model fails on its example.
    """

    def run(model: nn.Module) -> dict[str, Tensor]:
        return loaded.outputs(loaded.example, model)

    try:
        structure = trace(loaded.model, run)
    except Exception:
        loaded.require_runs()
        raise  # the model is not to blame
    if on_request:
        structure = with_depth(loaded.model, structure, loaded.example_of_two(), loaded.outputs)
    few = loaded.example[:, :TRIAL_TOKENS] if loaded.kind == "text" else loaded.example
    trial = partial(loaded.outputs, few)
    structure = confirm(loaded.model, structure, trial)
    if on_request:
        structure = confirm_ranks(loaded.model, structure, trace_ranks(loaded.model, trial), trial)
    return structure


def choose_groups(structure: Structure, settings: PruneSettings, plan: Plan | None = None) -> Structure:
    """Keep the prunable groups that ``only`` and ``exclude`` (shell patterns on names or kinds) and ``coupled`` allow.

    Blocks, sublayers and ranks go only where ``only`` or the ``plan`` to replay asks for them. Raises ModhifiError for
    a pattern that matches nothing, where no group is left, and for ranks of heads that may go as well.
    """

    def matches(group: Group, patterns: Iterable[str]) -> bool:
        return any(fnmatch.fnmatch(name, pattern) for name in (group.name, group.kind) for pattern in patterns)

    for pattern in (*settings.only, *settings.exclude):
        if not any(matches(g, (pattern,)) for g in structure.groups):
            raise ModhifiError(f"the pattern '{pattern}' matches no group and no kind; `modhifi check` lists them")
    named = set() if plan is None else plan.kept.keys()
    asked = tuple(
        g for g in structure.groups if not g.on_request or g.kind in settings.only or g.name in {*settings.only, *named}
    )
    structure = replace(structure, groups=asked)
    chosen = [
        g.name
        for g in structure.prunable
        if (not settings.only or matches(g, settings.only))
        and not matches(g, settings.exclude)
        and (settings.coupled or not g.coupled)
    ]
    if not chosen:
        rows = folded(structure.refused)
        reasons = [f"{row['names'][0]}: {row['reason']}" for row in sorted(rows, key=lambda row: not row["on_request"])]
        reason = "; ".join(reasons[:TOLD]) or "it has no layers whose inputs another one computes"
        raise ModhifiError(f"no group of this model can be pruned with these settings; {reason}")
    structure = structure.select(chosen)
    if plan is None and {"heads", "ranks"} <= {g.kind for g in structure.prunable}:
        raise ModhifiError("ranks and heads are made of the same channels; prune the one, and then the other")
    return structure


def measure_moments(
    loaded: LoadedModel,
    structure: Structure,
    samples: Samples,
    sampling: Sampling,
    progress: Progress = silent,
    cache: MomentCache | None = None,
    team: Processes = ALONE,
) -> dict[str, Moments]:
    """Moments of every reader of a prunable group that runs, in one pass per sample that ``cache`` does not know.

    Those of several sources are measured, and kept in the cache, source by source. Each process of a ``team`` runs its
    share of the batches, without the cache; the moments are those of all shares.
    """
    if all(group.parts for group in structure.prunable):
        return {}
    check_room(loaded.model, structure, examples_in(samples, loaded), sampling)
    readers = dict(operator_modules(loaded.model, structure.prunable))
    parts = [
        (share, _measured(loaded, readers, source, sampling, progress, cache, team))
        for share, source in samples.by_source()
    ]
    # Offloaded weights run elsewhere than they lie; the maths goes on where they lie.
    return {name: m.to(next(readers[name].parameters()).device) for name, m in combined(parts).items()}


def _measured(
    loaded: LoadedModel,
    readers: Mapping[str, nn.Module],
    samples: Samples,
    sampling: Sampling,
    progress: Progress,
    cache: MomentCache | None,
    team: Processes,
) -> dict[str, Moments]:
    """Moments of the readers over the samples of one source."""
    routed = any(isinstance(module, Stacked) for module in readers.values())
    stored = None if cache is None or team.count > 1 or routed else cache.open(loaded, readers, samples, sampling)
    numbers = share_of(samples, sampling.batch_size, team, 0 if stored is None else stored.done)

    def batches() -> Iterable[Tensor]:
        for number, batch in zip(numbers, batches_at(samples, sampling.batch_size, numbers), strict=True):
            progress("measuring", number, len(samples))
            yield batch
        progress("measuring", len(samples), len(samples))

    share = collect(
        loaded.model,
        loaded.run,
        batches(),
        readers,
        sampling,
        samples=len(samples),
        numbers=numbers,
        real=loaded.real_tokens,
        use_batch_statistics=samples.adapted,
        stored=stored,
        team=team,
    )
    return merged(share, team)


def make_plan(
    model: nn.Module,
    structure: Structure,
    curves: Mapping[str, Curve],
    budget: Budget,
    settings: PruneSettings,
    weights: Mapping[str, float] | None = None,
) -> Plan:
    """Allocate the budget over the groups."""
    order = {g.name: curves[g.name].order.tolist() for g in structure.prunable if g.parts}
    return allocate(
        structure.prunable,
        curves,
        sizes_of(model, structure).ordered(order),
        budget.ordered(order),
        layout=settings.layout,
        floor=settings.floor,
        rounding=settings.rounding,
        weights=weights,
    )


def apply_plan(
    loaded: LoadedModel,
    structure: Structure,
    plan: Plan,
    moments: Mapping[str, Moments] | None,
    settings: PruneSettings,
    samples: Samples | None = None,
    progress: Progress = silent,
    team: Processes = ALONE,
) -> Pruned:
    """Compensate and cut; without moments, cut.

    Of a ``team`` this is the main process, and the others call :func:`follow_plans`.
    """
    plan.check(structure)
    _require_followed(loaded, structure, plan, samples)
    if moments is None:
        edited, errors = clone(loaded.model), tuple[LayerError, ...]()
    else:
        if settings.sequential is not None:
            if not COMPENSATIONS[settings.compensate].least_squares or samples is None:
                raise ModhifiError("--sequential goes with --compensate lstsq only")
            shared(plan, team)
        edited, errors = _compensated(loaded, structure, plan, moments, settings, samples, progress, team)
    return Pruned(stating(shrink(edited, structure, plan), loaded), structure, plan, {}, errors)


def _require_followed(loaded: LoadedModel, structure: Structure, plan: Plan, samples: Samples | None) -> None:
    """Raises :class:`UnfollowedError` where the cut model is another one than the masked on the first few samples.

    The structure was tried with other plans, on the example alone: code that goes by the number of a block, or takes
    other branches for other inputs, shows itself here.
    """
    if not plan.kept:
        return
    batch = loaded.example if samples is None else next(samples.batches(min(TRIED, len(samples))))
    batch = batch[:, :TRIED_TOKENS] if loaded.reads_tokens else batch
    run = drawn_alike(partial(loaded.outputs, batch))

    def fails(kept: Mapping[str, tuple[int, ...]]) -> bool:
        return wrong_output(loaded.model, structure, Plan(dict(kept)), run) is not None

    if fails(plan.kept):
        alone = [name for name, kept in list(plan.kept.items())[:ALONE_TRIED] if fails({name: kept})]
        raise UnfollowedError(alone or plan.kept)


def _compensated(
    loaded: LoadedModel,
    structure: Structure,
    plan: Plan,
    moments: Mapping[str, Moments],
    settings: PruneSettings,
    samples: Samples | None,
    progress: Progress = silent,
    team: Processes = ALONE,
) -> tuple[nn.Module, tuple[LayerError, ...]]:
    """A copy of the model in its own shapes that makes up for what a plan removes, and what is left of the change.

    ``samples`` are needed with ``settings.sequential``, which measures on the pruned prefix of every reader, and where
    blocks or sublayers go, for what they added to the stream. The writers that take that over are compensated before
    all others, for what they read in the dense model.
    """
    edited, later = clone(loaded.model), dict[str, Tensor]()
    if settings.sequential is not None:
        keepers = {span.keeper.writer for span in spans(structure, removed_parts(structure, plan))}
        later = {name: at for name, at in edited_readers(structure, plan).items() if name not in keepers}
    errors = edit_readers(edited, structure, plan, moments, settings, later)
    if samples is not None:
        added = moments_of_plans(loaded, structure, [plan], samples, settings, progress)
        errors += remove_branches(edited, structure, plan, added, settings)
        if later:
            errors += edit_sequentially(loaded, edited, structure, later, samples, moments, settings, progress, team)
    return edited, errors


def follow_plans(
    loaded: LoadedModel,
    structure: Structure,
    samples: Samples,
    moments: Mapping[str, Moments],
    settings: PruneSettings,
    team: Processes,
) -> None:
    """Run this process's share of the passes of :func:`apply_plan` for every plan of the main process, until None."""
    while (plan := shared(None, team)) is not None:
        with suppress(IndefiniteError):  # for which the main process leaves groups as they are
            _compensated(loaded, structure, plan, moments, settings, samples, team=team)
