"""The only file that changes a module's shape."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from modhifi.structure.clone import clone
from modhifi.structure.families import restate
from modhifi.structure.groups import Structure
from modhifi.structure.head_counts import set_count
from modhifi.structure.library_layers import is_transposed
from modhifi.structure.operators import conv_groups, kernel_size, last_wide, weight_matrix, write_weight
from modhifi.structure.plan import Plan
from modhifi.structure.stacked import TURNED, Stacked, holder, operator_at, select


def removed_positions(structure: Structure, plan: Plan) -> dict[tuple[str, str], Tensor]:
    """Channel positions to cut, by (module or parameter, role)."""
    removed: dict[tuple[str, str], list[Tensor]] = defaultdict(list)
    for group in structure.groups:
        if group.name in plan.kept:
            out = ~plan.mask(group)
            for piece in group.slices:
                removed[piece.module, piece.role].append(piece.index[out].reshape(-1))
    return {key: torch.cat(pieces) for key, pieces in removed.items()}


def mask_readers(model: nn.Module, structure: Structure, plan: Plan, shared: Iterable[Tensor] = ()) -> nn.Module:
    """A copy of the model, all shapes kept, in which no reader sees the removed components (the mask oracle).

    Of the ``shared`` tensors the copy holds the original's own where no mask is written into them.
    """
    removed = removed_positions(structure, plan)
    masked = {id(operator_at(model, name).weight) for name, role in removed if role == "reader"}
    model = clone(model, (tensor for tensor in shared if id(tensor) not in masked))
    for (name, role), positions in removed.items():
        if role != "reader":
            continue
        module = operator_at(model, name)
        matrix = weight_matrix(module)
        channels = matrix.shape[0] * matrix.shape[2] // kernel_size(module)
        matrix = matrix.reshape(matrix.shape[0], matrix.shape[1], channels // matrix.shape[0], -1)
        per = channels // matrix.shape[0]
        matrix[positions // per, :, positions % per] = 0
        write_weight(module, matrix.flatten(2))
    return model


def shrink(model: nn.Module, structure: Structure, plan: Plan) -> nn.Module:
    """Cut the removed components out of the model, in place, and return it.

    Weights, biases, norms and counting attributes of every producer, reader and module along the way are sliced; no
    value changes. The plan must fit (:meth:`Plan.check`).
    """
    plan.check(structure)
    removed = removed_positions(structure, plan)
    for name in dict.fromkeys(name for name, _ in removed):
        none = torch.empty(0, dtype=torch.int64)
        outputs = removed.get((name, "producer"), none)
        inputs = removed.get((name, "reader"), none)
        along = removed.get((name, "along"), none)
        parent, leaf = holder(model, name)
        place = getattr(parent, leaf)
        if (name, "matrices") in removed:
            _replace(parent, leaf, select(place.data, 0, staying(len(place), removed[name, "matrices"])))
        elif (name, "biases") in removed:
            stay = staying(place.numel(), removed[name, "biases"])
            _replace(parent, leaf, select(place.data.flatten(), 0, stay).view(len(place), -1))
        elif isinstance(place, Tensor) and len(along):
            _shrink_parameter(parent, leaf, along)
        elif isinstance(place, Tensor):
            stack = Stacked(parent, leaf, name.endswith(TURNED))
            stack.cut(staying(stack.in_features, inputs), staying(stack.out_features, outputs))
        elif len(along):
            _shrink_along(place, along)
        else:
            _shrink_operator(place, inputs, outputs)
    for group in structure.groups:
        if group.name in plan.kept:
            for name, attribute, amount in group.attributes:
                set_count(model.get_submodule(name), attribute, amount * len(plan.kept[group.name]))
    restate(model, structure)
    return model


def staying(total: int, removed: Tensor) -> Tensor:
    """Which of ``total`` positions are not ``removed``: bool ``(total,)``."""
    stay = torch.ones(total, dtype=torch.bool)
    stay[removed] = False
    return stay


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
    reference = module.weight if getattr(module, "weight", None) is not None else module.running_mean
    stay = staying(len(reference), removed)
    for name in ("weight", "bias", "running_mean", "running_var"):
        value = getattr(module, name, None)
        if value is not None:
            _replace(module, name, select(value.data, 0, stay))
    width = int(stay.sum())
    if hasattr(module, "kernel_size"):
        inputs = width * module.in_channels // module.out_channels
        module.in_channels, module.out_channels, module.groups = inputs, width, inputs
    for attribute in ("num_features", "num_channels"):
        _set(module, attribute, width)
    if isinstance(module, nn.GroupNorm):
        module.num_groups = width


def _part(weight: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """The rows and columns of a weight that stay, bool each; an axis that stays whole is not copied."""
    return select(select(weight, 0, rows), 1, columns)


def _shrink_operator(module: Any, inputs: Tensor, outputs: Tensor) -> None:
    if is_transposed(module):
        stay_in, stay_out = staying(module.nx, inputs), staying(module.nf, outputs)
        _replace(module, "weight", _part(module.weight.data, stay_in, stay_out))
        _replace(module, "bias", select(module.bias.data, 0, stay_out))
        module.nx, module.nf = int(stay_in.sum()), int(stay_out.sum())
        return
    weight, groups = module.weight.data, conv_groups(module)
    stay_out = staying(weight.shape[0], outputs)
    stay_in = staying(weight.shape[1] * groups, inputs)
    rows, columns = stay_out.view(groups, -1), stay_in.view(groups, -1)
    parts = [_part(part, r, c) for part, r, c in zip(weight.chunk(groups), rows, columns, strict=True)]
    _replace(module, "weight", torch.cat(parts) if groups > 1 else parts[0])
    if getattr(module, "bias", None) is not None:
        _replace(module, "bias", select(module.bias.data, 0, stay_out))
    for kind in ("channels", "features"):
        _set(module, f"in_{kind}", int(stay_in.sum()))
        _set(module, f"out_{kind}", int(stay_out.sum()))
