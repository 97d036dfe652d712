from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from modhifi.bounds.lipschitz import activation_slopes
from modhifi.bounds.operator_norms import conv_norm, spectral_norm, spectral_norms
from modhifi.bounds.two_layer import balanced, certified, two_layer_bound
from modhifi.errors import ModhifiError


def random_weight(rng: np.random.Generator, *shape: int) -> Tensor:
    return torch.from_numpy(rng.standard_normal(shape))


def test_absolute_value_from_two_relus() -> None:
    first, second = torch.tensor([[1.0], [-1.0]]), torch.tensor([[1.0, 1.0]])
    assert spectral_norm(first) * spectral_norm(second) == pytest.approx(2)
    assert 1 <= two_layer_bound(first, second) < 1.001
    assert 1 <= certified(first, second, torch.full((2,), 1.0002)) < 1.001
    assert certified(first, second, torch.full((2,), 0.999)) == math.inf


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 5), st.integers(1, 8), st.integers(1, 5), st.integers(0, 10**6))
def test_two_layer_bound_lies_between_truth_and_naive(into: int, hidden: int, out: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    first, second = random_weight(rng, hidden, into), random_weight(rng, out, hidden) * random_weight(rng, hidden)
    if hidden > 2:
        first[0] = 0
        second[:, 1] = 0
    naive = spectral_norm(first) * spectral_norm(second)
    # Every diagonal of slopes in [0, 1] is a lower bound of what the block may do; the extremes are the worst.
    patterns = torch.from_numpy(rng.integers(0, 2, (64, hidden))).double()
    truth = float(spectral_norms(second @ (patterns[:, :, None] * first)).max())
    bound = two_layer_bound(first, second)
    assert truth <= bound * (1 + 1e-10) and bound <= naive * (1 + 1e-9)
    low, high = activation_slopes("gelu") or (0, 0)
    truth = float(spectral_norms(second @ ((low + (high - low) * patterns)[:, :, None] * first)).max())
    assert truth <= two_layer_bound(first, second, (low, high)) * (1 + 1e-10)
    one, two = balanced(first, second)
    assert truth <= high * spectral_norm(one) * spectral_norm(two) * (1 + 1e-10)


def test_the_certificate_tightens_a_wide_block() -> None:
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(64, 16, generator=generator)
    second = torch.randn(16, 64, generator=generator) * torch.rand(64, generator=generator) ** 2
    assert two_layer_bound(first, second) < 0.8 * spectral_norm(first) * spectral_norm(second)


def test_balancing_convolutions_keeps_the_product_of_channels() -> None:
    rng = np.random.default_rng(6)
    first, second = random_weight(rng, 4, 3, 3, 3), random_weight(rng, 5, 4, 3, 3)
    first[0] *= 100
    second[:, 0] /= 100
    one, two = balanced(first, second)
    assert torch.allclose(torch.einsum("ohab,hiab->oi", two, one), torch.einsum("ohab,hiab->oi", second, first))
    before = conv_norm(first, (8, 8), padding=1) * conv_norm(second, (8, 8), padding=1)
    assert conv_norm(one, (8, 8), padding=1) * conv_norm(two, (8, 8), padding=1) < before / 5
    with pytest.raises(ModhifiError, match="cannot feed"):
        balanced(first, random_weight(rng, 5, 3))
