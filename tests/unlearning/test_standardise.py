from __future__ import annotations

import pytest
import torch

from modhifi.unlearning.standardise import standardise


@pytest.mark.parametrize("size", [1e-12, 1.0, 1e6])
def test_features_count_in_deviations_of_the_fitted_set_and_constant_ones_not_at_all(size: float) -> None:
    generator = torch.Generator().manual_seed(0)
    fit, test = (size * torch.randn(n, 3, generator=generator) for n in (20, 5))
    fit[:, 1] = size / 10
    found = standardise(fit, test)
    fit, test = fit.double(), test.double()
    mean = fit.sum(0) / 20
    deviation = ((fit - mean).square().sum(0) / 19).sqrt()
    for one, rows in zip(found, (fit, test), strict=True):
        expected = (rows - mean) / deviation
        expected[:, 1] = 0
        torch.testing.assert_close(one, expected)


def test_a_set_without_any_spread_becomes_zero() -> None:
    fit, test = standardise(torch.full((4, 2), 3.0), torch.randn(5, 2))
    assert not fit.any() and not test.any()
