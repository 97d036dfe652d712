"""Rules for operations that leave elements in their places: functions of one tensor, and meetings of several."""

from __future__ import annotations

import torch
from torch import Tensor

from modhifi.structure.tracing.operations import register_operation, rule_for
from modhifi.structure.tracing.placements import Axis, Placement, TracedCall, is_constant, of_one_item
from modhifi.structure.tracing.watcher import Watcher


@rule_for("activation", "elementwise")
def elementwise(watcher: Watcher, call: TracedCall) -> list[Placement | None]:
    """One tensor carries components, and whatever else goes in is a single number."""
    if len(call.carriers) == 1:
        tensor, placement = call.carriers[0]
        numbers = all(t.numel() == 1 for t in call.inputs if t is not tensor)
        if numbers and all(out.shape == tensor.shape for out in call.outputs):
            return [placement] * len(call.outputs)
    return watcher.unknown(call)


def glu(watcher: Watcher, call: TracedCall) -> list[Placement | None]:
    """One half of an axis gates the other: a channel and its gate are one component."""
    x = call.argument(0, "input")
    axis, dim = call.axis(x), call.argument(1, "dim", -1) % x.ndim
    if axis is None or axis.dim != dim:
        return watcher.unknown(call) if axis is None else [axis]
    values, gates = axis.ids.chunk(2)
    watcher.couplings.unite(values, gates)
    return [Axis(dim, values)]


register_operation("glu", glu)


@rule_for("unchanged", "cast")
def unchanged(watcher: Watcher, call: TracedCall) -> list[Placement | None]:
    """The first input passes; others (``type_as``) only say how it is stored."""
    return [call.placements[id(call.inputs[0])]] * len(call.outputs)


@rule_for("creation")
def creation(watcher: Watcher, call: TracedCall) -> list[Placement | None]:
    """A new tensor carries nothing: only its shape came from the input."""
    return [None] * len(call.outputs)


@rule_for("sum", "difference", "product", "quotient", "binary")
def binary(watcher: Watcher, call: TracedCall) -> list[Placement | None]:
    """Elements at the same places of several tensors meet, broadcast from the last axis on."""
    dims = call.outputs[0].ndim
    places = [(t, {d: d + dims - t.ndim for d in range(t.ndim)}) for t in call.inputs]
    return couple(watcher, call, places, "sum" if call.kind in ("sum", "difference") else None)


@rule_for("matrix product")
def matrix_product(watcher: Watcher, call: TracedCall) -> list[Placement | None]:
    """Batch axes (heads) meet one another, rows and columns pass; what is summed over must stay."""
    if len(call.inputs) != 2 or min(t.ndim for t in call.inputs) < 2:
        return watcher.unknown(call)
    dims, places = call.outputs[0].ndim, []
    reverse = call.name == "__rmatmul__"
    for number, tensor in enumerate(reversed(call.inputs) if reverse else call.inputs):
        free = tensor.ndim - 2 + number  # the rows of the first, the columns of the second factor
        place = {d: d + dims - tensor.ndim for d in (*range(tensor.ndim - 2), free)}
        places.append((tensor, place))
    return couple(watcher, call, places, "heads")


def baddbmm(watcher: Watcher, call: TracedCall) -> list[Placement | None]:
    """A batch of products added to a tensor: as the product itself, which that tensor meets at every place."""
    added, first, second = call.inputs
    places = [
        (added, {d: d + 3 - added.ndim for d in range(added.ndim)}),
        (first, {0: 0, 1: 1}),
        (second, {0: 0, 2: 2}),
    ]
    return couple(watcher, call, places, "heads")


register_operation("baddbmm", baddbmm)


def einsum(watcher: Watcher, call: TracedCall) -> list[Placement | None]:
    """Axes of one letter meet; those whose letter is not in the result are summed over."""
    tensors = call.inputs
    terms, arrow, result = str(call.argument(0, "equation")).replace(" ", "").partition("->")
    letters = terms.split(",")
    if not arrow or "." in terms or len(letters) != len(tensors) or any(len(set(t)) < len(t) for t in letters):
        return watcher.unknown(call)
    places = [
        (tensor, {d: result.index(letter) for d, letter in enumerate(term) if letter in result})
        for tensor, term in zip(tensors, letters, strict=True)
    ]
    return couple(watcher, call, places, "heads")


