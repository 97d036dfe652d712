"""Bounds that have a value known by other means: it is met, not merely kept below."""

from __future__ import annotations

import copy
import math
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modhifi.bounds.certified import certify
from modhifi.bounds.confidence import betting_lower, betting_upper, settling_n_mean
from modhifi.bounds.lipschitz import activation_slopes, input_box, minkowski
from modhifi.bounds.local_lipschitz import attention_rule, max_pool_rule, norm_rule, scores_rule
from modhifi.bounds.operator_norms import conv_norm
from modhifi.bounds.propagation.affine import Norms
from modhifi.bounds.propagation.propagate import walk
from modhifi.errors import ModhifiError
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


# -- convolutions on a torus -------------------------------------------------------------------------------------------
def on_a_torus(weight: Tensor, size: int, stride: int, padding: int, dilation: int) -> Tensor:
    """The circular operator of one axis as a matrix, on the shortest torus that keeps the padding beside the input."""
    kernel = weight.shape[2]
    outputs = (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
    reached = {o * stride - padding + t * dilation for o in range(outputs) for t in range(kernel)}
    length = stride * max(outputs, -(-size // stride))
    while any(place % length < size for place in reached if not 0 <= place < size):
        length += stride
    matrix = torch.zeros(weight.shape[0], length // stride, weight.shape[1], length, dtype=torch.float64)
    for output in range(length // stride):
        for tap in range(kernel):
            matrix[:, output, :, (output * stride - padding + tap * dilation) % length] += weight[:, :, tap]
    return matrix.flatten(2).flatten(0, 1)


@pytest.mark.parametrize(
    ("size", "kernel", "stride", "padding", "dilation"),
    [
        (7, 3, 1, 1, 1),
        (7, 3, 2, 1, 1),
        (8, 3, 2, 1, 1),
        (9, 5, 3, 2, 1),
        (9, 2, 3, 0, 1),
        (6, 5, 1, 4, 1),
        (10, 3, 2, 2, 2),
    ],
)
def test_the_norm_of_a_convolution_is_that_of_its_circular_operator(
    size: int, kernel: int, stride: int, padding: int, dilation: int
) -> None:
    weight = torch.randn(3, 2, kernel, generator=torch.Generator().manual_seed(size), dtype=torch.float64)
    norm = float(torch.linalg.matrix_norm(on_a_torus(weight, size, stride, padding, dilation), 2))
    bound = conv_norm(weight, [size], stride=stride, padding=padding, dilation=dilation)
    assert norm <= bound == pytest.approx(norm, rel=1e-9)


def test_paddings_by_name_are_those_by_number() -> None:
    weight = torch.randn(3, 2, 5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert conv_norm(weight, (7, 6), padding="same") == conv_norm(weight, (7, 6), padding=(2, 1))
    assert conv_norm(weight, (7, 6), padding="valid") == conv_norm(weight, (7, 6))
    # An even kernel gets the odd zero on the right, as torch has it.
    even = weight[:, :, :4, :1]
    matrix = torch.zeros(3, 8, 2, 8, dtype=torch.float64)
    for output, tap in product(range(8), range(4)):
        matrix[:, output, :, (output - 1 + tap) % 8] += even[:, :, tap, 0]
    norm = float(torch.linalg.matrix_norm(matrix.flatten(2).flatten(0, 1), 2))
    assert conv_norm(even, (6, 5), padding="same") == pytest.approx(norm)


# -- local rules against their formulas (docs/method.md, R2) -----------------------------------------------------------
@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("eps", [1e-6, 0.5])
def test_the_rule_of_norms_is_its_formula(centred: bool, eps: float) -> None:
    generator = torch.Generator().manual_seed(0)
    z, gamma = 2 * torch.randn(6, 5, generator=generator).double(), torch.tensor([0.5, -2.0, 1.0, 0.1, 1.5])
    for row, radius in zip(z, (0.0, 0.01, 0.3, 1.0, 4.0, 100.0), strict=True):
        values = row - row.mean() if centred else row
        s = float((values.square().mean() + eps).sqrt())
        moved = 2 * radius / (s + max(math.sqrt(eps), s - radius / math.sqrt(5)))
        expected = 2.0 * min(2 * math.sqrt(5), moved)
        found = norm_rule(row[None], torch.tensor([radius]), gamma, eps, centred=centred)
        assert found.tolist() == pytest.approx([expected], rel=1e-6)


@pytest.mark.parametrize("masked", [False, True])
def test_the_rules_of_attention_are_their_formulas(masked: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(4, 3, generator=generator).double() for _ in range(3))
    rq, rk, rv = (0.4 * torch.rand(4, generator=generator).double() for _ in range(3))
    allowed = torch.ones(4, 4).tril().bool() if masked else torch.ones(4, 4).bool()
    scores, scale = q @ k.T * 0.7, 0.7
    whole = [t[None, None] for t in (q, k, v, rq, rk, rv, scores)]
    moves = scores_rule(whole[0], whole[1], whole[3], whole[4], scale, allowed)[0, 0]
    radii = attention_rule(whole[6], whole[2], moves[None, None], whole[5], allowed)[0, 0]
    for i in range(4):
        keys = [j for j in range(4) if allowed[i, j]]
        most = max(float(q[i].norm() * rk[j] + rq[i] * (k[j].norm() + rk[j])) for j in keys) * scale
        assert float(moves[i]) == pytest.approx(most)
        p = torch.softmax(scores[i, keys], 0)
        output = p @ v[keys]
        far = [float((v[j] - output).norm()) for j in keys]
        own = [float(rv[j]) for j in keys]
        turn = math.tanh(most / 2)
        mean = sum(float(w) * r for w, r in zip(p, own, strict=True))
        weighted = math.expm1(2 * most) * sum(float(w) * d for w, d in zip(p, far, strict=True))
        values = min(max(own), mean + turn * (max(own) - min(own)))
        assert float(radii[i]) == pytest.approx(values + min(2 * turn * max(far), weighted))


def test_one_key_alone_moves_with_its_value_whatever_its_score() -> None:
    radius = attention_rule(
        torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1, 2), torch.full((1, 1, 1), 1e9), torch.full((1, 1, 1), 0.3)
    )
    assert radius.item() == pytest.approx(0.3)


@pytest.mark.parametrize(("kernel", "stride", "padding"), [((2, 3), (1, 2), (1, 0)), (3, 2, 1), (2, None, 0)])
def test_max_pooling_counts_the_windows_of_its_busiest_candidate(kernel, stride, padding) -> None:
    z = torch.randn(4, 2, 5, 8, generator=torch.Generator().manual_seed(2)).double()
    radius = torch.tensor([0.01, 0.2, 0.7, 3.0], dtype=torch.float64)
    (kh, kw), (ph, pw) = ((n, n) if isinstance(n, int) else n for n in (kernel, padding))
    sh, sw = (kh, kw) if stride is None else (stride, stride) if isinstance(stride, int) else stride
    padded = F.pad(z, (pw, pw, ph, ph), value=-math.inf)
    rows, columns = range(0, padded.shape[2] - kh + 1, sh), range(0, padded.shape[3] - kw + 1, sw)
    for sample, r in enumerate(radius.tolist()):
        counts = torch.zeros(padded.shape[1:])
        for channel, top, left in product(range(2), rows, columns):
            window = padded[sample, channel, top : top + kh, left : left + kw]
            counts[channel, top : top + kh, left : left + kw] += window >= window.max() - math.sqrt(2) * r
        found = max_pool_rule(z[sample : sample + 1], radius[sample : sample + 1], kernel, stride, padding)
        assert found.item() == pytest.approx(r * math.sqrt(float(counts.max())))


# -- ends of ranges ----------------------------------------------------------------------------------------------------
def test_slopes_where_the_parameter_decides() -> None:
    assert activation_slopes("celu", 2.0) == activation_slopes("celu") == (0.0, 1.0)
    assert activation_slopes("celu", [2.0, -1.0]) is None and activation_slopes("celu", 0.0) is None
    assert activation_slopes("leaky_relu") == (0.01, 1.0) and activation_slopes("elu") == (0.0, 1.0)
    assert activation_slopes("prelu", [math.inf]) is None and activation_slopes("leaky_relu", math.nan) is None
    assert activation_slopes("prelu", [math.inf, -math.inf]) is None


def test_every_deviation_of_the_input_must_be_positive() -> None:
    with pytest.raises(ModhifiError, match="deviation"):
        input_box(torch.zeros(2), torch.tensor([1.0, 0.0]), (2, 2))


def test_sums_are_rounded_up() -> None:
    assert 3.0 < minkowski([2.0, 1.0], [torch.ones(3), torch.ones(3)]) < 3.0 + 1e-9
    assert conv_norm(torch.ones(1, 1, 1, 1), (3, 3)) >= 1.0


def test_two_units_have_a_variance_and_one_has_none() -> None:
    log = math.log(2 / 0.05)
    for values, variance in ((torch.tensor([0.2, 0.6]), 0.08), (torch.tensor([0.4]), 0.25)):
        enough = (n for n in range(2, 10_000) if math.sqrt(2 * variance * log / n) + 7 * log / (3 * (n - 1)) <= 0.1)
        assert settling_n_mean(values, 0.5, 0.05) == next(enough)
