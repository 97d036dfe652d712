"""Matrices stacked in one parameter, as a mixture of experts has them: one grouped linear map, a group for each expert.

Such an operator has the name of its parameter, with ``.T`` behind it where the matrices are stored transposed.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from modhifi.structure.groups import Group, Slice

TURNED = ".T"
ALIGNED = 16


class Stacked(nn.Module):
    """A view of E matrices ``(E, out, in)``, or ``(E, in, out)`` where ``turned``, of the module ``owner``.

    It is no part of the model and is never called; ``weight`` is the model's own parameter. Input channel c of expert e
    is number ``e * in + c`` of ``in_features``, output channels alike.
    """

    def __init__(self, owner: nn.Module, leaf: str, turned: bool) -> None:
        super().__init__()
        self.weight: nn.Parameter = getattr(owner, leaf)
        self.place, self.turned = (owner, leaf), turned  # in a tuple: no submodule
        self.experts = len(self.weight)
        self.out_features, self.in_features = (self.experts * width for width in self.matrices.shape[1:])

    @property
    def matrices(self) -> Tensor:
        """The matrices as ``(E, out, in)``."""
        return self.weight.mT if self.turned else self.weight

    def cut(self, inputs: Tensor, outputs: Tensor) -> None:
        """Keep the input and output channels that stay, bool each, as many of every expert, in place."""
        columns, rows = (stay.view(self.experts, -1) for stay in (inputs, outputs))
        parts = zip(self.matrices.data, rows, columns, strict=True)
        matrices = torch.stack([select(select(matrix, 0, row), 1, column) for matrix, row, column in parts])
        value = matrices.mT if self.turned else matrices
        owner, leaf = self.place
        setattr(owner, leaf, nn.Parameter(value.contiguous(), requires_grad=self.weight.requires_grad))


def select(value: Tensor, dim: int, stay: Tensor) -> Tensor:
    """What stays of a tensor along one axis, ``stay`` bool on the CPU; the tensor itself where all of it does."""
    return value if bool(stay.all()) else value.index_select(dim, stay.nonzero().flatten().to(value.device))


def may_be_stacked(owner: nn.Module, parameter: Tensor) -> bool:
    """Whether a parameter looks like matrices stacked for experts."""
    return parameter.ndim == 3 and min(parameter.shape) > 1 and not isinstance(owner, nn.modules.conv._ConvNd)


def holder(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that has the layer or parameter of that name, and as which of its attributes."""
    owner, _, leaf = name.removesuffix(TURNED).rpartition(".")
    return model.get_submodule(owner), leaf


def operator_at(model: nn.Module, name: str) -> nn.Module:
    """The layer of that name, or the stacked matrices of the parameter of that name."""
    owner, leaf = holder(model, name)
    place = getattr(owner, leaf) if leaf else owner
    return Stacked(owner, leaf, name.endswith(TURNED)) if isinstance(place, nn.Parameter) else place


def by_expert(model: nn.Module, group: Group) -> Group:
    """The group with a component for each expert's neuron, where it was traced with one for that of all experts.

    Every expert loses as many. Refused where a channel of stacked matrices is one of other layers as well.
    """
    operators = {s.module: operator_at(model, s.module) for s in group.slices if s.role != "along"}
    stacks = {name: operator for name, operator in operators.items() if isinstance(operator, Stacked)}
    if not stacks:
        return group
    experts = {stack.experts for stack in stacks.values()}
    tables = [s for s in group.slices if s.role == "along"]
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
