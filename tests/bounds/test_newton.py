"""R2 around Newton's prediction: never below what was measured, never above the plain radius, exact where it can be."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from modhifi.bounds.certified import Certified, certify
from modhifi.bounds.propagation.affine import Norms
from modhifi.models.load import load_model

ACTIVATIONS = {"relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU, "leaky": lambda: nn.LeakyReLU(0.3)}


class Block(nn.Module):
    def __init__(self, width: int, activation: str, norm: str) -> None:
        super().__init__()
        self.one, self.two = (nn.Conv2d(width, width, 3, padding=1) for _ in range(2))
        self.norm: nn.Module = {"batch": nn.BatchNorm2d, "group": lambda w: nn.GroupNorm(1, w)}.get(
            norm, lambda w: nn.Identity()
        )(width)
        self.act = ACTIVATIONS[activation]()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(x + self.two(self.act(self.norm(self.one(x)))))


def network(blocks: int, activation: str, norm: str, pool: bool) -> nn.Module:
    middle = [Block(5, activation, norm) for _ in range(blocks)]
    pools = [nn.MaxPool2d(3, 2, 1)] if pool else []
    model = nn.Sequential(
        nn.Conv2d(2, 5, 3),
        ACTIVATIONS[activation](),
        *pools,
        *middle,
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(5, 3),
    )
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return model.eval()


def edited(model: nn.Module, size: float) -> nn.Module:
    other = copy.deepcopy(model)
    for parameter in other.parameters():
        parameter.data.add_(size * torch.randn_like(parameter))
    return other


def bounds(model: nn.Module, twin: nn.Module, batch: Tensor, *rounds: int) -> list[Certified]:
    loaded, norms = load_model(model, example=batch[:2].float()), Norms(whole_box=False)
    dense, twin = copy.deepcopy(model).double(), copy.deepcopy(twin).double()
    return [certify(loaded, dense, twin, batch.double(), norms, n) for n in rounds]


@settings(max_examples=10, deadline=None)
@given(
    blocks=st.integers(0, 2),
    activation=st.sampled_from(sorted(ACTIVATIONS)),
    norm=st.sampled_from(["none", "batch", "group"]),
    pool=st.booleans(),
    size=st.floats(-4, 0.3),
    seed=st.integers(0, 10**6),
)
def test_measured_stays_below_and_the_plain_radius_above(
    blocks: int, activation: str, norm: str, pool: bool, size: float, seed: int
) -> None:
    torch.manual_seed(seed)
    model = network(blocks, activation, norm, pool)
    plain, *others = bounds(model, edited(model, 10**size), torch.randn(3, 2, 8, 8), 0, 1, 2)
    for found in others:
        assert found.violations() == () and torch.equal(found.theorem, plain.theorem)
        assert bool((found.measured <= found.local * (1 + 1e-9)).all())
        assert bool((found.local <= plain.local).all() and (found.remainder <= found.local).all())


def test_the_first_round_is_the_first_order_effect() -> None:
    """What it misses falls with the square of the edit, for a smooth network."""
    torch.manual_seed(0)
    model, batch = network(1, "gelu", "group", False), torch.randn(3, 2, 8, 8)
    direction = edited(model, 1.0)
    missed = []
    for size in (1e-3, 1e-4):
        twin = copy.deepcopy(model)
        for ours, theirs in zip(twin.parameters(), direction.parameters(), strict=True):
            ours.data.lerp_(theirs.data, size)
        (found,) = bounds(model, twin, batch, 1)
        missed.append(found.remainder / found.measured)
    # In float32 an edit of 1e-4 is known to some 1e-4 of itself, hence the room.
    assert missed[1].tolist() == pytest.approx((missed[0] / 10).tolist(), rel=0.1)
    assert float(missed[1].max()) < 0.1


def test_a_network_of_relus_is_met_exactly_after_a_round_for_each() -> None:
    torch.manual_seed(1)
    model, batch = network(2, "relu", "batch", True), torch.randn(4, 2, 8, 8)
    plain, first, found = bounds(model, edited(model, 0.05), batch, 0, 1, 6)
    assert plain.violations() == first.violations() == found.violations() == ()
    assert float(plain.remainder.max()) > 1.5 * float(first.remainder.max()) > 0
    # Five ReLUs and a max pooling: after six rounds nothing is left.
    assert float(found.remainder.max()) <= 1e-9
    assert found.local.tolist() == pytest.approx(found.measured.tolist(), rel=1e-8)


def test_where_a_tangent_is_not_known_the_plain_radius_goes_on() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.two(torch.relu(self.one(x)))

    torch.manual_seed(2)
    model, batch = Odd().eval(), torch.randn(5, 4)
    twin = edited(model, 0.1)
    (plain,) = bounds(model, twin, batch, 0)
    with pytest.MonkeyPatch.context() as patch:

        def refuse(*args: object) -> None:
            raise NotImplementedError("no forward derivative")

        patch.setattr("modhifi.bounds.propagation.newton._tangent", refuse)
        (found,) = bounds(model, twin, batch, 4)
    assert found.local.tolist() == pytest.approx(plain.local.tolist(), rel=1e-6) and found.violations() == ()
    (sharp,) = bounds(model, twin, batch, 4)
    assert bool((sharp.local < 0.9 * plain.local).all())
