"""Prune one model: moments, curves, plan, compensated weights. The stages of a run, each callable on its own."""

from __future__ import annotations

import copy
import fnmatch
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from .allocate import Budget, allocate
from .compensate import error_and_energy, least_squares, masked, scaled
from .data import Samples
from .errors import ModhifiError
from .groups import Group, Structure, operator_modules
from .load import LoadedModel
from .moment_cache import MomentCache
from .moments import Moments, collect
from .oracle import confirm
from .plan import Plan
from .processes import ALONE, Processes, merged
from .quality import GramQuality, gram_quality
from .readers import (
    absorb_mean,
    applied_second,
    as_remembered,
    best_singletons,
    readers_of,
    weight_matrix,
    write_weight,
)
from .selection import Curve, eliminate, hifi_union, removal_order
from .sequential import edit_sequentially, joint_moments
from .sizes import sizes_of
from .surgery import kernel_size, removed_positions, shrink
from .tracing import trace

Progress = Callable[[str, int, int], None]

# the share of a group's components whose loss shows its effect on the output
TRIAL = 0.3


def silent(stage: str, done: int, total: int) -> None:
    """A progress callback that does nothing."""


@dataclass(frozen=True)
class PruneSettings:
    """How to prune.

    ``ridge`` is in units of a Gram's mean diagonal; ``rows_per_column`` bounds the rows a Gram looks at (None: every
    position); ``floor`` is the least share of a group that stays; with ``behind_norms``, ``obs`` orders removals by
    errors as they leave the BatchNorm behind a reader: better where a large share goes everywhere, not elsewhere.
    """

    selector: str = "obs"
    compensate: str = "lstsq"
    layout: str = "global"
    weighting: str = "amplification"
    sequential: str | None = None
    floor: float = 0.1
    round_to: int = 1
    ridge: float = 1e-4
    rows_per_column: int | None = 2
    eta: float | None = None
    only: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    coupled: bool = True
    behind_norms: bool = False
    seed: int = 0
    batch_size: int = 32


@dataclass(frozen=True)
class LayerError:
    """Squared local error of one reader's output and its energy, both expected per row on the calibration data."""

    reader: str
    error: float
    energy: float

    @property
    def relative(self) -> float:
        return self.error / self.energy if self.energy > 0 else 0.0


@dataclass(frozen=True)
class Pruned:
    """``model`` is physically smaller; ``dense_shape`` holds the same function in the dense model's shapes.

    ``fidelity`` has the best singleton fidelity of every component, float64 ``(n,)`` by group. ``tried`` has, where
    several plans were tried, what each does to the output: its divergence on a few samples in nats.
    """

    model: nn.Module
    dense_shape: nn.Module
    structure: Structure
    plan: Plan
    curves: Mapping[str, Curve]
    errors: tuple[LayerError, ...]
    fidelity: Mapping[str, Tensor] = field(default_factory=dict)
    grams: tuple[GramQuality, ...] = ()
    tried: Mapping[str, float] = field(default_factory=dict)


def find_structure(loaded: LoadedModel) -> Structure:
    """Trace the model on its example batch, and refuse what its code would not survive."""

    def run(model: nn.Module) -> Tensor:
        return loaded.logits(loaded.example, model)

    return confirm(loaded.model, trace(loaded.model, run), run)


def choose_groups(structure: Structure, settings: PruneSettings) -> Structure:
    """Keep the prunable groups that ``only`` and ``exclude`` (shell patterns on names or kinds) and ``coupled`` allow.

    Raises ModhifiError for a pattern that matches nothing and where no group is left.
    """

    def matches(group: Group, patterns: Iterable[str]) -> bool:
        return any(fnmatch.fnmatch(name, pattern) for name in (group.name, group.kind) for pattern in patterns)

    for pattern in (*settings.only, *settings.exclude):
        if not any(matches(g, (pattern,)) for g in structure.groups):
            raise ModhifiError(f"the pattern '{pattern}' matches no group and no kind; `modhifi check` lists them")
    chosen = [
        g.name
        for g in structure.prunable
        if (not settings.only or matches(g, settings.only))
        and not matches(g, settings.exclude)
        and (settings.coupled or not g.coupled)
    ]
    if not chosen:
        raise ModhifiError("no group of this model can be pruned with these settings; `modhifi check` says why")
    return structure.select(chosen)


