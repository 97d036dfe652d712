"""Confidence bounds from held-out units, in closed form or by bisection; no dependency beyond torch.

Units are independent draws: images or whole sequences, never tokens. Every bound is one-sided and fails with
probability at most `alpha`; bisection returns the outer end of its bracket, so rounding errs on the safe side.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from modhifi.errors import ModhifiError

_BISECTIONS = 60
_EPS = torch.finfo(torch.float64).eps
_LARGEST_N = 10**8


def clopper_pearson_upper(events: int, n: int, alpha: float) -> float:
    """The exact upper confidence bound of a rate after `events` in `n` units.

    It is the rate at which so few events have probability `alpha`. Raises ModhifiError for impossible numbers. Source:
    Clopper and Pearson, Biometrika 1934.
    """
    _check_count(events, n, alpha)
    if events == n:
        return 1.0
    if events == 0:
        return min(1.0, -math.expm1(math.log(alpha) / n) * (1 + 8 * _EPS))
    return _bisect(lambda p: binomial_cdf(events, n, p) > alpha - _cdf_error(n), 0.0, 1.0)[1]


def clopper_pearson_lower(events: int, n: int, alpha: float) -> float:
    """The exact lower confidence bound of a rate after `events` in `n` units; see :func:`clopper_pearson_upper`."""
    return 1.0 - clopper_pearson_upper(n - events, n, alpha)


def binomial_cdf(k: int, n: int, p: float) -> float:
    """The probability P(Binomial(n, p) <= k), through the regularised incomplete beta function."""
    if k < 0:
        return 0.0
    if k >= n:
        return 1.0
    return incomplete_beta(n - k, k + 1, 1.0 - p)


def incomplete_beta(a: float, b: float, x: float) -> float:
    """The regularised incomplete beta function I_x(a, b) by Lentz's continued fraction (Numerical Recipes, 6.4)."""
    if x <= 0.0:
        return 0.0
    if x >= 1.0:
        return 1.0
    log = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    if x < (a + 1) / (a + b + 2):
        return math.exp(log) * _beta_fraction(a, b, x) / a
    return 1.0 - math.exp(log) * _beta_fraction(b, a, 1.0 - x) / b


def betting_lower(values: Tensor, alpha: float, low: float = 0.0, high: float = 1.0) -> float:
    """The lower confidence bound of the mean of units (n,) in [low, high], by betting.

    A gambler bets on each unit exceeding the candidate mean, with stakes from the units before it (predictable plug-in)
    and at most half the capital at risk; candidates at which the capital ever reaches 1 / alpha are refuted. The order
    of the units must not depend on their values. Raises ModhifiError for NaN and units outside the range. Source:
    Waudby-Smith and Ramdas, "Estimating means of bounded random variables by betting" (JRSS B 2024), one-sided hedged
    capital with theorem 3's stakes.
    """
    units = _unit_interval(values, alpha, low, high)
    n = len(units)
    counts = torch.arange(1, n + 1, dtype=torch.float64)
    means = (0.5 + units.cumsum(0)) / (counts + 1)
    variances = (0.25 + ((units - means) ** 2).cumsum(0)) / (counts + 1)
    before = torch.cat([torch.tensor([0.25], dtype=torch.float64), variances[:-1]])
    stakes = (2 * math.log(1 / alpha) / (n * before)).sqrt()

    def refuted(mean: float) -> bool:
        if mean <= 0.0:
            return True
        capital = torch.log1p(stakes.clamp(max=0.5 / mean) * (units - mean)).cumsum(0)
        return float(capital.max()) >= math.log(1 / alpha) + 1e-9

    # For each unit the gain falls with the candidate mean, capped stake included, so one crossing separates the two.
    return low + (high - low) * (_bisect(refuted, 0.0, 1.0)[0])


def betting_upper(values: Tensor, alpha: float, low: float = 0.0, high: float = 1.0) -> float:
    """The upper confidence bound of the mean of units (n,) in [low, high], by betting on the mirrored units."""
    return -betting_lower(-values.double(), alpha, -high, -low)


def quantile_rank(n: int, q: float, alpha: float) -> int | None:
    """The smallest r such that the r-th smallest of n units is at least the q quantile with confidence 1 - alpha.

    None where even the largest unit is not (n below log(alpha) / log(q)).
    """
    _check_count(0, n, alpha)
    if not 0 < q < 1:
        raise ModhifiError(f"a quantile of {q} is not between 0 and 1; use for instance 0.95")
    enough_share = 1 - alpha + _cdf_error(n)
    if binomial_cdf(n - 1, n, q) < enough_share:
        return None
    few, enough = 0, n
    while enough - few > 1:
        middle = (few + enough) // 2
        few, enough = (few, middle) if binomial_cdf(middle - 1, n, q) >= enough_share else (middle, enough)
    return enough


def quantile_upper(values: Tensor, q: float, alpha: float) -> float:
    """The upper confidence bound of the q quantile of units (n,) by order statistics; infinite where n is too small."""
    rank = quantile_rank(len(values), q, alpha)
    return math.inf if rank is None else float(_no_nan(values).sort().values[rank - 1])


