"""Remove whole experts of mixtures: which go, what the others become, the smaller model."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from modhifi.data.samples import Samples
from modhifi.errors import ModhifiError
from modhifi.models.hooks import attached, on_input
from modhifi.models.loaded import LoadedModel
from modhifi.models.stock import stating
from modhifi.progress import Progress, silent
from modhifi.pruning.compensations import COMPENSATIONS
from modhifi.pruning.editing import LayerError
from modhifi.pruning.experts import EXPERT_SELECTORS
from modhifi.pruning.experts.block import Block
from modhifi.pruning.settings import PruneSettings
from modhifi.pruning.stages import Pruned, choose_groups, find_structure
from modhifi.structure.clone import clone
from modhifi.structure.groups import Structure
from modhifi.structure.mixtures import Mixture, mixtures
from modhifi.structure.plan import Plan
from modhifi.structure.surgery import shrink

# So many tokens of the calibration data are looked at in each mixture.
TOKENS = 4096


def expert_structure(loaded: LoadedModel) -> tuple[Structure, tuple[Mixture, ...]]:
    """The mixtures of a model, and their experts as the groups of a structure.

    Raises ModhifiError for a model without any whose router is found.
    """
    traced = find_structure(loaded)
    found = mixtures(loaded.model, traced)
    if not found:
        raise ModhifiError(
            "this model has no mixture of experts whose router and matrices modhifi finds; `modhifi check` lists what "
            "it has"
        )
    return replace(traced, groups=tuple(m.group for m in found)), found


def prune_experts(
    loaded: LoadedModel, samples: Samples, keep: float, settings: PruneSettings, progress: Progress = silent
) -> Pruned:
    """The model with only a share, ``keep``, of the experts of every mixture.

    ``settings.experts`` names the selector; ``settings.compensate`` fits what stays to what the mixture computed before
    (``lstsq``), or leaves it (``none``). No mixture keeps fewer experts than it chooses for a token. Raises
    ModhifiError for another compensation and where :func:`expert_structure` does.
    """
    if not (COMPENSATIONS[settings.compensate].least_squares or settings.compensate == "none"):
        raise ModhifiError("experts go with --compensate lstsq or none")
    structure, found = expert_structure(loaded)
    structure = choose_groups(structure, settings)
    chosen = [mixture for mixture in found if mixture.group.name in {g.name for g in structure.prunable}]
    edited, kept = clone(loaded.model), {}
    costs: dict[str, float] = {}
    errors = []
    for number, (mixture, x) in enumerate(_inputs(loaded, samples, chosen, settings.batch_size)):
        progress("removing experts", number, len(chosen))
        block = Block(mixture, loaded.model.get_submodule(mixture.block), x, settings.ridge)
        there = surviving(block, keep, settings)
        small = block.keeping(there)
        if COMPENSATIONS[settings.compensate].least_squares:
            block.fit(small)
            whole = block.stack(edited.get_submodule(mixture.block)).matrices
            whole.data[there.to(whole.device)] = block.stack(small).matrices.data
        name = mixture.group.name
        kept[name] = tuple(there.nonzero().flatten().tolist())
        costs[name] = block.error(small)
        errors.append(LayerError(name, costs[name], float(block.y.double().square().sum(1).mean())))
    progress("removing experts", len(chosen), len(chosen))
    plan = Plan(kept, costs)
    return Pruned(stating(shrink(edited, structure, plan), loaded), structure, plan, {}, tuple(errors))


def surviving(block: Block, keep: float, settings: PruneSettings) -> Tensor:
    """The experts of a block that stay, bool ``(E,)``: as many of every part among which its router chooses."""
    group, selector = block.mixture.group, EXPERT_SELECTORS[settings.experts]
    parts = torch.zeros(group.n, dtype=torch.int64) if group.partition is None else group.partition
    labels = parts.unique()
    each = group.n // len(labels)
    least = math.ceil(block.mixture.chosen / len(labels))
    stay = max(least, min(each, round(keep * each)))
    there = torch.ones(group.n, dtype=torch.bool)
    worth = selector.worth(block, there, settings.seed)
    for step in range(each - stay):
        for label in labels:
            if selector.anew and (step or label != labels[0]):
                worth = selector.worth(block, there, settings.seed)
            open_to = there & (parts == label)
            there[int(torch.where(open_to, worth, torch.inf).argmin())] = False
    return there


def _inputs(
    loaded: LoadedModel, samples: Samples, chosen: list[Mixture], batch_size: int
) -> Iterator[tuple[Mixture, Tensor]]:
    """The tokens that each mixture reads in the dense model, ``(T, H)``, as many of every sample."""
    each = max(1, TOKENS // len(samples))
    read: dict[str, list[Tensor]] = {mixture.block: [] for mixture in chosen}

    def look(name: str, x: Tensor) -> None:
        tokens = x.reshape(x.shape[0], -1, x.shape[-1])
        places = torch.linspace(0, tokens.shape[1] - 1, min(each, tokens.shape[1]), device=x.device).long()
        read[name].append(tokens[:, places].reshape(-1, x.shape[-1]).clone())

    modules: dict[str, nn.Module] = {name: loaded.model.get_submodule(name) for name in read}
    handles = [on_input(module, partial(look, name)) for name, module in modules.items()]
    with torch.no_grad(), attached(handles):
        for batch in samples.batches(batch_size):
            loaded.run(batch)
    for mixture in chosen:
        yield mixture, torch.cat(read.pop(mixture.block))