def measure_moments(
    loaded: LoadedModel,
    structure: Structure,
    samples: Samples,
    settings: PruneSettings,
    progress: Progress = silent,
    cache: MomentCache | None = None,
    team: Processes = ALONE,
) -> dict[str, Moments]:
    """Moments of every reader of a prunable group, in one forward pass per sample that ``cache`` does not know.

    Each process of a ``team`` runs its share of the batches, without the cache; the moments are those of all shares.
    """
    readers = dict(operator_modules(loaded.model, structure.prunable))
    deciding = {key: getattr(settings, key) for key in ("rows_per_column", "batch_size", "seed")}
    stored = None if cache is None or team.count > 1 else cache.open(loaded, readers, samples, deciding)
    size = settings.batch_size
    numbers = range(0 if stored is None else stored.done, len(samples), size)[team.index :: team.count]
    if team.count > 1 and len(range(0, len(samples), size)) < team.count:
        raise ModhifiError(f"{len(samples)} samples are fewer than {team.count} batches of {size}; use fewer processes")

    def batches() -> Iterable[Tensor]:
        for number in numbers:
            progress("measuring", number, len(samples))
            yield from samples.subset(range(number, min(number + size, len(samples)))).batches(size)
        progress("measuring", len(samples), len(samples))

    found = collect(
        loaded.model,
        loaded.run,
        batches(),
        readers,
        numbers=numbers,
        samples=len(samples),
        rows_per_column=settings.rows_per_column,
        use_batch_statistics=samples.synthetic,
        seed=settings.seed,
        stored=stored,
    )
    found = merged(found, team)
    missing = [name for name in readers if name not in found]
    if missing:
        raise ModhifiError(f"the layer '{missing[0]}' was never run on the calibration data; exclude its group")
    # Offloaded weights run elsewhere than they lie; the maths goes on where they lie.
    found = {name: m.to(next(readers[name].parameters()).device) for name, m in found.items()}
    return as_remembered(loaded.model, structure, found) if samples.synthetic else found


def removal_curves(
    model: nn.Module,
    structure: Structure,
    moments: Mapping[str, Moments],
    settings: PruneSettings,
    progress: Progress = silent,
    trial: float | None = None,
) -> dict[str, Curve]:
    """For each prunable group the order of removal and what it costs, with a trial at that share of its components."""
    curves = {}
    for number, group in enumerate(structure.prunable):
        progress("scoring", number, len(structure.prunable))
        readers = readers_of(model, structure, group, moments)
        if not settings.behind_norms:
            readers = [replace(reader, scale=None) for reader in readers]
        curves[group.name] = eliminate(
            readers,
            keep_at_least=max(group.step, int(settings.floor * group.n)),
            order=removal_order(settings.selector, readers, settings.seed),
            partition=group.partition,
            ridge=settings.ridge,
            trial=None if trial is None else trial_size(group, trial),
        )
    progress("scoring", len(structure.prunable), len(structure.prunable))
    return curves