def quantile_lower(values: Tensor, q: float, alpha: float) -> float:
    """The lower confidence bound of the q quantile of units (n,) by order statistics; -inf where n is too small."""
    # A lower bound of the q quantile of x is minus an upper bound of the 1 - q quantile of -x.
    return -quantile_upper(-values, 1 - q, alpha)


def settling_n_rate(events: int, n: int, tolerance: float, alpha: float) -> int | None:
    """The approximate number of units that settle whether a rate is within a tolerance, if the observed rate persists.

    None where no number up to 10^8 does: the rate is too close to the tolerance. Also for quantiles: "the q quantile is
    at most t" says that at most a share 1 - q of units exceeds t.
    """
    _check_count(events, n, alpha)
    rate = events / n
    if rate == tolerance or not 0 < tolerance < 1:
        return None
    if events == 0:
        return max(n, math.ceil(math.log(alpha) / math.log1p(-tolerance)))

    def settled(m: int) -> bool:
        if rate < tolerance:
            return clopper_pearson_upper(math.ceil(rate * m - 1e-9), m, alpha) <= tolerance
        return clopper_pearson_lower(math.floor(rate * m + 1e-9), m, alpha) > tolerance

    return _smallest(settled, n)


def settling_n_mean(values: Tensor, tolerance: float, alpha: float, low: float = 0.0, high: float = 1.0) -> int | None:
    """The approximate number of units that settle whether a mean is within a tolerance, if mean and variance persist.

    None where no number up to 10^8 does. Counts on an empirical Bernstein bound, which is wider than betting. Source:
    Maurer and Pontil, "Empirical Bernstein bounds and sample variance penalization" (COLT 2009), theorem 4.
    """
    x = _unit_interval(values, alpha, low, high)
    gap = abs((tolerance - low) / (high - low) - float(x.mean()))
    variance = float(x.var()) if len(x) > 1 else 0.25
    return None if gap == 0 else _smallest(lambda m: _bernstein_excess(variance, m, alpha) <= gap, max(len(x), 2))


def divided_alpha(confidence: float, candidates: int = 1) -> float:
    """The error probability of each of several bounds that must all hold at once (union bound).

    Raises ModhifiError for a confidence outside (0, 1).
    """
    if not 0 < confidence < 1 or candidates < 1:
        raise ModhifiError(f"confidence {confidence} must lie between 0 and 1; use for instance 0.95")
    return (1 - confidence) / candidates


def _beta_fraction(a: float, b: float, x: float) -> float:
    tiny = 1e-300
    c, d = 1.0, 1 / _away(1 - (a + b) * x / (a + 1), tiny)
    value = d
    for m in range(1, 100_000):
        for numerator in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            d = 1 / _away(1 + numerator * d, tiny)
            c = _away(1 + numerator / c, tiny)
            value *= d * c
        if abs(d * c - 1) < 1e-15:
            return value
    raise ModhifiError(f"the incomplete beta function did not converge for a={a}, b={b}; use fewer units")


def _cdf_error(n: int) -> float:
    """A bound of binomial_cdf's absolute error: three lgammas cancel, each rounded relative to its own size."""
    return 1e-13 + 16 * _EPS * math.lgamma(n + 2)


def _away(value: float, tiny: float) -> float:
    return tiny if abs(value) < tiny else value


def _bernstein_excess(variance: float, n: int, alpha: float) -> float:
    log = math.log(2 / alpha)
    return math.sqrt(2 * variance * log / n) + 7 * log / (3 * (n - 1))


def _bisect(condition: Callable[[float], bool], low: float, high: float) -> tuple[float, float]:
    """A bracket of the crossing of a condition that holds below and fails above."""
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if condition(middle) else (low, middle)
    return low, high


def _smallest(settled: Callable[[int], bool], start: int) -> int | None:
    fails, holds = start, start
    while not settled(holds):
        fails, holds = holds, 2 * holds
        if holds > _LARGEST_N:
            return None
    while holds - fails > 1:
        middle = (fails + holds) // 2
        fails, holds = (fails, middle) if settled(middle) else (middle, holds)
    return holds


def _unit_interval(values: Tensor, alpha: float, low: float, high: float) -> Tensor:
    _check_count(0, len(values), alpha)
    if not low < high:
        raise ModhifiError(f"the range from {low} to {high} is empty; give low < high")
    x = (_no_nan(values) - low) / (high - low)
    if bool((x < -1e-9).any()) or bool((x > 1 + 1e-9).any()):
        raise ModhifiError(f"a unit lies outside the range from {low} to {high}; cap it first and say so")
    return x.clamp(0, 1)


def _no_nan(values: Tensor) -> Tensor:
    if bool(values.isnan().any()):
        raise ModhifiError("a unit is NaN: no confidence bound exists; look at the model's outputs first")
    return values.detach().double().flatten().cpu()


def _check_count(events: int, n: int, alpha: float) -> None:
    if n < 1 or not 0 <= events <= n or not 0 < alpha < 1:
        raise ModhifiError(f"{events} events in {n} units at error probability {alpha}: impossible; check the numbers")
