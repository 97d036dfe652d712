"""R3: what held-out units say about every input from the same distribution. Two forward passes for each unit.

A unit is an image or a whole sequence, never a token. Source: docs/method.md, R3 (statistical).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from modhifi import statistics as stats
from modhifi.data import Samples
from modhifi.errors import GateFailed, ModhifiError

QUANTILE = 0.95
Logits = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Units:
    """What both networks did on each of n held-out units; float64 (n,).

    ``flips`` is the share of a unit's positions whose top-1 changed (0 or 1 for an image), ``variation`` the mean total
    variation of the softmax, ``error`` the Euclidean norm of the output's change. The ``constant_*`` are the same
    figures for a predictor that ignores its input: always the most frequent class, the mean softmax, the mean output.
    """

    flips: Tensor
    variation: Tensor
    error: Tensor
    constant_flips: float
    constant_variation: float
    constant_errors: Tensor
    positions: int

    def __len__(self) -> int:
        return len(self.flips)

    @property
    def constant_error(self) -> float:
        """Root mean square error of the mean output."""
        return float(self.constant_errors.square().mean().sqrt())


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
    """R3, each bound with error probability ``alpha``; ``error_quantile`` is of the output's change, not squared.

    ``population`` says what the units are, and so what the bounds speak of.
    """

    n: int
    alpha: float
    flips: Interval
    variation: Interval
    error_quantile: Interval
    population: str = "held-out units"
    quantile: float = QUANTILE


@torch.inference_mode()
def run_units(dense: Logits, edited: Logits, held: Samples, batch_size: int) -> Units:
    """Run both networks on every unit once, and once more the dense one's stored outputs against their mean.

    Raises ModhifiError if an output of the original is not finite, GateFailed if one of the modified network is not.
    """
    flips: list[Tensor] = []
    variation: list[Tensor] = []
    error: list[Tensor] = []
    outputs: list[Tensor] = []
    start = 0
    for batch in held.batches(batch_size):
        ours, theirs = _double(dense(batch)), _double(edited(batch))
        names = held.names[start : start + len(batch)]
        _finite(ours, names, ModhifiError, "original")
        _finite(theirs, names, GateFailed, "modified")
        if ours.shape != theirs.shape:
            raise ModhifiError(f"outputs of shape {tuple(ours.shape)} and {tuple(theirs.shape)} cannot be compared")
        start += len(batch)
        flips.append((ours.argmax(-1) != theirs.argmax(-1)).double().reshape(len(batch), -1).mean(1))
        variation.append(_variation(ours.softmax(-1), theirs.softmax(-1)))
        error.append((ours - theirs).flatten(1).norm(dim=1))
        # A predictor of one constant needs few outputs to be known well enough; logits of sequences are large.
        if ours.ndim == 2 or sum(len(o) for o in outputs) < 16:
            outputs.append(ours.float())
    if not flips:
        raise ModhifiError("there is no held-out sample; give at least one")
    return Units(torch.cat(flips), torch.cat(variation), torch.cat(error), *_constant(torch.cat(outputs)))


def _constant(outputs: Tensor) -> tuple[float, float, Tensor, int]:
    """Of the best predictor of one constant for each figure: flips, total variation, errors (n,), positions."""
    n, classes = len(outputs), outputs.shape[-1]
    top = outputs.argmax(-1)
    flips = 1 - int(top.flatten().bincount().max()) / top.numel()
    probabilities = outputs.double().softmax(-1)
    mean = probabilities.reshape(-1, classes).mean(0)
    variation = float(_variation(probabilities, mean.expand_as(probabilities)).mean())
    centre = outputs.double().reshape(-1, classes).mean(0)
    return flips, variation, (outputs.double() - centre).flatten(1).norm(dim=1), top.numel() // n


def _variation(p: Tensor, q: Tensor) -> Tensor:
    return ((p - q).abs().sum(-1) / 2).clamp(0, 1).reshape(len(p), -1).mean(1)


def statistical(units: Units, alpha: float, population: str = "held-out units") -> Statistical:
    """R3 from the units: Clopper-Pearson for flips of images (betting for shares of sequences), betting for total
    variation (or empirical Bernstein where that is tighter), order statistics for the error."""
    n = len(units)
    if units.positions == 1:
        events = int(units.flips.sum())
        low, high = stats.clopper_pearson_lower(events, n, alpha), stats.clopper_pearson_upper(events, n, alpha)
        method = "Clopper-Pearson"
    else:
        low, high, method = stats.betting_lower(units.flips, alpha), stats.betting_upper(units.flips, alpha), "betting"
    flips = Interval(float(units.flips.mean()), low, high, method, high < units.constant_flips)
    v_low, v_high = stats.betting_lower(units.variation, alpha), stats.betting_upper(units.variation, alpha)
    variation = Interval(float(units.variation.mean()), v_low, v_high, "betting", v_high < units.constant_variation)
    e_low, e_high = (f(units.error, QUANTILE, alpha) for f in (stats.quantile_lower, stats.quantile_upper))
    measured = float(units.error.quantile(QUANTILE))
    informative = math.isfinite(e_high) and e_high < float(units.constant_errors.quantile(QUANTILE))
    errors = Interval(measured, max(0.0, e_low), e_high, "order statistics", informative)
    return Statistical(n, alpha, flips, variation, errors, population)


@dataclass(frozen=True)
class Forgetting:
    """How often the forgotten class is no longer predicted, on held-out units of that class: a LOWER bound shows it."""

    n: int
    still_predicted: int
    measured: float
    lower: float
    upper: float
    alpha: float


def forgetting(predictions: Tensor, forgotten: Tensor, alpha: float) -> Forgetting:
    """From the modified network's top-1, int64 (n,), on units of the forgotten classes, int64 (m,).

    The Clopper-Pearson bounds, each one-sided, of the rate at which no forgotten class is predicted.
    """
    still = int(torch.isin(predictions, forgotten).sum())
    n = len(predictions)
    low, high = (bound(n - still, n, alpha) for bound in (stats.clopper_pearson_lower, stats.clopper_pearson_upper))
    return Forgetting(n, still, 1 - still / n, low, high, alpha)


def _double(outputs: Tensor) -> Tensor:
    return outputs.detach().cpu().double()


def _finite(outputs: Tensor, names: tuple[str, ...], error: type[ModhifiError], which: str) -> None:
    good = outputs.isfinite().flatten(1).all(1)
    if not bool(good.all()):
        name = names[int((~good).nonzero()[0])]
        raise error(f"the {which} model's output is not finite on '{name}'; it cannot be bounded; check its weights")