def trial_size(group: Group, share: float) -> int:
    """How many components a trial removes: a share of them, at least one of every part."""
    return max(group.step, int(share * group.n) // group.step * group.step)


def hifi_plan(model: nn.Module, structure: Structure, moments: Mapping[str, Moments], settings: PruneSettings) -> Plan:
    """Keep in every group the union of its output channels' smallest NAIVE HiFi sets of fidelity ``eta``."""
    assert settings.eta is not None
    kept = {}
    for group in structure.prunable:
        if group.partition is not None:
            continue
        member = hifi_union(readers_of(model, structure, group, moments), settings.eta)
        if not bool(member.all()):
            kept[group.name] = tuple(torch.nonzero(member).flatten().tolist())
    return Plan(kept)


def make_plan(
    model: nn.Module,
    structure: Structure,
    curves: Mapping[str, Curve],
    budget: Budget,
    settings: PruneSettings,
    weights: Mapping[str, float] | None = None,
) -> Plan:
    """Allocate the budget over the groups."""
    return allocate(
        structure.prunable,
        curves,
        sizes_of(model, structure),
        budget,
        layout=settings.layout,
        floor=settings.floor,
        round_to=settings.round_to,
        weights=weights,
    )


def edit_readers(
    model: nn.Module, structure: Structure, plan: Plan, moments: Mapping[str, Moments], settings: PruneSettings
) -> tuple[LayerError, ...]:
    """Write compensated weights, zero in the removed columns, into every reader of a removed component, in place.

    Shapes stay. Biases, or the running mean of the BatchNorm behind, take the change of the mean.
    """
    errors = []
    for (name, role), positions in removed_positions(structure, plan).items():
        if role == "reader":
            errors.append(edit_reader(model, structure, name, positions, moments[name], settings))
    return tuple(errors)


def edit_reader(
    model: nn.Module, structure: Structure, name: str, positions: Tensor, moments: Moments, settings: PruneSettings
) -> LayerError:
    """Compensate one reader for the loss of some input channels (``positions``), in place."""
    weight, edited = write_compensated(model, structure, name, positions, moments, settings)
    measured = moments.cov if structure.operators[name].sink is not None else moments.gram
    found = [error_and_energy(w, e, m) for w, e, m in zip(weight, edited, measured, strict=True)]
    return LayerError(name, sum(error for error, _ in found), sum(energy for _, energy in found))


def write_compensated(
    model: nn.Module, structure: Structure, name: str, positions: Tensor, moments: Moments, settings: PruneSettings
) -> tuple[Tensor, Tensor]:
    """What :func:`edit_reader` writes, without its error: the weights before and after, float64 ``(G, o, d)``."""
    edited = compensated(model, structure, name, positions, moments, settings)
    return store(model, structure, name, edited, moments, settings), edited


def store(
    model: nn.Module, structure: Structure, name: str, edited: Tensor, moments: Moments, settings: PruneSettings
) -> Tensor:
    """Write a reader's new weights ``(G, o, d)`` and, compensating, give its mean back; returns the old ones."""
    weight, sink = weight_matrix(model.get_submodule(name)), structure.operators[name].sink
    write_weight(model.get_submodule(name), edited)
    if settings.compensate != "none" and sink is not None:
        absorb_mean(model, name, sink, ((weight - edited) @ moments.mean[:, :, None]).reshape(-1))
    return weight


def compensated(
    model: nn.Module, structure: Structure, name: str, positions: Tensor, moments: Moments, settings: PruneSettings
) -> Tensor:
    """A reader's weights after the loss of some input channels, float64 ``(G, o, d)``; nothing is written."""
    module = model.get_submodule(name)
    weight = weight_matrix(module)
    groups, _, columns = weight.shape
    kernel = kernel_size(module)
    second = applied_second(moments, structure.operators[name].sink)
    channels = torch.ones(groups * columns // kernel, dtype=torch.bool)
    channels[positions] = False
    kept = channels.view(groups, -1).to(weight.device)
    edited = torch.empty_like(weight)
    for g in range(groups):
        wide = kept[g].repeat_interleave(kernel)
        if settings.compensate == "lstsq":
            edited[g] = least_squares(weight[g], second[g], wide, settings.ridge)
        elif settings.compensate == "delta":
            blocks = torch.arange(columns, device=weight.device).view(-1, kernel)
            edited[g] = scaled(weight[g], second[g], blocks, kept[g], settings.ridge)
        elif settings.compensate == "none":
            edited[g] = masked(weight[g], wide)
        else:
            raise ModhifiError(f"unknown compensation '{settings.compensate}'; choose lstsq, delta or none")
    return edited


def apply_plan(
    loaded: LoadedModel,
    structure: Structure,
    plan: Plan,
    moments: Mapping[str, Moments],
    settings: PruneSettings,
    samples: Samples | None = None,
    progress: Progress = silent,
) -> Pruned:
    """Compensate and cut: the edited model in the dense shapes and in its own.

    ``samples`` are needed with ``settings.sequential``, which runs them once more for every reader.
    """
    plan.check(structure)
    if settings.sequential is None:
        dense_shape = copy.deepcopy(loaded.model)
        errors = edit_readers(dense_shape, structure, plan, moments, settings)
    else:
        if settings.compensate != "lstsq" or samples is None:
            raise ModhifiError("--sequential goes with --compensate lstsq only")

        def moments_of(edited: nn.Module, reader: str) -> Moments:
            assert samples is not None
            return joint_moments(
                loaded.model,
                edited,
                reader,
                loaded.logits,
                samples.batches(settings.batch_size),
                samples=len(samples),
                rows_per_column=settings.rows_per_column,
                use_batch_statistics=samples.synthetic,
                seed=settings.seed,
            )

        dense_shape, found = edit_sequentially(
            loaded.model, structure, plan, moments_of, settings.sequential, settings.ridge, progress
        )
        errors = tuple(LayerError(*e) for e in found)
    return Pruned(shrink(copy.deepcopy(dense_shape), structure, plan), dense_shape, structure, plan, {}, errors)


def _chosen(loaded: LoadedModel, settings: PruneSettings, plan: Plan | None) -> Structure:
    structure = choose_groups(find_structure(loaded), settings)
    if plan is None:
        return structure
    plan.check(structure)
    return structure.select(plan.kept)


def contribute(
    loaded: LoadedModel, samples: Samples, settings: PruneSettings, plan: Plan | None, team: Processes
) -> None:
    """Measure this process's share of the moments, for the main process that runs :func:`prune_model`."""
    measure_moments(loaded, _chosen(loaded, settings, plan), samples, settings, team=team)


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
) -> Pruned:
    """The whole method on one loaded model, which itself stays as it is.

    ``budget`` None is allowed with ``settings.eta`` (keep HiFi sets) or with a given ``plan`` (replay it). Of a
    ``team`` of processes this is the main one; the others call :func:`contribute`.
    """
    structure = _chosen(loaded, settings, plan)
    # Blocks are measured one after the other: that pass is not shared among processes.
    if plan is None and budget is not None and settings.layout == "uniform" and team.count == 1:
        if settings.eta is None and settings.sequential is None:
            from .blockwise import fit_in_memory, prune_in_blocks  # which build on the stages above

            if cache is None or not fit_in_memory(loaded.model, structure):
                found = prune_in_blocks(loaded, structure, samples, budget, settings, progress)
                if found is not None:
                    return found
    moments = measure_moments(loaded, structure, samples, settings, progress, cache, team)
    curves: dict[str, Curve] = {}
    tried: dict[str, float] = {}
    if plan is None and settings.eta is not None:
        plan = hifi_plan(loaded.model, structure, moments, settings)
    elif plan is None:
        if budget is None:
            raise ModhifiError("give a budget: --ratio, --params, --flops or --kv-cache")
        probing = settings.weighting == "amplification" and settings.layout == "global"
        trial = TRIAL if probing and settings.compensate == "lstsq" else None
        curves = removal_curves(loaded.model, structure, moments, settings, progress, trial)
        if settings.weighting not in ("energy", "amplification"):
            raise ModhifiError(f"unknown weighting '{settings.weighting}'; choose energy or amplification")
        if probing:
            from .probing import probed_plan  # which builds on the stages above

            plan, tried = probed_plan(loaded, structure, curves, moments, samples, budget, settings, progress)
        else:
            plan = make_plan(loaded.model, structure, curves, budget, settings)
    fidelity = {name: curve.fidelity for name, curve in curves.items() if curve.fidelity is not None}
    if not curves:
        for g in structure.prunable:
            fidelity[g.name] = best_singletons(readers_of(loaded.model, structure, g, moments), g.n)
    pruned = apply_plan(loaded, structure, plan, moments, settings, samples, progress)
    return replace(pruned, curves=curves, fidelity=fidelity, grams=gram_quality(moments), tried=tried)


@torch.no_grad()
def reestimate_batchnorm(model: nn.Module, loaded: LoadedModel, samples: Samples, batch_size: int) -> None:
    """Replace every BatchNorm's running statistics by those of ``samples``, in place (plain average over batches)."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum, norm.training = None, True
    for batch in samples.batches(batch_size):
        loaded.logits(batch, model)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum, norm.training = momentum, False
