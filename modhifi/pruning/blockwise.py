"""Prune a deep model block by block: collect, choose, edit, free, so that memory does not grow with depth."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial

import torch
from torch import nn

from modhifi.calibration.block_stream import Stream, find_blocks, moments_by_block
from modhifi.calibration.distributed import ALONE, Processes, batches_at, merged, share_of
from modhifi.calibration.memory import check_room, fitting, free_bytes, gram_bytes
from modhifi.calibration.moments import Moments, combined
from modhifi.calibration.timeline import Timeline
from modhifi.data.samples import Samples, examples_in
from modhifi.errors import IndefiniteError
from modhifi.models.loaded import LoadedModel
from modhifi.models.offload import staying
from modhifi.models.stock import stating
from modhifi.progress import Progress
from modhifi.pruning.allocation import plan_for
from modhifi.pruning.budget import Budget
from modhifi.pruning.curves import TOGETHER, removal_curves
from modhifi.pruning.editing import LayerError, edit_readers
from modhifi.pruning.elimination import Curve
from modhifi.pruning.layouts.base import EXACT, least_width
from modhifi.pruning.left_alone import UNSOLVED, leave, unmeasured
from modhifi.pruning.metered import Meter
from modhifi.pruning.metered_plan import metered_plan
from modhifi.pruning.planned import Planned
from modhifi.pruning.settings import PruneSettings
from modhifi.pruning.stages import Pruned, make_plan
from modhifi.structure.clone import clone
from modhifi.structure.groups import Structure
from modhifi.structure.operators import operator_modules
from modhifi.structure.plan import Plan
from modhifi.structure.surgery import shrink

# Grams of a whole model up to this size may be kept, which lets another run reuse them; larger ones never are.
MOST_BYTES = 4 * 2**30


def fit_in_memory(model: nn.Module, structure: Structure) -> bool:
    """Whether the Grams of all readers together stay under ``MOST_BYTES``, and under half of what is free."""
    readers = [module for _, module in operator_modules(model, structure.prunable)]
    most = min([MOST_BYTES, *(free_bytes(device) / 2 for device in {next(m.parameters()).device for m in readers})])
    return sum(map(gram_bytes, readers)) <= most


def level_curves(structure: Structure, settings: PruneSettings) -> dict[str, Curve]:
    """Curves on which every component costs nothing, for a layout that depends on sizes alone."""
    curves = {}
    for group in structure.prunable:
        removable = group.n - least_width(group, settings.floor, EXACT)
        curves[group.name] = Curve(torch.arange(removable), torch.zeros(removable + 1, dtype=torch.float64), 1.0)
    return curves


def prune_in_blocks(
    loaded: LoadedModel,
    structure: Structure,
    samples: Samples,
    budget: Budget,
    settings: PruneSettings,
    progress: Progress,
    meter: Meter | None = None,
    team: Processes = ALONE,
) -> Pruned | None:
    """What `modhifi.pruning.prune_model` returns in ``uniform`` layout, with few blocks' Grams in memory at a time.

    Blocks are solved together as far as their Grams take at most ``TOGETHER`` bytes, else one at a time. Of a ``team``
    this is the main process, and the others call :func:`contribute_in_blocks`. None where :func:`_in_blocks` is.
    """
    found = _in_blocks(loaded, structure)
    if found is None:
        return None
    timeline, blocks, holders = found
    level = level_curves(structure, settings)
    planned, metered = Planned(make_plan(loaded.model, structure, level, budget, settings)), None
    if meter is not None:  # which asks for widths alone
        metered, _, planned = metered_plan(loaded, structure, level, budget, settings, planned, meter)
    widths = {g.name: len(planned.plan.kept.get(g.name, range(g.n))) for g in structure.prunable}
    dense_shape = clone(loaded.model)
    curves: dict[str, Curve] = {}
    kept: dict[str, tuple[int, ...]] = {}
    cost: dict[str, float] = {}
    errors: list[LayerError] = []
    left: dict[str, str] = {}

    passes = _moments(loaded, structure, samples, settings, timeline, blocks, team)
    readers = dict(operator_modules(loaded.model, structure.prunable))
    sizes = [sum(gram_bytes(m) for name, m in readers.items() if name.startswith(f"{block}.")) for block in blocks]
    for numbers in fitting(sizes, TOGETHER):
        moments: dict[str, Moments] = {}
        for number in numbers:
            progress("pruning blocks", number, len(blocks))
            moments |= next(passes)
        together = {blocks[number] for number in numbers}
        inside = structure.select([g.name for g in structure.prunable if holders[g.name] in together])
        if not inside.prunable:
            continue
        device = next(iter(moments.values())).mean.device
        dense, edited = ([m.get_submodule(b) for b in together] for m in (loaded.model, dense_shape))
        unable = unmeasured(loaded, inside, moments, samples, settings.batch_size)
        with staying(dense, device), staying(edited, device, written=True):
            new_curves, unable = _curves(loaded.model, inside, moments, settings, unable, widths)
            inside, left = inside.leave(unable), left | unable
            plan = plan_for(inside.prunable, new_curves, widths)
            errors += edit_readers(dense_shape, structure, plan, moments, settings)
        curves |= new_curves
        kept |= plan.kept
        cost |= plan.removal_cost
        del moments  # before those of the next blocks are collected
    progress("pruning blocks", len(blocks), len(blocks))
    whole, structure = Plan(kept, cost), leave(structure, left, settings.strict)
    small = stating(shrink(dense_shape, structure, whole), loaded)
    return Pruned(small, structure, whole, curves, tuple(errors), left=left, metered=metered)


def contribute_in_blocks(
    loaded: LoadedModel, structure: Structure, samples: Samples, settings: PruneSettings, team: Processes
) -> bool:
    """Run this process's share of the batches through block after block; False where there are no such blocks."""
    found = _in_blocks(loaded, structure)
    if found is None:
        return False
    timeline, blocks, _ = found
    for _ in _moments(loaded, structure, samples, settings, timeline, blocks, team):
        pass  # which are the main process's to solve with
    return True


