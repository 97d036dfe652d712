"""The rule of recurrent layers: hidden units, of which all gates go together, and what reads them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from modhifi.structure.recurrent import Direction, directions, gate_count, order_of
from modhifi.structure.tracing.operations import register_operation, rule_for
from modhifi.structure.tracing.placements import Axis, Grid, Placement, TracedCall, is_constant
from modhifi.structure.tracing.watcher import Watcher

CELL = "a recurrent cell steps by itself: its hidden units stay, those of nn.LSTM, nn.GRU and nn.RNN can go"
PACKED = "a recurrent layer reads sequences of several lengths packed into one"


@rule_for("recurrent")
def recurrent(watcher: Watcher, call: TracedCall) -> list[Placement | None]:
    """Every direction of every layer has units of its own; torch wants as many of each, so equal ranks go together."""
    name = watcher.path[-1][0] if watcher.path else ""
    owner, x = watcher.model.get_submodule(name), call.inputs[0]
    if not isinstance(owner, nn.RNNBase) or isinstance(call.args[1], Tensor) and not call.args[1].is_floating_point():
        return watcher.refuse(call, PACKED)
    if any(id(weight) in watcher.tied for weight in owner.parameters()):
        return watcher.refuse(call, "the weight is shared with another layer")
    total = sum(weight.numel() for weight in owner.parameters() if weight.ndim == 2)
    for leaf, weight in owner.named_parameters(recurse=False):
        if weight.ndim == 2:
            watcher.macs[f"{name}.{leaf}"] += call.macs * weight.numel() // total
            watcher.calls[f"{name}.{leaf}"] += 1
            watcher.biased[f"{name}.{leaf}"] = owner.bias and "_hr_" not in leaf
    watcher.claimed += call.macs
    units, hidden = _units(watcher, name, owner)
    _read(watcher, name, owner, call.axis(x), x, hidden)
    states = call.args[1] if isinstance(call.args[1], (list, tuple)) else [call.args[1]]
    begun = [_begin(watcher, call, s, torch.stack(ids)) for s, ids in zip(states, (hidden, units), strict=False)]
    if not all(begun):
        _rank_together(watcher, owner, units, hidden)
    last = [ids for d, ids in zip(directions(owner), hidden, strict=True) if d.layer == owner.num_layers - 1]
    ends = [_all_layers(torch.stack(ids)) for ids in (hidden, units)]
    return [Axis(2, torch.cat(last)), *ends[: len(call.outputs) - 1]]


def cell(watcher: Watcher, call: TracedCall) -> list[Placement | None]:
    """One step of a cell, which the model's own code repeats."""
    return watcher.refuse(call, CELL)


for _name in ("lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell"):
    register_operation(_name, cell)


def _units(watcher: Watcher, name: str, owner: nn.RNNBase) -> tuple[list[Tensor], list[Tensor]]:
    """The cell's units of every direction, and what others see of them: the same, or what projects them."""
    couplings, gates = watcher.couplings, gate_count(owner)
    units, hidden = list[Tensor](), list[Tensor]()
    for own in directions(owner):
        width = owner.hidden_size
        rows = couplings.produce(f"{name}.weight_ih{own.suffix}", gates * width, 1)
        ids = rows[:width]
        parts = [rows, couplings.produce(f"{name}.weight_hh{own.suffix}", gates * width, 1)]
        if owner.bias:
            biases = (f"{name}.bias_{part}{own.suffix}" for part in ("ih", "hh"))
            parts += [couplings.parameter(bias, gates * width) for bias in biases]
        for part in parts:
            couplings.unite(ids.repeat(gates), part)
        units.append(ids)
        if owner.proj_size:
            couplings.read(f"{name}.weight_hr{own.suffix}", ids, 1)
            hidden.append(couplings.produce(f"{name}.weight_hr{own.suffix}", owner.proj_size, 1))
        else:
            hidden.append(ids)
    couplings.part(units[0], (name, "hidden_size"))
    if owner.proj_size:
        couplings.part(hidden[0], (name, "proj_size"))
    return units, hidden


def _rank_together(watcher: Watcher, owner: nn.RNNBase, units: list[Tensor], hidden: list[Tensor]) -> None:
    """Unite the units of equal rank of all directions."""
    every = list(directions(owner))
    for own, ids, seen in zip(every[1:], units[1:], hidden[1:], strict=True):
        if owner.proj_size:
            watcher.couplings.unite(units[0], ids)
        first, order = order_of(owner, every[0]), order_of(owner, own)
        watcher.couplings.unite(hidden[0][first], seen[order])


def _read(watcher: Watcher, name: str, owner: nn.RNNBase, axis: Axis | None, x: Tensor, hidden: list[Tensor]) -> None:
    """The input's components are read by the first layer, every layer's by the next one and by itself."""
    if axis is not None and axis.dim != x.ndim - 1:
        watcher.freeze(axis, "a recurrent layer runs across another axis")
        axis = None
    every: list[Direction] = list(directions(owner))
    for own, ids in zip(every, hidden, strict=True):
        watcher.couplings.read(f"{name}.weight_hh{own.suffix}", ids, 1)
        if own.layer:
            below = [h for d, h in zip(every, hidden, strict=True) if d.layer == own.layer - 1]
            watcher.couplings.read(f"{name}.weight_ih{own.suffix}", torch.cat(below), 1)
        elif axis is not None:
            watcher.couplings.read(f"{name}.weight_ih{own.suffix}", axis.ids, 1)
    if axis is not None:
        watcher.couplings.part(axis.ids[axis.ids >= 0], (name, "input_size"))


def _begin(watcher: Watcher, call: TracedCall, state: Tensor, ids: Tensor) -> bool:
    """An initial state ``(directions, batch, width)``: another layer's components meet these, zeros do nothing.

    Whether it has said which units of all directions go together.
    """
    placement = call.placements.get(id(state))
    if isinstance(placement, Axis) and placement.dim == 2:
        watcher.couplings.unite(placement.ids.repeat(len(ids)), ids.flatten())
        return True
    if isinstance(placement, Grid) and placement.ids.shape[::2] == ids.shape:
        watcher.couplings.unite(placement.ids.flatten(), ids.flatten())
        return True
    if placement is not None or not is_constant(state, 2):
        watcher.freeze(placement, "a recurrent layer begins with these channels")
        watcher.couplings.freeze(ids.flatten(), f"a fixed or unknown state begins this layer ({watcher.where})")
    return False


def _all_layers(ids: Tensor) -> Placement:
    """Where the last states ``(directions, batch, width)`` have the components ``(directions, width)``."""
    return Axis(2, ids[0]) if len(ids) == 1 else Grid(ids[:, None])
