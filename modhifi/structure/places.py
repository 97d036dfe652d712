"""Operators by name: layers, and the matrices inside one parameter or one recurrent layer that count as such."""

from __future__ import annotations

from torch import nn

from modhifi.structure.recurrent import Gates
from modhifi.structure.stacked import TURNED, Stacked


def holder(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that has the layer or parameter of that name, and as which of its attributes."""
    owner, _, leaf = name.removesuffix(TURNED).rpartition(".")
    return model.get_submodule(owner), leaf


def operator_at(model: nn.Module, name: str) -> nn.Module:
    """The layer of that name; for a parameter the experts' matrices in it, or the matrix of a recurrent layer."""
    owner, leaf = holder(model, name)
    place: nn.Module | nn.Parameter = getattr(owner, leaf) if leaf else owner
    if not isinstance(place, nn.Parameter):
        return place
    return Gates(owner, leaf) if isinstance(owner, nn.RNNBase) else Stacked(owner, leaf, name.endswith(TURNED))
