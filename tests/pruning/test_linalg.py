from __future__ import annotations

import pytest
import torch
from torch import Tensor

from modhifi.errors import IndefiniteError
from modhifi.pruning.linalg import GROWTHS, damped_inverse, factorise


def positive(d: int) -> Tensor:
    x = torch.randn(2 * d, d, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return x.T @ x / len(x)


@pytest.mark.parametrize("unit", [None, 3.0])
def test_the_factor_is_that_of_the_damped_matrix(unit: float | None) -> None:
    second = positive(7)
    factor, used = factorise(second, 0.1, unit)
    scale = second.trace() / 7 if unit is None else unit
    assert used == 0.1
    torch.testing.assert_close(factor @ factor.T, second + 0.1 * scale * torch.eye(7).double())


@pytest.mark.parametrize("d", [5, 256, 257, 1100])
def test_the_inverse_by_halves_is_the_inverse(d: int) -> None:
    second = positive(d)
    damped = second + 1e-2 * second.trace() / d * torch.eye(d).double()
    torch.testing.assert_close(damped_inverse(second[None], 1e-2)[0], torch.linalg.inv(damped), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("growth", range(GROWTHS + 1))
def test_the_ridge_grows_until_there_is_a_factor(growth: int) -> None:
    second = torch.diag(torch.tensor([1.0, -0.5e-4 * 10.0**growth])).double()
    factor, used = factorise(second, 1e-4, 1.0)
    assert used == pytest.approx(1e-4 * 10**growth) and bool(factor.isfinite().all())
    assert bool(damped_inverse(second[None], 1e-3).isfinite().all())


def test_a_matrix_that_no_ridge_mends_is_an_error() -> None:
    for broken in (-torch.eye(3).double(), torch.full((3, 3), float("nan")).double()):
        for decompose, matrix in ((factorise, broken), (damped_inverse, broken[None])):
            with pytest.raises(IndefiniteError, match="use more calibration samples"):
                decompose(matrix, 1e-4)


def test_a_matrix_without_energy_is_damped_by_the_ridge_itself() -> None:
    assert torch.equal(damped_inverse(torch.zeros(1, 2, 2).double(), 0.25), 4 * torch.eye(2).double()[None])
