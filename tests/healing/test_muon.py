"""Muon, against a singular value decomposition: what a step's direction is, how large it is, what is read as what."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from modhifi.healing.muon import COEFFICIENTS, ITERATIONS, LEAST, MOMENTUM, Muon, orthogonalised

RATE = 0.01


def expected(matrix: Tensor) -> Tensor:
    """The matrix with the iteration's polynomial taken of its singular values alone."""
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    values = values / values.norm()
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS if len(values) > 1 else 0):
        values = a * values + b * values**3 + c * values**5
    return left @ values.diag() @ right


def stepped(model: nn.Module, gradient: Tensor) -> Tensor:
    """What a first step along a gradient adds to the model's only parameter."""
    (parameter,) = model.parameters()
    before = parameter.detach().clone()
    parameter.grad = gradient.clone()
    Muon(model, RATE).step()
    return (parameter - before).detach()


def along(before: Tensor, direction: Tensor) -> Tensor:
    """The step of a size relative to the weights in a direction."""
    return -RATE * before.norm() * direction / direction.norm()


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (6, 6), (1, 7), (7, 1)])
def test_matrices_are_orthogonalised(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    matrices = torch.randn(3, *shape, dtype=torch.float64)
    found = orthogonalised(matrices, torch.float64)
    assert torch.allclose(found, torch.stack([expected(matrix) for matrix in matrices]), atol=1e-10)
    if min(shape) > 1:
        assert ((torch.linalg.svdvals(found) - 1).abs() < 0.4).all()  # as far as the coefficients go
    assert not orthogonalised(torch.zeros(2, *shape), torch.float32).any()


@pytest.mark.parametrize("module", [nn.Linear(4, 6, bias=False), nn.Conv2d(3, 5, 3, bias=False)])
def test_a_step_is_as_large_as_its_weights_say(module: nn.Module) -> None:
    torch.manual_seed(1)
    before = next(module.parameters()).detach().clone()
    gradient = torch.randn_like(before)
    step = stepped(module, gradient)
    assert torch.allclose(step, along(before, expected(gradient.flatten(1)).view_as(before)), atol=1e-6)
    assert float(step.norm() / before.norm()) == pytest.approx(RATE, rel=1e-4)


def test_vectors_go_along_their_gradient() -> None:
    torch.manual_seed(2)
    module = nn.LayerNorm(6, bias=False)
    before, gradient = module.weight.detach().clone(), torch.randn(6)
    assert torch.allclose(stepped(module, gradient), along(before, gradient), atol=1e-6)


def test_a_stack_of_matrices_is_so_many_matrices() -> None:
    torch.manual_seed(3)
    module = nn.Module()
    module.experts = nn.Parameter(torch.randn(2, 4, 6))
    before, gradient = module.experts.detach().clone(), torch.randn(2, 4, 6)
    direction = torch.stack([expected(matrix) for matrix in gradient])
    assert torch.allclose(stepped(module, gradient), along(before, direction), atol=1e-6)


def test_weights_of_zero_move() -> None:
    model = nn.Linear(1, 8)
    model.weight.requires_grad_(False)
    model.bias.data.zero_()
    model.bias.grad = torch.ones(8)
    Muon(model, RATE).step()
    assert torch.allclose(model.bias, torch.full((8,), -RATE * LEAST))


def test_numbers_go_by_their_sign() -> None:
    module = nn.Module()
    module.scales = nn.ParameterList(torch.tensor(value) for value in (2.0, 4.0))
    for scale, gradient in zip(module.scales, (3.0, -1.0), strict=True):
        scale.grad = torch.tensor(gradient)
    Muon(module, RATE).step()
    assert [float(scale.detach()) for scale in module.scales] == pytest.approx([2 * (1 - RATE), 4 * (1 + RATE)])


def test_momentum_is_nesterovs() -> None:
    torch.manual_seed(4)
    model = nn.LayerNorm(6, bias=False)
    optimizer, momentum = Muon(model, RATE), torch.zeros(6)
    for _ in range(3):
        before, gradient = model.weight.detach().clone(), torch.randn(6)
        model.weight.grad = gradient
        optimizer.step()
        momentum = MOMENTUM * momentum + gradient
        assert torch.allclose(model.weight - before, along(before, gradient + MOMENTUM * momentum), atol=1e-6)


def test_a_step_runs_one_iteration_for_every_shape() -> None:
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(5)), nn.Linear(8, 3))
    model(torch.randn(4, 8)).sum().backward()
    with torch.profiler.profile() as profile:
        Muon(model, RATE).step()
    counts = {event.key: event.count for event in profile.key_averages()}
    assert counts["aten::baddbmm"] == 2 * 2 * ITERATIONS
