from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from modhifi.bounds.confidence import (
    betting_lower,
    betting_upper,
    binomial_cdf,
    clopper_pearson_lower,
    clopper_pearson_upper,
    divided_alpha,
    quantile_lower,
    quantile_rank,
    quantile_upper,
    settling_n_mean,
    settling_n_rate,
)
from modhifi.errors import ModhifiError


def exact_cdf(k: int, n: int, p: Fraction) -> Fraction:
    return sum((math.comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(k + 1)), Fraction(0))


@pytest.mark.parametrize(("n", "bound"), [(100, 0.02951), (1000, 0.00299), (5000, 0.00060)])
def test_reference_of_zero_flips(n: int, bound: float) -> None:
    assert clopper_pearson_upper(0, n, 0.05) == pytest.approx(bound, abs=5e-6)
    assert clopper_pearson_lower(0, n, 0.05) == 0
    assert clopper_pearson_upper(n, n, 0.05) == 1


def test_reference_of_the_order_statistic() -> None:
    assert quantile_rank(1000, 0.95, 0.05) == 962
    assert quantile_rank(58, 0.95, 0.05) is None
    assert quantile_rank(59, 0.95, 0.05) == 59


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 80), st.data())
def test_binomial_cdf_against_exact_fractions(n: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(0, n - 1))
    p = data.draw(st.floats(0.001, 0.999))
    assert binomial_cdf(k, n, p) == pytest.approx(float(exact_cdf(k, n, Fraction(p))), abs=1e-12)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 60), st.sampled_from([0.2, 0.05, 0.001]), st.data())
def test_clopper_pearson_solves_its_equation_from_the_safe_side(n: int, alpha: float, data: st.DataObject) -> None:
    k = data.draw(st.integers(0, n - 1))
    upper = clopper_pearson_upper(k, n, alpha)
    assert alpha - 1e-8 <= float(exact_cdf(k, n, Fraction(upper))) <= alpha
    lower = clopper_pearson_lower(k + 1, n, alpha)
    assert alpha - 1e-8 <= 1 - float(exact_cdf(k, n, Fraction(lower))) <= alpha + 1e-15
    assert lower <= (k + 1) / n and k / n <= upper


def test_large_counts_agree_with_the_normal_limit() -> None:
    n, rate = 1_000_000, 0.05
    width = clopper_pearson_upper(int(rate * n), n, 0.05) - rate
    assert width == pytest.approx(1.6449 * math.sqrt(rate * (1 - rate) / n), rel=0.02)


@settings(max_examples=60, deadline=None)
@example(n=1, q=0.1, alpha=0.1)
@given(st.integers(1, 40), st.integers(5, 95).map(lambda percent: percent / 100), st.sampled_from([0.1, 0.01]))
def test_quantile_rank_is_the_smallest_that_holds(n: int, q: float, alpha: float) -> None:
    enough = 1 - alpha + 1e-12  # what holds by rounding alone does not count
    holds = [r for r in range(1, n + 1) if float(exact_cdf(r - 1, n, Fraction(str(q)))) >= enough]
    rank = quantile_rank(n, q, alpha)
    assert rank == (holds[0] if holds else None)


REPETITIONS, UNITS = 200, 150


def failures_of(name: str, generator: torch.Generator) -> int:
    """How often a 95 % bound misses the truth over the repetitions; skewed, mostly zero values are the hard case."""
    failures = 0
    for _ in range(REPETITIONS):
        uniform = torch.rand(UNITS, generator=generator, dtype=torch.float64)
        flips = int((uniform < 0.04).sum())
        # Eight tenths are nearly zero, the rest spreads over [0, 1].
        mixed = torch.where(uniform < 0.8, 0.01 * uniform, (uniform - 0.8) / 0.2)
        mean = 0.01 * 0.8**2 / 2 + 0.2 * 0.5
        misses = {
            "clopper upper": lambda f=flips: clopper_pearson_upper(f, UNITS, 0.05) < 0.04,
            "clopper lower": lambda f=flips: clopper_pearson_lower(f, UNITS, 0.05) > 0.04,
            "betting upper": lambda x=mixed, m=mean: betting_upper(x, 0.05) < m,
            "betting lower": lambda x=mixed, m=mean: betting_lower(x, 0.05) > m,
            "quantile upper": lambda u=uniform: quantile_upper(u, 0.9, 0.05) < 0.9,
            "quantile lower": lambda u=uniform: quantile_lower(u, 0.9, 0.05) > 0.9,
        }
        failures += misses[name]()
    return failures


