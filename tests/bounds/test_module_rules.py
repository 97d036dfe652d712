"""Activations that sort or reflect channels: 1-Lipschitz on the ladder, if they do what their name says."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from modhifi.bounds.certified import Certified, certify
from modhifi.models.load import load_model


class MaxMin(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        one, two = x.chunk(2, 1)
        return torch.cat([torch.maximum(one, two), torch.minimum(one, two)], 1)


class GroupSort(nn.Module):
    def __init__(self, group_size: int = 2, factor: float = 1.0) -> None:
        super().__init__()
        self.group_size, self.factor = group_size, factor

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * x.unflatten(1, (-1, self.group_size)).sort(2).values.flatten(1, 2)


class HouseHolder(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.linspace(0.3, 2.0, channels // 2))

    def forward(self, x: Tensor) -> Tensor:
        one, two = x.chunk(2, 1)
        angle = self.theta.view(-1, *[1] * (x.ndim - 2))
        above = one * torch.sin(angle / 2) - two * torch.cos(angle / 2) > 0
        first = torch.where(above, one, one * torch.cos(angle) + two * torch.sin(angle))
        return torch.cat([first, torch.where(above, two, one * torch.sin(angle) - two * torch.cos(angle))], 1)


def edited(activation: nn.Module, *names: str) -> Certified:
    """A net around the activation, with changed parameters in front of it, and in those named."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), activation, nn.Flatten(), nn.Linear(8 * 36, 6)).eval()
    twin = copy.deepcopy(model)
    for name in ("0.weight", *names):
        parameter = twin.get_parameter(name)
        parameter.data.add_(0.01 * torch.randn_like(parameter))
    batch = torch.randn(4, 3, 6, 6, dtype=torch.float64)
    loaded = load_model(model, example=batch.float())
    return certify(loaded, copy.deepcopy(model).double(), twin.double(), batch)


@pytest.mark.parametrize("activation", [MaxMin(), GroupSort(), GroupSort(4), GroupSort(8), HouseHolder(8)])
def test_distances_are_kept(activation: nn.Module) -> None:
    found = edited(activation)
    assert found.violations() == () and bool(found.theorem.isfinite().all()) and bool(found.local.isfinite().all())
    # One layer, its error, the constant of the head: the activation adds nothing.
    plain = edited(nn.Identity())
    assert found.expected == pytest.approx(plain.expected, rel=1e-6)


@pytest.mark.parametrize(("activation", "names"), [(GroupSort(factor=1.5), ()), (HouseHolder(8), ("1.theta",))])
def test_a_name_is_not_believed(activation: nn.Module, names: tuple[str, ...]) -> None:
    found = edited(activation, *names)
    assert found.violations() == () and type(activation).__name__ in found.missing["R1"]
