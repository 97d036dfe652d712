"""Rules for operations after which elements stand elsewhere: movements, pooling, padding, reductions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from modhifi.structure.operators import last_wide
from modhifi.structure.splits import Count, Split
from modhifi.structure.tracing.elementwise_rules import binary
from modhifi.structure.tracing.operations import register_operation, rule_for
from modhifi.structure.tracing.placements import Axis, Grid, Placement, TracedCall, is_constant
from modhifi.structure.tracing.watcher import Watcher

# These take nothing but a shape from their second input.
LIKE = ("expand_as", "view_as", "reshape_as")
# What a class of a norm, which computes its means itself, is called by one of these names in its own.
NORMS = {
    "RMSNorm": "an RMSNorm normalises across these channels",
    "LayerNorm": "a LayerNorm normalises across these channels",
    "GRN": "a global response norm normalises across these channels",
    "ResponseNorm": "a global response norm normalises across these channels",
    "Norm": "a norm normalises across these channels",
}
# These read whole numbers that say which elements they take.
INDEXING = ("__getitem__", "index_select")


@rule_for("reshape", "movement", "placed", "join")
def move(watcher: Watcher, call: TracedCall) -> list[Placement | None]:
    """The operation is run on component numbers: where they come out, the components stand."""
    if call.kind == "join" and (beside := _beside(watcher, call)) is not None:
        return [beside]
    if (table := watcher.looked_up(call)) is not None:
        return [Axis(0, watcher.couplings.rows(table, len(call.args[0])))]
    if call.name in LIKE and call.placements.get(id(call.inputs[0])) is None:
        return [None]
    moved = call.inputs[:1] if call.name in LIKE else call.inputs
    without = [t for t in moved if t.ndim > 0 and _carries_nothing(call, t)]
    indexed = call.name == "__getitem__" and any(call.placements.get(id(t)) is not None for t in call.inputs[1:])
    if indexed or (without and call.kind != "join"):
        return watcher.unknown(call)
    try:
        places = call.moved()
    except (IndexError, RuntimeError, TypeError, ValueError):  # an operation that takes no integers
        return watcher.unknown(call)
    placements = [p for p in places if p is not None and bool((p.ids >= 0).any())]
    split = any(isinstance(p, Grid) for p in placements) and not call.grids
    if len(placements) < sum(t.numel() > 0 for t in call.outputs) or (split and call.kind != "reshape"):
        return watcher.refuse(call, f"'{call.name}' folds these channels into another shape")
    if call.kind == "placed" and not _takes_alike(watcher, call, call.carriers[0][1].ids.flatten(), placements):
        return watcher.refuse(call, f"'{call.name}' takes these channels from fixed places")
    if split and len(call.outputs) == 1 and isinstance(places[0], Grid) and _wide(places[0]) == 2:
        watcher.unsettled.add(id(call.outputs[0]))
        return places
    return [_collapse(watcher, p) if split and isinstance(p, Grid) else p for p in places]


def settle(watcher: Watcher, call: TracedCall) -> None:
    """Decide what a reshape to two axes has made, by the first operation that reads it.

    Whoever takes a row at a time, as ``x.view(..., 2, -1)[..., 0, :]`` does, reads pieces of equal length; to any other
    the rows are heads.
    """
    for tensor, grid in call.carriers:
        if id(tensor) not in watcher.unsettled or not isinstance(grid, Grid):
            continue
        if call.kind == "placed" and len(call.carriers) == 1:
            rows = call.moved()
            if all(isinstance(p, Axis) and len(p.ids) == grid.ids.shape[last_wide(grid.ids)] for p in rows):
                continue
        watcher.unsettled.discard(id(tensor))
        call.placements[id(tensor)] = _collapse(watcher, grid)
        watcher.remember(tensor, call.placements[id(tensor)])


def _wide(grid: Grid) -> int:
    """The number of axes along which components vary."""
    return sum(size > 1 for size in grid.ids.shape)


def _beside(watcher: Watcher, call: TracedCall) -> Placement | None:
    """Components of several tensors along one axis that are joined along another, as scores and sinks of heads are.

    Beside them may stand what is the same for all of them, such as zeros.
    """
    axes = [(tensor, call.axis(tensor)) for tensor in call.inputs if tensor.numel()]
    known = [axis for _, axis in axes if axis is not None]
    ndim, dim = call.outputs[0].ndim, call.argument(1, "dim", 0)
    if not known or call.grids or known[0].dim == dim % ndim:
        return None
    first, fixed = known[0], [tensor for tensor, axis in axes if axis is None]
    if any(axis.dim != first.dim or len(axis.ids) != len(first.ids) for axis in known):
        return None
    if any(id(tensor) in watcher.parameters or not is_constant(tensor, first.dim) for tensor in fixed):
        return None
    for axis in known[1:]:
        watcher.couplings.unite(first.ids, axis.ids)
    return first


def complex_pairs(watcher: Watcher, call: TracedCall) -> list[Placement | None]:
    """Pairs along the last axis become complex numbers, or the other way round: other axes stay."""
    axis = call.axis(call.inputs[0])
    if axis is None or (call.name == "view_as_complex" and axis.dim == call.inputs[0].ndim - 1):
        return watcher.unknown(call)
    return [axis]


for _name in ("view_as_complex", "view_as_real"):
    register_operation(_name, complex_pairs)


def copy_into(watcher: Watcher, call: TracedCall) -> list[Placement | None]:
    """Values written into a part of a new tensor, which carries their components along axes written as a whole.

    A part that was written before may meet values that are the same for all components.
    """
    target, source = call.inputs
    axis, base = call.axis(source), target._base
    known = None if base is None else watcher.placements.get(id(base))
    if isinstance(known, Axis) and (axis is None or axis.dim != known.dim) and is_constant(source, known.dim):
        watcher.freeze(axis, "these channels are written into a part of another tensor")
        return [call.axis(target)]
    whole = base is not None and base.ndim == target.ndim and source.shape == target.shape
    if axis is None or base is None or not whole or base.shape[axis.dim] != target.shape[axis.dim]:
        return watcher.unknown(call)
    if isinstance(known, Axis):
        watcher.couplings.unite(known.ids, axis.ids)
    watcher.remember(base, axis)
    return [axis]


register_operation("copy_", copy_into)


def _carries_nothing(call: TracedCall, tensor: Tensor) -> bool:
    """Whether a tensor carries no components, and is no index either, which takes elements off other axes."""
    return call.placements.get(id(tensor)) is None and (tensor.is_floating_point() or call.name not in INDEXING)


def _collapse(watcher: Watcher, grid: Grid) -> Placement:
    """A reshape has spread components over several axes: let those that differ in the last one live as one.

    So the channels of an attention head become one component where ``(..., H * D)`` is seen as ``(..., H, D)``; where
    ranks are looked for, it is channel i of every head.
    """
    dim = last_wide(grid.ids)
    if watcher.ranks:
        by_head = grid.ids.movedim(dim, -1).flatten(0, -2)
        watcher.couplings.unite(by_head[:1].expand_as(by_head).flatten(), by_head.flatten())
        return Axis(dim, by_head[0].clone())
    heads = grid.ids.narrow(dim, 0, 1)
    watcher.couplings.unite(heads.expand_as(grid.ids).flatten(), grid.ids.flatten())
    wide = [d for d, size in enumerate(heads.shape) if size > 1]
    return Axis(wide[0], heads.flatten()) if len(wide) == 1 else Grid(heads)


def _takes_alike(watcher: Watcher, call: TracedCall, source: Tensor, placements: list[Placement]) -> bool:
    """Whether an operation that names places takes pieces in order; what becomes of them is settled in the end."""
    if all(torch.equal(p.ids.flatten(), source) for p in placements):
        return True
    reason = f"'{call.name}' takes these channels from fixed places ({watcher.where})"
    taken = [torch.isin(source, p.ids) for p in placements]
    if not all(torch.equal(source[t], p.ids.flatten()) for t, p in zip(taken, placements, strict=True)):
        return False
    if watcher.ranks:  # queries, keys and values of one matrix, each with a width of its own
        for mask in taken:
            watcher.couplings.part(source[mask], None)
        return True
    complete = len(taken) > 1 and bool((torch.stack(taken).sum(0) == 1).all()) and not call.grids
    for masks in [taken] if complete else [[t, ~t] for t in taken if not bool(t.all())]:
        pieces = tuple(torch.nonzero(mask).flatten() for mask in masks)
        counts = counts_of(watcher, tuple(map(len, pieces))) if complete or _at_an_end(masks[0]) else [None, None]
        watcher.couplings.splits.append(Split(source, pieces, tuple(counts), complete, reason))
    return True


def _at_an_end(taken: Tensor) -> bool:
    """Whether what is taken is one stretch at the beginning or at the end: a single size then says where."""
    return int((taken[1:] != taken[:-1]).sum()) == 1


def counts_of(watcher: Watcher, sizes: tuple[int, ...]) -> list[Count | None]:
    """What says the size of each piece: an attribute of the innermost module being run that has one.

    A list of just these sizes goes before integers, of which the code of the module's class has to read each.
    """
    for name, _ in reversed(watcher.path):
        module = watcher.model.get_submodule(name)
        for attribute, value in vars(module).items():
            if isinstance(value, (list, tuple)) and list(map(type, value)) == [int] * len(sizes):
                if tuple(value) != sizes:
                    continue
                return [(name, f"{attribute}.{at}") for at in range(len(sizes))]
        read = [attribute for attribute in integers_read(module) if getattr(module, attribute) in sizes]
        if read:
            by_size = {getattr(module, attribute): (name, attribute) for attribute in read}
            return [by_size.get(size) for size in sizes]
    return [None] * len(sizes)


def integers_read(module: nn.Module) -> list[str]:
    """The integer attributes of a module that the code of its class reads after construction."""
    code = [f.__code__ for name, f in vars(type(module)).items() if name != "__init__" and hasattr(f, "__code__")]
    names = {name for part in code for name in part.co_names}
    return [name for name, value in vars(module).items() if type(value) is int and name in names]


def gather(watcher: Watcher, call: TracedCall) -> Sequence[Placement | None]:
    """Elements are taken along another axis, at the same places for every component."""
    x, dim, index = call.argument(0, "input"), call.argument(1, "dim"), call.argument(2, "index")
    axis = call.axis(x)
    if axis is None or axis.dim == dim % x.ndim or call.axis(index) is not None:
        return move(watcher, call)
    if index.shape[axis.dim] != x.shape[axis.dim] or not is_constant(index, axis.dim):
        return watcher.unknown(call)
    return [axis]


register_operation("gather", gather)


def pixel_shuffle(watcher: Watcher, call: TracedCall) -> list[Placement | None]:
    """The channels that become one, spread over its pixels, are one component."""
    x, axis = call.inputs[0], call.axis(call.inputs[0])
    if axis is None or axis.dim != x.ndim - 3:
        return watcher.unknown(call)
    together = axis.ids.view(call.outputs[0].shape[axis.dim], -1)
    watcher.couplings.unite(together[:, :1].expand_as(together).flatten(), axis.ids)
    return [Axis(axis.dim, together[:, 0].clone())]


register_operation("pixel_shuffle", pixel_shuffle)


@rule_for("pooling")
def pooling(watcher: Watcher, call: TracedCall) -> list[Placement | None]:
    """Every channel, on axis 1, is pooled or resized by itself."""
    axis = call.axis(call.inputs[0])
    return watcher.unknown(call) if axis is None or axis.dim != 1 else [axis] * len(call.outputs)


@rule_for("padding")
def padding(watcher: Watcher, call: TracedCall) -> list[Placement | None]:
    """Pads are named from the last axis on, two for each; the axis of the components must get none."""
    x, pads = call.inputs[0], call.argument(1, "pad")
    axis = call.axis(x)
    if axis is None:
        return watcher.unknown(call)
    at = 2 * (x.ndim - 1 - axis.dim)
    return [axis] if not any(pads[at : at + 2]) else watcher.refuse(call, "these channels are padded with others")


@rule_for("reduction", "vector norm")
def reduce(watcher: Watcher, call: TracedCall) -> list[Placement | None]:
    """Axes without components may be reduced; those before the components' own move it forward."""
    x, axis = call.inputs[0], call.axis(call.inputs[0])
    if axis is None:
        return watcher.unknown(call)
    place = 2 if call.kind == "vector norm" else 1
    dims = call.argument(place, "dim")
    if not isinstance(dims, (int, tuple, list)):
        dims = tuple(range(x.ndim))
    reduced = {d % x.ndim for d in ((dims,) if isinstance(dims, int) else dims)}
    if axis.dim in reduced:
        kind = type(watcher.model.get_submodule(watcher.path[-1][0] if watcher.path else "")).__name__
        norms = (reason for name, reason in NORMS.items() if name in kind)
        watcher.freeze(axis, next(norms, "a mean, sum or norm runs across these channels"))
        return [None] * len(call.outputs)
    before = 0 if call.argument(place + 1, "keepdim", False) else sum(d < axis.dim for d in reduced)
    return [Axis(axis.dim - before, axis.ids)] * len(call.outputs)


def extreme(watcher: Watcher, call: TracedCall) -> Sequence[Placement | None]:
    """The largest or smallest along an axis, or of two tensors at each place."""
    return binary(watcher, call) if len(call.inputs) > 1 else reduce(watcher, call)


for _name in ("max", "min"):
    register_operation(_name, extreme)
