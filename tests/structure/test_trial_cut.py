from __future__ import annotations

from collections.abc import Callable

import pytest
import tiny
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modhifi.structure.groups import Structure
from modhifi.structure.tracing.tracer import trace
from modhifi.structure.trial_cut import FIXED, confirm


class ByHeart(nn.Module):
    """The classic beginner's net: a reshape that knows its width by heart."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 8, 3)
        self.hidden, self.head = nn.Linear(8 * 9, 10), nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.two(F.relu(self.one(x)))), 2)
        return self.head(F.relu(self.hidden(x.view(-1, 8 * 9))))


class Silent(tiny.Net):
    """Does not fail on another width, but divides by the one it knows."""

    def __init__(self) -> None:
        super().__init__(6)
        self.inner, self.conv = tiny.conv_bn(8, 8), tiny.conv_bn(8, 6)

    def body(self, x: Tensor) -> Tensor:
        x = self.inner(x)
        return self.conv(x * (2.0 if x.shape[1] == 8 else 1.0))


def both(model: nn.Module, x: Tensor) -> tuple[Structure, Structure]:
    def run(model: nn.Module) -> Tensor:
        return model(x)

    traced = trace(model, run)
    return traced, confirm(model, traced, run)


@pytest.mark.parametrize(
    "build, wrong, right",
    [(ByHeart, {"two"}, {"one", "hidden"}), (Silent, {"inner.0"}, {"stem.0", "conv.0"})],
)
def test_widths_known_by_heart_are_found(build: Callable[[], nn.Module], wrong: set[str], right: set[str]):
    torch.manual_seed(0)
    traced, confirmed = both(tiny.randomise(build()), torch.randn(2, 3, 10, 10))
    assert {g.name for g in traced.prunable} == wrong | right
    assert {g.name for g in confirmed.prunable} == right
    assert {g.name for g in confirmed.refused if g.refused == FIXED} == wrong


@pytest.mark.parametrize("name", ["grouped", "halves", "gate", "flat"])
def test_what_can_be_cut_stays_as_it_was(name: str):
    model, x = tiny.pattern(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    traced, confirmed = both(model.float(), x.float())
    assert confirmed is traced and traced.prunable
    assert all(torch.equal(value, before[key].float()) for key, value in model.state_dict().items())


def test_a_model_of_nans_is_not_blamed_on_its_code():
    model, x = tiny.pattern("plain")
    model.stem[0].weight.data.fill_(float("nan"))
    traced, confirmed = both(model, x)
    assert confirmed is traced


class UpToAPoint(tiny.Net):
    """Goes with one channel less, but not with few."""

    def __init__(self) -> None:
        super().__init__(6)
        self.inner, self.conv = tiny.conv_bn(8, 8), tiny.conv_bn(8, 6)

    def body(self, x: Tensor) -> Tensor:
        x = self.inner(x)
        return self.conv(x * (2.0 if x.shape[1] > 5 else 1.0))


def test_widths_that_go_wrong_only_in_deep_cuts_are_found():
    torch.manual_seed(0)
    traced, confirmed = both(tiny.randomise(UpToAPoint()), torch.randn(2, 3, 10, 10))
    assert {g.name for g in traced.prunable} - {g.name for g in confirmed.prunable} == {"inner.0"}
