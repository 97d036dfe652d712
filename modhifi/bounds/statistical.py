"""R3: confidence bounds, from held-out units, for every input of the same distribution.

A unit is an image or a whole sequence, never a token. Source: docs/method.md, R3 (statistical).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from modhifi.bounds import confidence as stats
from modhifi.bounds.held_out import HeldOut

QUANTILE = 0.95
# A sequence's mean difference of negative log-likelihoods, in nats, counts up to this, or twice the tolerance.
NLL_CAP = 1.0


@dataclass(frozen=True)
class Interval:
    """A measured figure and its confidence bounds, each one-sided."""

    measured: float
    lower: float
    upper: float
    method: str
    informative: bool


@dataclass(frozen=True)
class Statistical:
    """The statistical bounds R3, each with error probability ``alpha``.

    ``error_quantile`` is of the Euclidean change of the output. ``population`` names the units, and so the inputs for
    which the bounds hold. ``perplexity`` is the ratio of the modified
    network's perplexity to the original's, of causal language models.
    """

    n: int
    alpha: float
    flips: Interval
    variation: Interval
    error_quantile: Interval
    population: str = "held-out units"
    perplexity: Interval | None = None
    quantile: float = QUANTILE


def statistical(
    table: HeldOut, alpha: float, population: str = "held-out units", tolerance: float | None = None
) -> Statistical:
    """Computes R3 of a table of held-out units, each bound with error probability ``alpha``.

    Clopper-Pearson bounds flips of images and betting those of sequences; betting bounds the total variation, order
    statistics the error. ``tolerance`` is the largest ratio of perplexities that is allowed.
    Source: docs/method.md, R3.
    """
    n, constant, flips = len(table), table.constant, table.flips
    if table.sequences:
        low, high, method = stats.betting_lower(flips, alpha), stats.betting_upper(flips, alpha), "betting"
    else:
        events = int(flips.sum())
        low, high = stats.clopper_pearson_lower(events, n, alpha), stats.clopper_pearson_upper(events, n, alpha)
        method = "Clopper-Pearson"
    flip_rate = Interval(float(flips.mean()), low, high, method, high < constant.flips)
    low, high = (bound(table.total_variation, alpha) for bound in (stats.betting_lower, stats.betting_upper))
    measured = float(table.total_variation.mean())
    variation = Interval(measured, low, high, "betting", high < constant.total_variation)
    low, high = (bound(table.error, QUANTILE, alpha) for bound in (stats.quantile_lower, stats.quantile_upper))
    measured = float(table.error.quantile(QUANTILE))
    informative = math.isfinite(high) and high < float(constant.errors.quantile(QUANTILE))
    errors = Interval(measured, max(0.0, low), high, "order statistics", informative)
    return Statistical(n, alpha, flip_rate, variation, errors, population, _perplexity(table, alpha, tolerance))


def nll_cap(tolerance: float | None) -> float:
    """The cap, in nats, of a unit's difference of losses; the tolerance, a ratio of perplexities, stays inside."""
    return max(NLL_CAP, 2 * math.log(tolerance) if tolerance else 0.0)


def _perplexity(table: HeldOut, alpha: float, tolerance: float | None) -> Interval | None:
    """The ratio of perplexities: exp of the mean difference over sequences of one length, each capped beforehand."""
    growth = table.nll_growth
    if growth is None:
        return None
    cap = nll_cap(tolerance)
    capped = growth.clamp(-cap, cap)
    low, high = (math.exp(bound(capped, alpha, -cap, cap)) for bound in (stats.betting_lower, stats.betting_upper))
    beyond = int((growth.abs() > cap).sum())
    method = (
        f"betting on each sequence's mean difference, capped at {cap:g} nats ({beyond} of {len(table)} were beyond)"
    )
    measured = math.exp(float(growth.mean()))
    # At the cap the bound is the assumption, not an observation.
    informative = high < min(math.exp(table.constant.nll), math.exp(cap) * (1 - 1e-6))
    return Interval(measured, low, high, method, informative)


@dataclass(frozen=True)
class Forgetting:
    """The rate at which forgotten classes are no longer predicted, on n held-out units of those classes.

    ``lower`` and ``upper`` are one-sided, each with error probability ``alpha``; it is the lower one that shows
    forgetting.
    """

    n: int
    still_predicted: int
    measured: float
    lower: float
    upper: float
    alpha: float


def forgetting(predictions: Tensor, forgotten: Tensor, alpha: float) -> Forgetting:
    """The Clopper-Pearson bounds, each one-sided, of the rate at which no forgotten class is predicted.

    ``predictions`` are a network's top-1, int64 (n,), on units of the ``forgotten`` classes, int64 (m,).
    """
    still_predicted = int(torch.isin(predictions, forgotten).sum())
    n = len(predictions)
    low, high = (
        bound(n - still_predicted, n, alpha) for bound in (stats.clopper_pearson_lower, stats.clopper_pearson_upper)
    )
    return Forgetting(n, still_predicted, 1 - still_predicted / n, low, high, alpha)