def _in_blocks(loaded: LoadedModel, structure: Structure) -> tuple[Timeline, tuple[str, ...], dict[str, str]] | None:
    """A watched pass, the blocks in it, and by group the one that holds it.

    None for models that read no tokens, where whole blocks may go, and where the model has no list of blocks that holds
    every group.
    """
    if loaded.kind not in ("text", "encoder"):
        return None  # whose samples would be read from disk again for every block
    if any(g.parts for g in structure.prunable):
        return None  # what a block adds is read behind the next one
    timeline = Timeline(loaded.model, lambda: loaded.run(loaded.example))
    blocks = find_blocks(timeline)
    holders = {
        g.name: [b for b in blocks if all(s.module.startswith(f"{b}.") for s in (*g.readers, *g.producers))]
        for g in structure.prunable
    }
    if not all(len(names) == 1 for names in holders.values()):
        return None
    return timeline, blocks, {name: names[0] for name, names in holders.items()}


def _moments(
    loaded: LoadedModel,
    structure: Structure,
    samples: Samples,
    settings: PruneSettings,
    timeline: Timeline,
    blocks: tuple[str, ...],
    team: Processes,
) -> Iterator[dict[str, Moments]]:
    """Block after block the moments of its readers over the shares of all processes."""
    check_room(loaded.model, structure, examples_in(samples, loaded), settings.sampling, together=False)
    readers = dict(operator_modules(loaded.model, structure.prunable))
    shares, passes = [], []
    for share, source in samples.by_source():
        numbers = share_of(source, settings.batch_size, team)
        batches = list(batches_at(source, settings.batch_size, numbers))
        stream = Stream(loaded.model, blocks, loaded.run, timeline)
        own = moments_by_block(
            stream, batches, readers, settings.sampling, samples=len(source), numbers=numbers, team=team
        )
        shares.append(share)
        passes.append(map(partial(merged, team=team), own))
    for _ in blocks:
        yield combined([(share, next(own)) for share, own in zip(shares, passes, strict=True)])


def _curves(
    model: nn.Module,
    inside: Structure,
    moments: Mapping[str, Moments],
    settings: PruneSettings,
    unable: Mapping[str, str],
    widths: Mapping[str, int],
) -> tuple[dict[str, Curve], dict[str, str]]:
    """The curves of the groups in a block, and those groups that have none, with the reason; those ``unable`` first."""
    inside = inside.leave(unable)
    try:
        return removal_curves(model, inside, moments, settings, widths=widths), dict(unable)
    except IndefiniteError as error:
        if settings.strict:
            raise
        unsolved = dict.fromkeys(error.groups, UNSOLVED)
        return removal_curves(model, inside.leave(unsolved), moments, settings, widths=widths), {**unable, **unsolved}
