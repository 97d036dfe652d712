"""A cut model back in the shapes of its original: the same function, zero columns where components went.

Blocks and sublayers that went are there again, and add nothing. Removed channels count once, at their readers: the
producers keep the original's rows, which nobody reads any more. So do ranks, whose readers take the original's basis.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd

from modhifi.errors import ModhifiError
from modhifi.structure.clone import clone
from modhifi.structure.depth import inside, name_after, removed_parts, silence
from modhifi.structure.groups import Structure
from modhifi.structure.operators import as_stored, conv_groups, last_wide, outputs_first
from modhifi.structure.places import holder, operator_at
from modhifi.structure.plan import Plan
from modhifi.structure.ranks import in_dense_basis
from modhifi.structure.stacked import TURNED, Stacked
from modhifi.structure.surgery import removed_positions, staying


def expand(small: nn.Module, dense: nn.Module, structure: Structure, plan: Plan) -> nn.Module:
    """The inverse of `surgery.shrink`: ``small`` in the shapes of ``dense``, which stays as it is.

    Raises ModhifiError where the two do not fit under this plan: another original, other modules, other widths.
    """
    plan.check(structure)
    model = clone(dense).cpu()
    parts = removed_parts(structure, plan)
    silence(model, structure, parts)
    names = {after: key for key in model.state_dict() if (after := name_after(key, parts)) is not None}
    state = {k: v.detach().cpu() for k, v in small.state_dict().items()}
    ours = {key: value for key, value in model.state_dict().items() if not inside(key, parts)}
    theirs = {names.get(key, key): value for key, value in state.items()}
    if ours.keys() != theirs.keys():
        other = sorted(ours.keys() ^ theirs.keys())[0]
        raise ModhifiError(
            f"the original has another architecture ({other} is in one of the two only); give the right one"
        )
    removed = removed_positions(structure, plan)
    done = set()
    for name in dict.fromkeys(name for name, _ in removed):
        none = torch.empty(0, dtype=torch.int64)
        inputs, outputs = removed.get((name, "reader"), none), removed.get((name, "producer"), none)
        along = removed.get((name, "along"), none)
        if inside(name, parts):
            continue
        parent, leaf = holder(model, name)
        if isinstance(getattr(parent, leaf), nn.Parameter):
            key = name.removesuffix(TURNED)
            done.add(key)
            if (name, "biases") in removed:
                _fill(ours[key].view(-1), theirs[key].reshape(-1), removed[name, "biases"], name)
            elif (name, "rows") in removed:
                dim = structure.table_axes[name]
                _fill(ours[key].movedim(dim, 0), theirs[key].movedim(dim, 0), removed[name, "rows"], name)
            elif len(along):
                dim = last_wide(ours[key])
                _fill(ours[key].movedim(dim, 0), theirs[key].movedim(dim, 0), along, name)
            elif isinstance(operator := operator_at(model, name), Stacked):
                _stack(operator, theirs[key], inputs, outputs, name)
            else:
                _operator(operator, ours[key], theirs[key], inputs, outputs, name)
            continue
        module = model.get_submodule(name)
        for leaf in ("weight", "bias", "running_mean", "running_var"):
            key = f"{name}.{leaf}"
            if key not in ours:
                continue
            done.add(key)
            if leaf == "weight" and not len(along):
                _operator(module, ours[key], theirs[key], inputs, outputs, name)
            elif leaf == "weight" and hasattr(module, "kernel_size"):  # a depthwise conv, a group for each input
                target, value = outputs_first(module, ours[key]), theirs[key]
                value = as_stored(module, value, groups=len(value)) if isinstance(module, _ConvTransposeNd) else value
                _fill(target, value, along, name)
                ours[key].copy_(as_stored(module, target))
            else:
                _fill(ours[key], theirs[key], along if len(along) else outputs, name)
    # One layer may stand under several names.
    filled = {(ours[key].data_ptr(), ours[key].shape) for key in done}
    for key, value in theirs.items():
        if key not in done and (ours[key].data_ptr(), ours[key].shape) not in filled:
            _same_shape(ours[key], value, key)
            ours[key].copy_(value)
    in_dense_basis(model, dense, structure, plan)
    return model


def _fill(target: Tensor, value: Tensor, removed: Tensor, name: str) -> None:
    stay = staying(len(target), removed)
    _same_shape(target[stay], value, name)
    target[stay] = value.to(target.dtype)


def _stack(stack: Stacked, value: Tensor, inputs: Tensor, outputs: Tensor, name: str) -> None:
    """:func:`_operator` for the matrices of experts, in place."""
    matrices = stack.matrices.data.flatten(0, 1).clone()
    _operator(stack, matrices, (value.mT if stack.turned else value).flatten(0, 1), inputs, outputs, name)
    stack.matrices.data.copy_(matrices.view(stack.matrices.shape))


def _operator(module: nn.Module, target: Tensor, value: Tensor, inputs: Tensor, outputs: Tensor, name: str) -> None:
    """Writes the kept block; removed input columns become zero, removed output rows stay the original's."""
    groups, stored = conv_groups(module), target
    if len(value) % groups:
        raise ModhifiError(f"'{name}' has other widths than the original under this plan; is it the same model?")
    target, value = outputs_first(module, target), outputs_first(module, value)
    rows = staying(target.shape[0], outputs).view(groups, -1)
    columns = staying(target.shape[1] * groups, inputs).view(groups, -1)
    for part, small, row, column in zip(target.chunk(groups), value.chunk(groups), rows, columns, strict=True):
        part[:, ~column] = 0
        block = part[row]
        _same_shape(block[:, column], small, name)
        block[:, column] = small.to(part.dtype)
        part[row] = block
    stored.copy_(as_stored(module, target).clone())


def _same_shape(ours: Tensor, theirs: Tensor, name: str) -> None:
    if ours.shape != theirs.shape:
        raise ModhifiError(
            f"'{name}' is {tuple(theirs.shape)} and must be {tuple(ours.shape)} for this original; give the one it was "
            "made from"
        )
