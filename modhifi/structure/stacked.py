"""Matrices stacked in one parameter, as a mixture of experts has them: one grouped linear map, a group for each expert.

Such an operator has the name of its parameter, with ``.T`` behind it where the matrices are stored transposed.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

TURNED = ".T"


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
    places = stay.nonzero()[:, 0]
    return value if len(places) == len(stay) else value.index_select(dim, places.to(value.device))


def may_be_stacked(owner: nn.Module, parameter: Tensor) -> bool:
    """Whether a parameter looks like matrices stacked for experts."""
    return parameter.ndim == 3 and min(parameter.shape) > 1 and not isinstance(owner, nn.modules.conv._ConvNd)
