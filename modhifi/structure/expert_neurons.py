"""Neurons of all experts of a mixture, traced together, as components of each expert."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from modhifi.structure.groups import Group, Slice
from modhifi.structure.places import holder, operator_at
from modhifi.structure.stacked import Stacked

# Rows of matrices for PyTorch's grouped product are multiples of so many bytes.
ALIGNED = 16


def by_expert(model: nn.Module, group: Group) -> Group:
    """The group with a component for each expert's neuron, where it was traced with one for that of all experts.

    Every expert loses as many. Refused where a channel of stacked matrices is one of other layers as well.
    """
    operators = {
        s.module: operator_at(model, s.module) for s in group.slices if s.role not in ("along", "rows", "argument")
    }
    stacks = {name: operator for name, operator in operators.items() if isinstance(operator, Stacked)}
    if not stacks:
        return group
    experts = {stack.experts for stack in stacks.values()}
    tables = [s for s in group.slices if s.role in ("along", "rows")]
    widths = [len(model.get_parameter(s.module)) for s in tables if _is_parameter(model, s.module)]
    if len(stacks) < len(operators) or len(widths) < len(tables) or len({*experts, *widths}) > 1:
        return replace(group, refused=group.refused or "experts and other layers share these channels")
    count = experts.pop()
    slices = []
    for piece in group.slices:
        if piece.role == "along":
            width = model.get_parameter(piece.module).shape[-1]
        else:
            stack = stacks[piece.module]
            width = (stack.in_features if piece.role == "reader" else stack.out_features) // count
        index = piece.index + width * torch.arange(count)[:, None, None]
        slices.append(Slice(piece.module, "biases" if piece.role == "along" else piece.role, index.flatten(0, 1)))
    parts = torch.zeros(group.n, dtype=torch.int64) if group.partition is None else group.partition
    partition = (parts + (int(parts.max()) + 1) * torch.arange(count)[:, None]).flatten()
    multiple = max((_multiple(stack.weight) for stack in stacks.values()), default=1)
    refused = group.refused
    if refused is None and group.n < 2 * multiple:
        refused = f"fewer than {2 * multiple} neurons of each expert, which go by {multiple}, cannot be removed"
    return replace(
        group,
        n=count * group.n,
        slices=tuple(slices),
        partition=partition,
        kind="neurons",
        refused=refused,
        experts=count,
        multiple=multiple,
    )


def _multiple(weight: Tensor) -> int:
    """Rows of matrices for PyTorch's grouped product are multiples of ``ALIGNED`` bytes; 1 where these are not."""
    multiple = max(1, ALIGNED // weight.element_size())
    return 1 if any(width % multiple for width in weight.shape[1:]) else multiple


def _is_parameter(model: nn.Module, name: str) -> bool:
    return isinstance(getattr(*holder(model, name)), nn.Parameter)
