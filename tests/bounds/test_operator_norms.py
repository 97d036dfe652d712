from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from modhifi.bounds.operator_norms import (
    adaptive_avg_pool_norm,
    avg_pool_norm,
    conv_norm,
    gram_norm,
    max_pool_constant,
    spectral_norm,
)
from modhifi.bounds.propagation.affine import operator_norm
from modhifi.errors import ModhifiError


def dense(size: tuple[int, ...], channels: int, operator) -> Tensor:
    """The matrix of a linear operator on (channels, *size), column by column."""
    units = torch.eye(channels * math.prod(size), dtype=torch.float64).reshape(-1, channels, *size)
    return operator(units).flatten(1).T


def svd(matrix: Tensor) -> float:
    return float(np.linalg.norm(matrix.numpy(), 2))


def random_weight(rng: np.random.Generator, *shape: int) -> Tensor:
    return torch.from_numpy(rng.standard_normal(shape))


def test_reference_where_the_circular_transform_is_no_bound() -> None:
    weight = torch.from_numpy(np.random.default_rng(1651).standard_normal((1, 1, 3, 3)))
    truth = svd(dense((4, 4), 1, lambda x: F.conv2d(x, weight, padding=1)))
    circular = svd(dense((4, 4), 1, lambda x: F.conv2d(F.pad(x, (1, 1, 1, 1), mode="circular"), weight)))
    assert truth == pytest.approx(3.65403, abs=5e-6)
    assert circular == pytest.approx(3.47444, abs=5e-6)
    assert conv_norm(weight, (4, 4), padding=1) == pytest.approx(4.25388, abs=5e-6)


def test_conv_norm_bounds_the_dense_matrix_on_random_shapes() -> None:
    rng = np.random.default_rng(0)
    tried = 0
    while tried < 240:
        axes = int(rng.choice([1, 2, 2, 2]))
        groups = int(rng.choice([1, 1, 2, 3]))
        size, kernel, stride, dilation, pad = (
            tuple(int(v) for v in rng.integers(low, high, axes))
            for low, high in ((1, 9), (1, 5), (1, 4), (1, 3), (0, 4))
        )
        if any(n + 2 * p < d * (k - 1) + 1 for n, k, d, p in zip(size, kernel, dilation, pad, strict=True)):
            continue
        tried += 1
        into, out = groups * int(rng.integers(1, 3)), groups * int(rng.integers(1, 3))
        weight = random_weight(rng, out, into // groups, *kernel)
        options = {"stride": stride, "padding": pad, "dilation": dilation, "groups": groups}
        conv = F.conv1d if axes == 1 else F.conv2d
        truth = svd(dense(size, into, lambda x, w=weight, o=options, c=conv: c(x, w, **o)))
        assert conv_norm(weight, size, **options) >= truth, (size, weight.shape, options)


def test_conv_norm_is_close_for_same_padding_at_14_pixels() -> None:
    rng = np.random.default_rng(1)
    for _ in range(12):
        kernel, n, groups = int(rng.choice([3, 5])), int(rng.integers(14, 17)), int(rng.choice([1, 2]))
        weight = random_weight(rng, 2, 2 // groups, kernel, kernel)
        truth = svd(dense((n, n), 2, lambda x, w=weight, g=groups: F.conv2d(x, w, padding="same", groups=g)))
        bound = conv_norm(weight, (n, n), padding="same", groups=groups)
        assert truth <= bound <= 1.5 * truth


def test_conv_norm_finds_the_maximum_among_many_frequencies_and_channels() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(24, 20, 3, 3, generator=generator, dtype=torch.float64)
    n = 9
    spectrum = torch.fft.fft2(weight, s=(n + 1, n + 1)).permute(2, 3, 0, 1)
    assert conv_norm(weight, (n, n), padding=1) == pytest.approx(float(torch.linalg.matrix_norm(spectrum, 2).max()))


@pytest.mark.parametrize(("size", "stride", "padding"), [((2, 2), 1, 1), ((5, 3), 2, 1), ((4, 4), 1, "same")])
def test_the_ladder_writes_small_convolutions_out(size: tuple[int, int], stride: int, padding: int | str) -> None:
    weight = random_weight(np.random.default_rng(6), 7, 5, 3, 3)
    weight[2] = 0
    truth = svd(dense(size, 5, lambda x: F.conv2d(x, weight, stride=stride, padding=padding)))
    options = {"size": size, "stride": stride, "padding": padding, "dilation": 1, "groups": 1}
    assert truth <= operator_norm("conv", weight, options) <= truth * (1 + 1e-9)
    assert conv_norm(weight, size, stride=stride, padding=padding) > truth * (1 + 1e-3)


def test_patches_that_do_not_overlap_have_the_norm_of_their_matrix() -> None:
    weight = random_weight(np.random.default_rng(2), 6, 3, 4, 4)
    assert conv_norm(weight, (32, 32), stride=4) == pytest.approx(svd(weight.flatten(1)))


def test_conv_norm_refuses_what_has_no_bound() -> None:
    with pytest.raises(ModhifiError, match="NaN"):
        conv_norm(torch.full((1, 1, 3, 3), math.nan), (8, 8))
    with pytest.raises(ModhifiError, match="does not fit"):
        conv_norm(torch.ones(1, 1, 3, 3), (2, 2))
    with pytest.raises(ModhifiError, match="unknown"):
        conv_norm(torch.ones(1, 1, 3, 3), (8, 8), padding="full")
    assert conv_norm(torch.zeros(2, 2, 3, 3), (8, 8), padding=1) == 0


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 10**6), st.sampled_from([1e-30, 1.0, 1e30]))
def test_spectral_and_gram_norms(rows: int, columns: int, seed: int, scale: float) -> None:
    matrix = random_weight(np.random.default_rng(seed), rows, columns) * scale
    truth = svd(matrix)
    assert truth * (1 - 1e-15) <= spectral_norm(matrix) <= truth * (1 + 1e-10)
    side = min(rows, columns)
    for iterations in (1, 4, 8):
        bound = gram_norm(matrix, iterations)
        assert truth * (1 - 1e-15) <= bound <= truth * side ** (1 / 2 ** (iterations + 1)) * (1 + 1e-10)


def test_pooling() -> None:
    assert max_pool_constant(3, 2) == 2
    assert max_pool_constant(2) == 1
    assert max_pool_constant((3,), (1,)) == pytest.approx(math.sqrt(3))
    assert adaptive_avg_pool_norm((7, 5)) == pytest.approx(1 / math.sqrt(35))
    for options in ({"padding": 1}, {"padding": 1, "count_include_pad": False}, {"ceil_mode": True}):
        truth = svd(dense((7, 6), 1, lambda x, o=options: F.avg_pool2d(x, 3, 2, **o)))
        assert avg_pool_norm((7, 6), 3, 2, **options) == pytest.approx(truth)
        assert avg_pool_norm((7, 6), 3, 2, **options) >= truth * (1 - 1e-14)
    truth = svd(dense((7, 5), 1, lambda x: F.adaptive_avg_pool2d(x, (3, 2))))
    assert adaptive_avg_pool_norm((7, 5), (3, 2)) == pytest.approx(truth)
