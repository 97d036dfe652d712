"""Bounds that have a value known by other means: it is met, not merely kept below."""

from __future__ import annotations

import copy
import math
from itertools import product

import pytest
import torch
from torch import Tensor, nn

from modhifi.bounds.certified import certify
from modhifi.bounds.confidence import betting_lower, betting_upper
from modhifi.bounds.propagation.affine import Norms
from modhifi.bounds.propagation.propagate import walk
from modhifi.models.load import load_model


# -- betting -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("n", "alpha"), [(1, 0.5), (3, 0.4), (5, 0.1), (8, 0.05), (8, 0.3), (10, 0.2)])
def test_betting_fails_on_no_more_than_alpha_of_all_bernoulli_sequences(n: int, alpha: float) -> None:
    sequences = torch.tensor(list(product([0.0, 1.0], repeat=n)), dtype=torch.float64)
    successes = sequences.sum(1)
    lower = torch.tensor([betting_lower(x, alpha) for x in sequences], dtype=torch.float64)
    # The mirrored sequences stand in the opposite order.
    upper = 1 - lower.flip(0)
    some = range(0, len(sequences), 1 + len(sequences) // 64)
    assert upper[list(some)].tolist() == pytest.approx([betting_upper(sequences[i], alpha) for i in some], abs=1e-12)
    for p in (0.01, 0.1, 0.3, 0.5, 0.8, 0.95):
        probability = p**successes * (1 - p) ** (n - successes)
        assert float(probability[lower > p].sum()) <= alpha
        assert float(probability[upper < p].sum()) <= alpha


@pytest.mark.parametrize(("n", "alpha"), [(4, 0.05), (6, 0.01), (5, 0.2)])
def test_betting_stakes_half_of_the_capital_where_every_unit_is_one(n: int, alpha: float) -> None:
    """Each unit then multiplies the capital by ``1 + (1 - m) / 2m``: n of them reach 1 / alpha at this mean."""
    assert betting_lower(torch.ones(n), alpha) == pytest.approx(1 / (2 * alpha ** (-1 / n) - 1), abs=1e-8)
    assert betting_upper(torch.zeros(n), alpha) == pytest.approx(1 - 1 / (2 * alpha ** (-1 / n) - 1), abs=1e-8)


def capital(values: list[float], mean: float, alpha: float) -> float:
    """The largest capital on the way, unit by unit: Waudby-Smith and Ramdas, theorem 3, half of it at stake at most."""
    wealth = largest = 1.0
    total, squares, variance = 0.5, 0.25, 0.25
    for number, value in enumerate(values, 1):
        stake = min(math.sqrt(2 * math.log(1 / alpha) / (len(values) * variance)), 0.5 / mean)
        wealth *= 1 + stake * (value - mean)
        largest = max(largest, wealth)
        total += value
        squares += (value - total / (number + 1)) ** 2
        variance = squares / (number + 1)
    return largest


@pytest.mark.parametrize("seed", range(4))
def test_the_betting_bound_is_the_mean_at_which_the_capital_reaches_one_over_alpha(seed: int) -> None:
    values = torch.rand(40, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) ** (1 + seed)
    bound = betting_lower(values, 0.05)
    assert capital(values.tolist(), bound, 0.05) == pytest.approx(20, rel=1e-6)
    assert capital(values.tolist(), bound - 1e-3, 0.05) > 20 > capital(values.tolist(), bound + 1e-3, 0.05)


# -- operators folded with the BatchNorm behind them -------------------------------------------------------------------
def normalised(first: nn.Module, second: nn.Module, norm: nn.Module) -> nn.Module:
    """Two linear operators and a BatchNorm behind the second whose factors lie far from one."""
    generator = torch.Generator().manual_seed(0)
    norm.running_var.uniform_(0.05, 4.0, generator=generator)  # type: ignore[operator, union-attr]
    norm.running_mean.normal_(0, 1, generator=generator)  # type: ignore[operator, union-attr]
    norm.weight.data.uniform_(-3, 3, generator=generator)  # type: ignore[operator, union-attr]
    norm.bias.data.normal_(0, 1, generator=generator)  # type: ignore[operator, union-attr]
    return nn.Sequential(first, second, norm).eval().double().requires_grad_(False)


def dense_net() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return normalised(nn.Linear(4, 5), nn.Linear(5, 6), nn.BatchNorm1d(6)), torch.randn(7, 4).double()


def conv_net() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    net = normalised(nn.Conv2d(2, 3, 1), nn.Conv2d(3, 4, 3, padding=1, stride=2), nn.BatchNorm2d(4))
    return net, torch.randn(7, 2, 5, 4).double()


def factors(norm: nn.Module) -> Tensor:
    return norm.weight / torch.sqrt(norm.running_var + norm.eps)  # type: ignore[operator, union-attr, arg-type]


def folded(operator: nn.Module, norm: nn.Module, shape: torch.Size) -> Tensor:
    """``diag(gamma / sqrt(var + eps)) W`` as a matrix, a column for each unit input of ``shape``."""
    units = torch.eye(math.prod(shape), dtype=torch.float64).reshape(-1, *shape)
    out = operator(units) - operator(torch.zeros_like(units))
    return (out * factors(norm).reshape(-1, *[1] * (out.ndim - 2))).flatten(1).T


def edited(model: nn.Module, *parts: int) -> nn.Module:
    """A copy with noise on the parameters of some parts."""
    twin = copy.deepcopy(model)
    for part in parts:
        for number, parameter in enumerate(twin[part].parameters()):  # type: ignore[index]
            generator = torch.Generator().manual_seed(part * 2 + number)
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(noise * 0.1 * parameter.abs().mean())
    return twin


def lengths(x: Tensor) -> Tensor:
    return x.flatten(1).norm(dim=1)


@pytest.mark.parametrize("net", [dense_net, conv_net])
@pytest.mark.parametrize("parts", [(0,), (1,), (0, 1), (2,), (0, 1, 2)])
def test_constants_and_errors_are_those_of_the_folded_matrix(net, parts: tuple[int, ...]) -> None:
    model, x = net()
    twin = edited(model, *parts)
    hidden = model[0](x)
    first = lengths(twin[0](x) - hidden)
    behind = lengths(twin[2](twin[1](hidden)) - model[2](model[1](hidden)))
    constant = float(torch.linalg.matrix_norm(folded(twin[1], twin[2], hidden.shape[1:]), 2))
    found = certify(load_model(model, example=x.float()), model, twin, x, rounds=0)
    expected = [(first, constant)] if 0 in parts else []
    expected += [(behind, 1.0)] if {1, 2} & set(parts) else []
    assert [rms for _, _, rms, _ in found.layers] == pytest.approx(
        [float(e.square().mean() ** 0.5) for e, _ in expected]
    )
    assert [c for _, _, _, c in found.layers] == pytest.approx([c for _, c in expected])
    by_sample = sum(c * e for e, c in expected)
    # R1 in theorem form on each sample, R2 around the clean activations, and R1 over the samples.
    assert found.theorem.tolist() == pytest.approx(by_sample.tolist())
    assert found.local.tolist() == pytest.approx(by_sample.tolist())
    assert found.expected == pytest.approx(sum(c * float(e.square().mean() ** 0.5) for e, c in expected))
    assert found.measured.tolist() == pytest.approx(lengths(twin(x) - model(x)).tolist())


@pytest.mark.parametrize("net", [dense_net, conv_net])
def test_the_reach_over_all_inputs_is_that_of_the_folded_difference(net) -> None:
    model, x = net()
    twin = edited(model, 1, 2)
    hidden = model[0](x).shape[1:]
    units = torch.eye(x[0].numel(), dtype=torch.float64).reshape(-1, *x.shape[1:])
    before = (model[0](units) - model[0](torch.zeros_like(units))).flatten(1).T
    was, now = (folded(m[1], m[2], hidden) for m in (model, twin))
    found = walk(model, twin, lambda batch, net: net(batch), x, Norms(), 0)
    (source,) = found.sources
    lipschitz, gap, whole = (float(torch.linalg.matrix_norm(m, 2)) for m in (before, was - now, was))
    assert source.reach == pytest.approx(lipschitz * gap)
    assert found.bound.lip == pytest.approx(lipschitz * whole)


def test_a_norm_that_nothing_linear_precedes_counts_with_its_largest_factor() -> None:
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(5)
    model = normalised(nn.Linear(4, 5), nn.ReLU(), norm)
    x = torch.randn(7, 4).double()
    twin = edited(model, 0)
    found = certify(load_model(model, example=x.float()), model, twin, x, rounds=0)
    ((_, _, _, constant),) = found.layers
    assert constant == pytest.approx(float(factors(norm).abs().max()))
    behind_relu = lengths(twin[0](x).relu() - model[0](x).relu())
    assert found.local.tolist() == pytest.approx((behind_relu * constant).tolist())
