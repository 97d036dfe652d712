from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from modhifi.bounds import (
    adaptive_avg_pool_norm,
    avg_pool_norm,
    conv_norm,
    gram_norm,
    max_pool_constant,
    spectral_norm,
    spectral_norms,
)
from modhifi.errors import ModhifiError
from modhifi.lipschitz import (
    activation_constant,
    activation_slopes,
    batchnorm_constant,
    concatenation,
    fold_batchnorm,
    input_box,
    minkowski,
    norm_constant,
    residual,
)
from modhifi.two_layer import balanced, certified, two_layer_bound


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


def test_patches_that_do_not_overlap_have_the_norm_of_their_matrix() -> None:
    weight = random_weight(np.random.default_rng(2), 6, 3, 4, 4)
    assert conv_norm(weight, (32, 32), stride=4) == pytest.approx(svd(weight.flatten(1)))


@pytest.mark.parametrize("mode", ["circular", "reflect", "replicate"])
def test_other_padding_modes_cost_a_factor_and_stay_sound(mode: str) -> None:
    weight = random_weight(np.random.default_rng(3), 2, 2, 5, 5)
    truth = svd(dense((6, 6), 2, lambda x: F.conv2d(F.pad(x, (2, 2, 2, 2), mode=mode), weight)))
    assert conv_norm(weight, (6, 6), padding=2, padding_mode=mode) >= truth


def test_asymmetric_padding_is_covered() -> None:
    weight = random_weight(np.random.default_rng(4), 2, 1, 3, 3)
    truth = svd(dense((6, 6), 1, lambda x: F.conv2d(F.pad(x, (0, 1, 0, 1)), weight, stride=2)))
    assert conv_norm(weight, (6, 6), stride=2, padding=[(0, 1), (0, 1)]) >= truth


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


def test_spectral_norms_of_a_batch() -> None:
    batch = random_weight(np.random.default_rng(5), 3, 4, 6)
    assert spectral_norms(batch).tolist() == pytest.approx([svd(one) for one in batch])
    assert spectral_norms(torch.zeros(2, 0, 4)).tolist() == [0, 0]


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
    assert activation_slopes("max_min") is None
    assert activation_constant("square") is None


def max_min(x: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat([torch.maximum(first, second), torch.minimum(first, second)], -1)


def group_sort(x: Tensor) -> Tensor:
    return x.unflatten(-1, (-1, 3)).sort(-1).values.flatten(-2)


def householder(x: Tensor) -> Tensor:
    axis = torch.tensor([0.6, -0.8], dtype=x.dtype)
    pairs = x.unflatten(-1, (-1, 2))
    along = pairs @ axis
    return torch.where(along[..., None] > 0, pairs, pairs - 2 * along[..., None] * axis).flatten(-2)


@pytest.mark.parametrize("activation", [max_min, group_sort, householder])
def test_activations_that_keep_distances(activation) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(10_000, 6, generator=generator, dtype=torch.float64)
    step = torch.randn(10_000, 6, generator=generator, dtype=torch.float64)
    y = x + step * torch.rand(10_000, 1, generator=generator)
    ratio = (activation(x) - activation(y)).norm(dim=1) / (x - y).norm(dim=1)
    constant = activation_constant(activation.__name__)
    assert constant == 1.0 and float(ratio.max()) <= constant + 1e-12
    assert float(ratio.max()) > 0.999


def test_norms_and_batchnorm() -> None:
    gamma, variance = torch.tensor([1.0, -3.0]), torch.tensor([4.0, 1.0])
    assert norm_constant(gamma, 1e-4) == pytest.approx(300)
    assert norm_constant(None, 0.0) == math.inf
    assert batchnorm_constant(gamma, variance, 0.0) == pytest.approx(3)
    conv, norm = torch.nn.Conv2d(3, 2, 3, bias=False), torch.nn.BatchNorm2d(2).eval()
    norm.running_var = variance
    with torch.no_grad():
        norm.weight.copy_(gamma)
        x = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        folded = F.conv2d(x.double(), fold_batchnorm(conv.weight, norm.weight, norm.running_var, norm.eps))
        assert torch.allclose(norm(conv(x)).double(), folded, atol=1e-5)


def test_compositions() -> None:
    assert residual(1.0, 2.5) == pytest.approx(3.5)
    assert concatenation(3.0, 4.0) == pytest.approx(5.0)
    errors = [torch.tensor([1.0, 0.0]), torch.tensor([4.0, 4.0])]
    assert minkowski([2.0, 1.0], errors) == pytest.approx(2 * math.sqrt(0.5) + 2)


def test_input_box_holds_every_image() -> None:
    mean, std = torch.tensor([0.4, 0.5]), torch.tensor([0.2, 0.5])
    centre, radius = input_box(mean, std, (3, 4))
    pixels = torch.randint(0, 2, (500, 2, 3, 4), generator=torch.Generator().manual_seed(0)).double()
    images = (pixels - mean.reshape(2, 1, 1)) / std.reshape(2, 1, 1)
    distance = (images - centre).flatten(1).norm(dim=1)
    assert float(distance.max()) <= radius and float(distance.min()) == pytest.approx(radius)


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
