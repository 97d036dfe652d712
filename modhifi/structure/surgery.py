"""The only file that changes a module's shape."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from modhifi.structure.arguments import take_fewer
from modhifi.structure.clone import clone, without_caches
from modhifi.structure.depth import drop, removed_parts, silence, silenced
from modhifi.structure.families import restate, restate_depth
from modhifi.structure.groups import Structure
from modhifi.structure.head_counts import set_count, shorten
from modhifi.structure.operators import (
    as_stored,
    conv_groups,
    kernel_size,
    last_wide,
    outputs_first,
    weight_matrix,
    write_weight,
)
from modhifi.structure.places import holder, operator_at
from modhifi.structure.plan import Plan
from modhifi.structure.recurrent import Gates
from modhifi.structure.stacked import Stacked, select


def removed_positions(structure: Structure, plan: Plan) -> dict[tuple[str, str], Tensor]:
    """Channel positions to cut, by (module or parameter, role)."""
    removed: dict[tuple[str, str], list[Tensor]] = defaultdict(list)
    for group in structure.groups:
        if group.name in plan.kept:
            out = ~plan.mask(group)
            for piece in (piece for piece in group.slices if piece.role != "argument"):
                removed[piece.module, piece.role].append(piece.index[out].reshape(-1))
    return {key: torch.cat(pieces) for key, pieces in removed.items()}


def mask_readers(model: nn.Module, structure: Structure, plan: Plan, shared: Iterable[Tensor] = ()) -> nn.Module:
    """A copy of the model, all shapes kept, in which no reader sees the removed components (the mask oracle).

    Branches in removed blocks and sublayers add nothing. Of the ``shared`` tensors the copy holds the original's own
    where no mask is written into them.
    """
    removed = removed_positions(structure, plan)
    masked = {id(operator_at(model, name).weight) for name, role in removed if role == "reader"}
    parts = removed_parts(structure, plan)
    masked |= {id(parameter) for parameter in silenced(model, structure, parts)}
    model = clone(model, (tensor for tensor in shared if id(tensor) not in masked))
    silence(model, structure, parts)
    for (name, role), positions in removed.items():
        if role != "reader":
            continue
        module = operator_at(model, name)
        matrix = weight_matrix(module, dtype=None)
        channels = matrix.shape[0] * matrix.shape[2] // kernel_size(module)
        removed_columns = ~staying(channels, positions).view(len(matrix), 1, -1, 1).to(matrix.device)
        matrix = matrix.unflatten(2, (channels // len(matrix), -1))
        write_weight(module, matrix.masked_fill(removed_columns, 0).flatten(2))
    return model


def shrink(model: nn.Module, structure: Structure, plan: Plan) -> nn.Module:
    """Cut the removed components out of the model, in place, and return it.

    Removed blocks and sublayers go whole, and blocks behind them move up. Weights, biases, norms and counting
    attributes of every producer, reader and module along the way are sliced; no value changes. The plan must fit
    (:meth:`Plan.check`).
    """
    plan.check(structure)
    removed, axes = removed_positions(structure, plan), structure.table_axes
    for name in dict.fromkeys(name for name, _ in removed):
        none = torch.empty(0, dtype=torch.int64)
        outputs = removed.get((name, "producer"), none)
        inputs = removed.get((name, "reader"), none)
        along = removed.get((name, "along"), none)
        parent, leaf = holder(model, name)
        place = getattr(parent, leaf)
        first = removed.get((name, "matrices"), removed.get((name, "rows")))
        if first is not None:
            dim = axes.get(name, 0)
            _replace(parent, leaf, select(place.data, dim, staying(place.shape[dim], first)))
        elif (name, "biases") in removed:
            stay = staying(place.numel(), removed[name, "biases"])
            _replace(parent, leaf, select(place.data.flatten(), 0, stay).view(len(place), -1))
        elif isinstance(place, Tensor) and len(along):
            _shrink_parameter(parent, leaf, along)
        elif isinstance(operator := operator_at(model, name), Stacked | Gates):
            operator.cut(staying(operator.in_features, inputs), staying(operator.out_features, outputs))
        elif len(along):
            _shrink_along(place, along)
        else:
            _shrink_operator(place, inputs, outputs)
    for group in structure.groups:
        if group.name in plan.kept:
            for piece in group.of("argument"):
                out = piece.index[~plan.mask(group)].flatten()
                take_fewer(*holder(model, piece.module), piece.dim, staying(piece.index.numel(), out))
            for name, attribute, amount in group.attributes:
                set_count(model.get_submodule(name), attribute, amount * len(plan.kept[group.name]))
            for name, attribute, amount in group.pieces:
                shorten(model.get_submodule(name), attribute, amount * (group.n - len(plan.kept[group.name])))
    parts = removed_parts(structure, plan)
    restate(model, structure.without(parts))
    restate_depth(model, parts)
    return drop(without_caches(model), parts)


def staying(total: int, removed: Tensor) -> Tensor:
    """Which of ``total`` positions are not ``removed``: bool ``(total,)``."""
    stay = torch.ones(total, dtype=torch.bool)
    return stay.index_fill_(0, removed, False) if len(removed) else stay


def _replace(module: nn.Module, name: str, value: Tensor) -> None:
    old = getattr(module, name)
    value = value.contiguous()
    if isinstance(old, nn.Parameter):
        value = nn.Parameter(value, requires_grad=old.requires_grad)
    setattr(module, name, value)


def _shrink_parameter(parent: nn.Module, leaf: str, removed: Tensor) -> None:
    value = getattr(parent, leaf).data
    dim = last_wide(value)
    stay = staying(value.shape[dim], removed)
    _replace(parent, leaf, select(value, dim, stay))
    for attribute in ("num_parameters", "embedding_dim"):
        _set(parent, attribute, int(stay.sum()))


def _set(module: nn.Module, attribute: str, value: int) -> None:
    if hasattr(module, attribute):
        setattr(module, attribute, value)


def _shrink_along(module: Any, removed: Tensor) -> None:
    """A norm, or a depthwise conv (whose positions are those of its output)."""
    names = ("weight", "bias", "running_mean", "running_var")
    values = {name: value.data for name in names if (value := getattr(module, name, None)) is not None}
    if hasattr(module, "kernel_size"):
        values["weight"] = outputs_first(module, values["weight"])
    widths = [getattr(module, name) for name in ("num_features", "num_channels") if hasattr(module, name)]
    before = len(next(iter(values.values()))) if values else widths[0]  # a norm without scales
    stay = staying(before, removed)
    width = int(stay.sum())
    kept = {name: select(value, 0, stay) for name, value in values.items()}
    if hasattr(module, "kernel_size"):
        inputs = width * module.in_channels // module.out_channels
        kept["weight"] = as_stored(module, kept["weight"], groups=inputs)
        module.in_channels, module.out_channels, module.groups = inputs, width, inputs
    for name, value in kept.items():
        _replace(module, name, value)
    for attribute in ("num_features", "num_channels"):
        _set(module, attribute, width)
    if isinstance(module, nn.GroupNorm):
        module.num_groups = module.num_groups * width // before


def _part(weight: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """The rows and columns of a weight that stay, bool each; an axis that stays whole is not copied."""
    return select(select(weight, 0, rows), 1, columns)


def _shrink_operator(module: Any, inputs: Tensor, outputs: Tensor) -> None:
    weight, groups = outputs_first(module, module.weight.data), conv_groups(module)
    stay_out = staying(weight.shape[0], outputs)
    stay_in = staying(weight.shape[1] * groups, inputs)
    rows, columns = stay_out.view(groups, -1), stay_in.view(groups, -1)
    parts = [_part(part, r, c) for part, r, c in zip(weight.chunk(groups), rows, columns, strict=True)]
    _replace(module, "weight", as_stored(module, torch.cat(parts) if groups > 1 else parts[0]))
    if getattr(module, "bias", None) is not None:
        _replace(module, "bias", select(module.bias.data, 0, stay_out))
    widths = int(stay_in.sum()), int(stay_out.sum())
    for names in (("in_channels", "out_channels"), ("in_features", "out_features"), ("nx", "nf")):
        for name, width in zip(names, widths, strict=True):
            _set(module, name, width)
