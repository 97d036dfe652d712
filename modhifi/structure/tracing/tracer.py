"""Find the groups of a model by watching one forward pass.

Every torch function of a real forward pass is seen through a ``TorchFunctionMode``; beside each tensor stands which
components it carries along which axis. Python control flow, timm's and transformers' own helpers, and any
``nn.Module`` are followed without a symbolic graph. What is not understood *freezes* the components it touches, with
a reason: no operation is ever guessed to be elementwise.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from modhifi.structure.clone import without_caches
from modhifi.structure.expert_neurons import by_expert
from modhifi.structure.groups import Group, Operator, Structure
from modhifi.structure.head_counts import with_head_counts
from modhifi.structure.outputs import named_tensors
from modhifi.structure.refusals import NOT_RUN
from modhifi.structure.stacked import TURNED, may_be_stacked
from modhifi.structure.torch_ops import MOVEMENTS, Kind

# The files of rules are imported for what they register.
from modhifi.structure.tracing import elementwise_rules, layer_rules, movement_rules, recurrent_rules  # noqa: F401
from modhifi.structure.tracing.layer_rules import MULTIHEAD
from modhifi.structure.tracing.operations import OWN_RULES, RULES
from modhifi.structure.tracing.per_head import PerHead
from modhifi.structure.tracing.placements import Placement, TracedCall
from modhifi.structure.tracing.watcher import Watcher

# Behind the name of what writes the values of an attention.
RANKS = "#ranks"
# Kinds whose rules know of components along several axes.
GRID_KINDS: frozenset[Kind] = MOVEMENTS | {
    "activation",
    "elementwise",
    "unchanged",
    "cast",
    "creation",
    "recurrent",
    "own",
}


class ChannelTracer(Watcher):
    """Watches one forward pass and fills :class:`Couplings` by the rules that are registered."""

    def rule(self, call: TracedCall) -> Sequence[Placement | None]:
        """The rule of the operation itself goes before that of its kind; without either it is unknown."""
        movement_rules.settle(self, call)
        if (product := self.stacks.product(call.name, call.args, call.kwargs, call.inputs)) is not None:
            return layer_rules.product_with_view(self, call, *product)
        if (view := self.stacks.from_left(call.name, call.inputs)) is not None:
            return layer_rules.product_from_left(self, call, view)
        own = OWN_RULES.get(call.key)
        if call.kind is None:
            return self.unknown(call)
        if call.kind not in GRID_KINDS or (own is not None and call.kind != "own"):
            for grid in call.grids:
                self.freeze(grid, f"the operation '{call.name}' meets components on several axes")
        return (own or RULES[call.kind])(self, call)


def _operators(tracer: ChannelTracer) -> Iterable[Operator]:
    for module, macs in tracer.macs.items():
        sink, norms = ("bias" if tracer.biased.get(module) else None), tracer.batchnorms.get(module, [])
        if sink is None and len(norms) == 1 and tracer.calls[module] == 1:
            norm, written = norms[0]
            has_mean = getattr(tracer.model.get_submodule(norm), "running_mean", None) is not None
            if has_mean and tracer.calls[norm] == 1 and tracer.uses[written] == 1:
                sink = norm
        yield Operator(module, macs // max(1, tracer.samples), sink)


def _stacked(model: nn.Module, seen: set[str]) -> Iterator[Group]:
    """Refused groups for matrices stacked in one parameter, as a mixture of experts has them."""
    for name, parameter in model.named_parameters():
        owner = model.get_submodule(name.rpartition(".")[0])
        if may_be_stacked(owner, parameter) and name not in seen and name + TURNED not in seen:
            reason = "matrices stacked in one tensor, and no operation that modhifi knows multiplies with them"
            yield Group(name, parameter.shape[1], (), refused=reason)


def _unseen(model: nn.Module, seen: set[str], obstacles: dict[str, str]) -> Iterator[Group]:
    """Refused groups for layers that cannot be edited, or were not seen to run."""
    for name, module in model.named_modules():
        if isinstance(module, nn.RNNCellBase):
            yield Group(name, module.hidden_size, (), refused=recurrent_rules.CELL)
        if isinstance(module, (_ConvNd, nn.Linear)) and name not in seen:
            reason = obstacles.get(name, NOT_RUN)
            if isinstance(model.get_submodule(name.rpartition(".")[0]), nn.MultiheadAttention):
                reason = MULTIHEAD
            yield Group(name, len(module.weight), (), refused=reason)


def _watched(
    model: nn.Module,
    run: Callable[[nn.Module], Any],
    ranks: bool,
    older: Iterable[Tensor] = (),
    known: PerHead | None = None,
) -> tuple[ChannelTracer, Any]:
    """One watched pass; tensors ``older`` than it carry nothing, ``known`` is what there is for each head."""
    tracer = ChannelTracer(model, known or PerHead(), ranks)
    for tensor in older:
        if id(tensor) not in tracer.placements:
            tracer.remember(tensor, None)
    with torch.no_grad(), tracer.following(), tracer:
        return tracer, run(model)


def _alive() -> list[Tensor]:
    """Every tensor that Python holds now."""
    return [thing for thing in gc.get_objects() if issubclass(type(thing), Tensor)]


def _traced(model: nn.Module, run: Callable[[nn.Module], Any], ranks: bool = False) -> ChannelTracer:
    """The watched pass that counts.

    A second one where the first meets tensors that it has not made, or heads meet something that there is for each.
    """
    tracer, outputs = _watched(without_caches(model), run, ranks)
    met = None if ranks else tracer.met
    if tracer.unobserved or met:
        unobserved = tracer.unobserved  # libraries keep positions in caches that no module shows
        tracer, outputs = None, None  # type: ignore[assignment]  # nothing of that pass is to count as older
        tracer, outputs = _watched(without_caches(model), run, ranks, _alive() if unobserved else (), met)
    for _, tensor in named_tensors(outputs):
        tracer.uses[id(tensor)] += 1
        placement = tracer.placements.get(id(tensor))
        if placement is not None:
            tracer.couplings.freeze(placement.ids.flatten(), "these channels are the model's output")
    return tracer


def trace(model: nn.Module, run: Callable[[nn.Module], Any]) -> Structure:
    """Watch ``run(model)``, one forward pass on a batch of at least two samples, and return the groups found.

    The model must be in eval mode. Costs one forward pass, or two where the first meets tensors that it has not made or
    a module has something for each head; nothing of the model is changed, but what it remembered of earlier passes
    for a device is forgotten.
    """
    tracer = _traced(model, run)
    groups = tuple(with_head_counts(model, by_expert(model, group)) for group in tracer.couplings.groups())
    operators = {o.module: o for o in _operators(tracer)}
    seen = {s.module for g in groups for s in g.slices} | set(operators)
    samples, counter = max(1, tracer.samples), tracer.counter
    return Structure(
        (*groups, *_stacked(model, seen), *_unseen(model, seen, tracer.obstacles)),
        operators,
        tracer.couplings.shared_work(samples),
        counter.total // 2 // samples,
        tuple(counter.uncounted),
    )


def trace_ranks(model: nn.Module, run: Callable[[nn.Module], Any]) -> tuple[Group, ...]:
    """The groups of ranks: a component is channel i of the values of every head of an attention.

    Watches as :func:`trace` does. Components of other groups lie across these, so the two cannot go together.
    """
    named: dict[str, Group] = {}
    for group in _traced(model, run, ranks=True).couplings.groups():
        if group.kind == "ranks":
            plain = group.name.partition("#")[0] + RANKS
            name = plain if plain not in named else group.name + RANKS
            named[name] = with_head_counts(model, replace(group, name=name))
    return tuple(named.values())