register_operation("einsum", einsum)


@rule_for("attention")
def attention(watcher: Watcher, call: TracedCall) -> list[Placement | None]:
    """Heads of queries, keys, values and mask meet; with grouped queries each key-value head meets several."""
    dims = call.outputs[0].ndim
    names = ("query", "key", "value", "attn_mask")
    tensors = [call.argument(number, name) for number, name in enumerate(names)]
    places = [(t, {d: d + dims - t.ndim for d in range(t.ndim - 2)}) for t in tensors if isinstance(t, Tensor)]
    if watcher.ranks:
        places[2][1][tensors[2].ndim - 1] = dims - 1
    return couple(watcher, call, places, "heads", grouped=bool(call.argument(7, "enable_gqa", False)))


def couple(
    watcher: Watcher,
    call: TracedCall,
    places: list[tuple[Tensor, dict[int, int]]],
    mark: str | None,
    grouped: bool = False,
) -> list[Placement | None]:
    """Unite the components that several tensors carry along one axis of the output.

    ``places`` maps each tensor's axes to the output's; an axis that is not there is summed over. ``grouped`` lets
    each component of a shorter axis meet several neighbours on the longer one.
    """
    out = call.outputs[0]
    met: list[tuple[int, Tensor]] = []
    tables: list[tuple[Tensor, dict[int, int], Tensor]] = []
    for tensor, place in places:
        axis = call.axis(tensor)
        if axis is None:
            continue
        if axis.dim not in place:
            watcher.freeze(axis, f"'{call.name}' sums over these channels")
            continue
        dim, ids = place[axis.dim], axis.ids
        if grouped and out.shape[dim] % len(ids) == 0:
            ids = ids.repeat_interleave(out.shape[dim] // len(ids))
        if len(ids) == out.shape[dim]:
            met.append((dim, ids))
            tables.append((tensor, place, axis.ids))
        else:
            watcher.freeze(axis, "a single channel multiplies all others")
    produced = [(dim, ids) for dim, ids in met if not watcher.couplings.is_loose(ids)] or met
    if not produced:
        return [None] * len(call.outputs)
    dim, first = max(produced, key=lambda pair: len(pair[1]))
    for other, ids in produced:
        if other != dim:
            watcher.freeze(Axis(other, ids), "these channels meet more of them on another axis")
    for (other, ids), (tensor, place, own) in zip(met, tables, strict=True):
        if other != dim:  # a parameter along another axis, such as a norm's inside each head
            watcher.freeze(Axis(other, ids), "a parameter spans another axis")
            here = next((d for d, o in place.items() if o == dim), None)
            if here is not None and (rows := _rows(watcher, tensor, here, own)) is not None:
                watcher.couplings.unite(first, rows)
    for tensor, place in places:
        here = next((d for d, o in place.items() if o == dim), None)
        if here is not None and call.axis(tensor) is None and tensor.shape[here] > 1:
            if id(tensor) in watcher.parameters or not is_constant(tensor, here):
                if (mark == "heads" and dim < out.ndim - 2) or watcher.couplings.are_heads(first):
                    watcher.meets_heads(first, here)
                return watcher.refuse(call, "a fixed or unknown tensor spans these channels")
    others = [ids for other, ids in met if other == dim and ids is not first]
    for ids in others:
        watcher.couplings.unite(first, ids)
    if mark == "sum" and any(not torch.equal(ids, first) for ids in others):
        watcher.couplings.mark(first, mark)
    if mark == "heads" and dim < out.ndim - 2:
        watcher.couplings.mark(of_one_item(first), mark)
    if mark == "heads" and watcher.ranks and dim == out.ndim - 1:
        watcher.couplings.mark(first, "ranks")
    return [Axis(dim, first)] * len(call.outputs)


def _rows(watcher: Watcher, tensor: Tensor, dim: int, columns: Tensor) -> Tensor | None:
    """The channels along the first axis of a table ``(heads, width)``, which a tensor shows along ``dim``."""
    name = watcher.couplings.parameter_of(columns)
    shape = None if name is None else watcher.model.get_parameter(name).shape
    if name is None or shape is None or len(shape) != 2 or tensor.shape[dim] != shape[0]:
        return None
    return watcher.couplings.rows(name, shape[0]) if tensor.numel() == shape.numel() else None
