from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from modhifi.bounds.lipschitz import activation_constant, activation_slopes, input_box, minkowski, norm_constant

FUNCTIONS = {
    "relu": F.relu,
    "relu6": F.relu6,
    "hardtanh": F.hardtanh,
    "softplus": F.softplus,
    "logsigmoid": F.logsigmoid,
    "softsign": F.softsign,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "hardsigmoid": F.hardsigmoid,
    "hardswish": F.hardswish,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "mish": F.mish,
    "selu": F.selu,
    "leaky_relu": F.leaky_relu,
    "elu": F.elu,
    "celu": F.celu,
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_slopes_of_activations_hold_and_are_tight(name: str) -> None:
    x = torch.linspace(-20, 20, 400_001, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(FUNCTIONS[name](x).sum(), x)
    low, high = activation_slopes(name) or (math.nan, math.nan)
    assert low <= float(slope.min()) and float(slope.max()) <= high
    # softsign reaches its smallest slope slowly.
    assert float(slope.max()) == pytest.approx(high, abs=3e-3) and float(slope.min()) == pytest.approx(low, abs=3e-3)


def test_parametric_and_unknown_activations() -> None:
    assert activation_slopes("leaky_relu", 0.2) == (0.2, 1.0)
    assert activation_slopes("prelu", [-2.0, 0.5]) == (-2.0, 1.0)
    assert activation_slopes("elu", 3.0) == (0.0, 3.0)
    assert activation_constant("prelu", [-2.0, 0.5]) == 2.0
    assert activation_constant("gelu") == 1.128905
    assert activation_slopes("square") is None
    assert activation_constant("square") is None


def test_norms() -> None:
    gamma = torch.tensor([1.0, -3.0])
    assert norm_constant(gamma, 1e-4) == pytest.approx(300)
    assert norm_constant(None, 0.0) == math.inf


def test_errors_on_samples_add_up_by_minkowski() -> None:
    errors = [torch.tensor([1.0, 0.0]), torch.tensor([4.0, 4.0])]
    assert minkowski([2.0, 1.0], errors) == pytest.approx(2 * math.sqrt(0.5) + 2)


def test_input_box_holds_every_image() -> None:
    mean, std = torch.tensor([0.4, 0.5]), torch.tensor([0.2, 0.5])
    centre, radius = input_box(mean, std, (3, 4))
    pixels = torch.randint(0, 2, (500, 2, 3, 4), generator=torch.Generator().manual_seed(0)).double()
    images = (pixels - mean.reshape(2, 1, 1)) / std.reshape(2, 1, 1)
    distance = (images - centre).flatten(1).norm(dim=1)
    assert float(distance.max()) <= radius and float(distance.min()) == pytest.approx(radius)