@pytest.mark.parametrize("kind", ["clopper", "betting", "quantile"])
@pytest.mark.parametrize("side", ["upper", "lower"])
def test_coverage_over_repetitions(kind: str, side: str) -> None:
    assert failures_of(f"{kind} {side}", torch.Generator().manual_seed(0)) <= 16


def test_betting_brackets_the_mean_more_tightly_than_hoeffding() -> None:
    x = torch.rand(1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 0.1
    mean, hoeffding = float(x.mean()), math.sqrt(math.log(1 / 0.05) / 2000)
    assert mean - hoeffding < betting_lower(x, 0.05) < mean < betting_upper(x, 0.05) < mean + hoeffding


def test_other_ranges_scale_with_their_values() -> None:
    x = torch.rand(200, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for bound in (betting_upper, betting_lower):
        assert bound(3 * x - 1, 0.05, -1, 2) == pytest.approx(3 * bound(x, 0.05) - 1)


def test_degenerate_samples_stay_sound() -> None:
    assert betting_upper(torch.zeros(1), 0.05) <= 1
    assert betting_upper(torch.ones(50), 0.05) == pytest.approx(1)
    assert betting_lower(torch.zeros(50), 0.05) == pytest.approx(0, abs=1e-12)
    assert quantile_upper(torch.arange(10.0), 0.95, 0.05) == math.inf
    assert quantile_lower(torch.arange(10.0), 0.05, 0.05) == -math.inf


def test_units_that_settle_a_rate() -> None:
    n = settling_n_rate(0, 10, 0.01, 0.05)
    assert n == 299
    assert clopper_pearson_upper(0, 299, 0.05) <= 0.01 < clopper_pearson_upper(0, 298, 0.05)
    passing = settling_n_rate(40, 1000, 0.05, 0.05)
    assert passing is not None and clopper_pearson_upper(math.ceil(0.04 * passing), passing, 0.05) <= 0.05
    failing = settling_n_rate(1, 10, 0.05, 0.05)
    assert failing is not None and clopper_pearson_lower(failing // 10, failing, 0.05) > 0.05
    assert settling_n_rate(5, 100, 0.05, 0.05) is None


def test_units_that_settle_a_mean() -> None:
    x = torch.rand(100, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    gap, variance, log = 0.6 - float(x.mean()), float(x.var()), math.log(2 / 0.05)
    # Maurer and Pontil, theorem 4: the first n whose excess is no more than the gap.
    enough = (n for n in range(100, 10_000) if math.sqrt(2 * variance * log / n) + 7 * log / (3 * (n - 1)) <= gap)
    assert settling_n_mean(x, 0.6, 0.05) == next(enough)
    assert settling_n_mean(3 * x - 1, 0.8, 0.05, -1, 2) == settling_n_mean(x, 0.6, 0.05)
    assert settling_n_mean(x, float(x.mean()), 0.05) is None


def test_alpha_is_divided() -> None:
    assert divided_alpha(0.95) == pytest.approx(0.05)
    assert divided_alpha(0.95, 5) == pytest.approx(0.01)
    with pytest.raises(ModhifiError, match="confidence"):
        divided_alpha(1.0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: clopper_pearson_upper(3, 2, 0.05), "check the numbers"),
        (lambda: clopper_pearson_upper(0, 0, 0.05), "check the numbers"),
        (lambda: betting_upper(torch.tensor([0.5, 1.5]), 0.05), "outside the range"),
        (lambda: betting_upper(torch.tensor([0.5, math.nan]), 0.05), "NaN"),
        (lambda: quantile_upper(torch.full((100,), math.nan), 0.5, 0.05), "NaN"),
        (lambda: quantile_rank(10, 1.0, 0.05), "quantile"),
    ],
)
def test_bad_input_is_named(call, message: str) -> None:
    with pytest.raises(ModhifiError, match=message):
        call()
