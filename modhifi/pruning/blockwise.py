"""Prune a deep model block by block: collect, choose, edit, free, so that memory does not grow with depth."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from modhifi.calibration.block_stream import Stream, find_blocks, moments_by_block
from modhifi.calibration.memory import check_room, free_bytes, gram_bytes
from modhifi.calibration.moments import Moments
from modhifi.calibration.timeline import Timeline
from modhifi.data.samples import Samples, examples_in
from modhifi.errors import IndefiniteError
from modhifi.models.loaded import LoadedModel
from modhifi.models.offload import staying
from modhifi.progress import Progress
from modhifi.pruning.allocation import allocate, plan_for
from modhifi.pruning.budget import Budget
from modhifi.pruning.editing import LayerError, edit_readers
from modhifi.pruning.elimination import Curve
from modhifi.pruning.layouts.base import EXACT, least_width
from modhifi.pruning.left_alone import UNSOLVED, leave, unmeasured
from modhifi.pruning.settings import PruneSettings
from modhifi.pruning.stages import Pruned, removal_curves
from modhifi.structure.clone import clone
from modhifi.structure.groups import Structure
from modhifi.structure.operators import operator_modules
from modhifi.structure.plan import Plan
from modhifi.structure.sizes import sizes_of
from modhifi.structure.surgery import shrink

# Grams of a whole model up to this size may be kept, which lets another run reuse them; larger ones never are.
MOST_BYTES = 4 * 2**30


def fit_in_memory(model: nn.Module, structure: Structure) -> bool:
    """Whether the Grams of all readers together stay under ``MOST_BYTES``, and under half of what is free."""
    readers = [module for _, module in operator_modules(model, structure.prunable)]
    most = min([MOST_BYTES, *(free_bytes(device) / 2 for device in {next(m.parameters()).device for m in readers})])
    return sum(map(gram_bytes, readers)) <= most


def uniform_widths(
    loaded: LoadedModel, structure: Structure, budget: Budget, settings: PruneSettings
) -> dict[str, int]:
    """Every group's width in a layout that depends on sizes alone. Raises what `allocate` raises."""
    curves = {
        g.name: Curve(
            torch.arange(g.n - least_width(g, settings.floor, EXACT)),
            torch.zeros(g.n - least_width(g, settings.floor, EXACT) + 1, dtype=torch.float64),
            1.0,
        )
        for g in structure.prunable
    }
    plan = allocate(
        structure.prunable,
        curves,
        sizes_of(loaded.model, structure),
        budget,
        layout=settings.layout,
        floor=settings.floor,
        rounding=settings.rounding,
    )
    return {g.name: len(plan.kept.get(g.name, range(g.n))) for g in structure.prunable}


def prune_in_blocks(
    loaded: LoadedModel,
    structure: Structure,
    samples: Samples,
    budget: Budget,
    settings: PruneSettings,
    progress: Progress,
) -> Pruned | None:
    """What `modhifi.pruning.prune_model` returns in ``uniform`` layout, with one block's Grams in memory at a time.

    None for models that read no tokens, and where the model has no list of blocks that holds every group.
    """
    if loaded.kind not in ("text", "encoder"):
        return None  # whose samples would be read from disk again for every block
    timeline = Timeline(loaded.model, lambda: loaded.run(loaded.example))
    blocks = find_blocks(timeline)
    holders = {
        g.name: {b for b in blocks if all(s.module.startswith(f"{b}.") for s in (*g.readers, *g.producers))}
        for g in structure.prunable
    }
    if not all(len(names) == 1 for names in holders.values()):
        return None
    check_room(loaded.model, structure, examples_in(samples, loaded), settings.sampling, together=False)
    widths = uniform_widths(loaded, structure, budget, settings)
    dense_shape = clone(loaded.model)
    curves: dict[str, Curve] = {}
    kept: dict[str, tuple[int, ...]] = {}
    cost: dict[str, float] = {}
    errors: list[LayerError] = []
    left: dict[str, str] = {}

    def batches() -> Iterable[Tensor]:
        return samples.batches(settings.batch_size)

    passes = moments_by_block(
        Stream(loaded.model, blocks, loaded.run, timeline),
        batches,
        dict(operator_modules(loaded.model, structure.prunable)),
        settings.sampling,
        samples=len(samples),
    )
    for number, block in enumerate(blocks):
        progress("pruning blocks", number, len(blocks))
        moments = next(passes)
        inside = structure.select([g.name for g in structure.prunable if block in holders[g.name]])
        if not inside.prunable:
            continue
        device = next(iter(moments.values())).mean.device
        dense, edited = loaded.model.get_submodule(block), dense_shape.get_submodule(block)
        unable = unmeasured(loaded, inside, moments, samples, settings.batch_size)
        with staying([dense], device), staying([edited], device, written=True):
            block_curves, unable = _curves(loaded.model, inside, moments, settings, unable, widths)
            inside, left = inside.leave(unable), left | unable
            plan = plan_for(inside.prunable, block_curves, widths)
            errors += edit_readers(dense_shape, structure, plan, moments, settings)
        curves |= block_curves
        kept |= plan.kept
        cost |= plan.removal_cost
        del moments  # before the next block's are collected
    progress("pruning blocks", len(blocks), len(blocks))
    whole, structure = Plan(kept, cost), leave(structure, left, settings.strict)
    return Pruned(shrink(dense_shape, structure, whole), structure, whole, curves, tuple(errors), left=left)


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
