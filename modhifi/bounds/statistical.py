"""R3: what held-out units say about every input from the same distribution. Two forward passes for each unit.

A unit is an image or a whole sequence, never a token. Source: docs/method.md, R3 (statistical).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from modhifi.bounds import confidence as stats
from modhifi.data.samples import Samples
from modhifi.errors import GateFailed, ModhifiError
from modhifi.models.loaded import real_tokens

QUANTILE = 0.95
# Sequences whose outputs show what one constant output would miss.
CONSTANT_OUTPUTS = 16
# A sequence's mean difference of negative log-likelihoods, in nats, counts up to this, or twice the tolerance.
NLL_CAP = 1.0
Logits = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Units:
    """What both networks did on each of n held-out units; float64 (n,).

    ``flips`` is the share of a unit's positions whose top-1 changed (0 or 1 for an image), ``variation`` the mean total
    variation of the softmax, ``error`` the Euclidean norm of the output's change. The ``constant_*`` are the same
    figures for a predictor that ignores its input: always the most frequent class, the mean softmax, the mean output.
    ``nll`` is, for causal language models, by how many nats the mean negative log-likelihood of a sequence's next
    tokens grew, and ``constant_nll`` by how many it would for a predictor of one distribution.
    """

    flips: Tensor
    variation: Tensor
    error: Tensor
    constant_flips: float
    constant_variation: float
    constant_errors: Tensor
    positions: int
    nll: Tensor | None = None
    constant_nll: float = math.nan

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

    ``population`` says what the units are, and so what the bounds speak of. ``perplexity`` is the ratio of the modified
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


@torch.inference_mode()
def run_units(dense: Logits, edited: Logits, held: Samples, batch_size: int, next_tokens: bool = False) -> Units:
    """Run both networks on every unit once. ``next_tokens``: the units are token ids and the outputs causal logits.

    Raises ModhifiError if an output of the original is not finite, GateFailed if one of the modified network is not.
    """
    rows: list[tuple[float, float, float]] = []
    likelihoods: list[tuple[float, float]] = []
    outputs: list[Tensor] = []
    inputs: list[Tensor] = []
    for batch in held.batches(batch_size):
        ours, theirs = dense(batch).detach().cpu(), edited(batch).detach().cpu()
        names = held.names[len(rows) : len(rows) + len(batch)]
        _finite(ours, names, ModhifiError, "original")
        _finite(theirs, names, GateFailed, "modified")
        if ours.shape != theirs.shape:
            raise ModhifiError(f"outputs of shape {tuple(ours.shape)} and {tuple(theirs.shape)} cannot be compared")
        # One unit at a time: the logits of a sequence are large, and larger in float64.
        for tokens, one, two in zip(batch, ours, theirs, strict=True):
            there = real_tokens(tokens)
            if there is not None and one.ndim == 2:
                tokens, one, two = tokens[there], one[there], two[there]
            one, two = one.double(), two.double()
            moved = float((one.argmax(-1) != two.argmax(-1)).double().mean())
            variation = _variation(one.softmax(-1), two.softmax(-1))
            rows.append((moved, float(variation), float((one - two).norm())))
            if next_tokens and len(tokens) > 1:
                likelihoods.append((float(_nll(one, tokens)), float(_nll(two, tokens))))
            # A predictor of one constant needs few outputs to be known well enough.
            if ours.ndim == 2 or len(outputs) < CONSTANT_OUTPUTS:
                outputs.append(one.float())
                inputs.append(tokens)
    if not rows:
        raise ModhifiError("there is no held-out sample; give at least one")
    flips, variations, errors = torch.tensor(rows, dtype=torch.float64).unbind(1)
    mean, constant = _constant(outputs)
    units = Units(flips, variations, errors, *constant)
    if not likelihoods:
        return units
    before, after = torch.tensor(likelihoods, dtype=torch.float64).unbind(1)
    missed = [float(_nll(mean.log().expand(o.shape), t)) for o, t in zip(outputs, inputs, strict=True)]
    return replace(
        units, nll=after - before, constant_nll=sum(missed) / len(missed) - float(before[: len(missed)].mean())
    )


def _nll(logits: Tensor, tokens: Tensor) -> Tensor:
    """Of the tokens (t,) that have one before them, from logits (t, classes): the mean, in nats."""
    return F.cross_entropy(logits[:-1], tokens[1:])


def _constant(outputs: list[Tensor]) -> tuple[Tensor, tuple[float, float, Tensor, int]]:
    """The mean distribution (classes,), and what the best predictor of one constant misses: flips, total variation,
    errors (n,); beside them the number of positions of a unit. Outputs are (classes,) or (positions, classes)."""
    rows = [o.reshape(-1, o.shape[-1]) for o in outputs]
    count = sum(len(r) for r in rows)
    top = torch.cat([r.argmax(-1) for r in rows])
    mean = torch.stack([r.double().softmax(-1).sum(0) for r in rows]).sum(0) / count
    centre = torch.stack([r.sum(0, dtype=torch.float64) for r in rows]).sum(0) / count
    variation = sum(float(_variation(r.double().softmax(-1), mean)) for r in rows) / len(rows)
    errors = torch.stack([(r - centre).norm() for r in rows])
    return mean, (1 - int(top.bincount().max()) / count, variation, errors, max(len(r) for r in rows))


def _variation(p: Tensor, q: Tensor) -> Tensor:
    """Mean total variation between the distributions (..., classes) of one unit."""
    return ((p - q).abs().sum(-1) / 2).clamp(0, 1).mean()


def statistical(
    units: Units, alpha: float, population: str = "held-out units", tolerance: float | None = None
) -> Statistical:
    """R3 from the units: Clopper-Pearson for flips of images (betting for shares of sequences), betting for total
    variation, order statistics for the error. ``tolerance`` is the largest ratio of perplexities that is allowed."""
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
    return Statistical(n, alpha, flips, variation, errors, population, _perplexity(units, alpha, tolerance))


def nll_cap(tolerance: float | None) -> float:
    """Up to how many nats the difference of a unit counts; the tolerance, a ratio of perplexities, stays inside."""
    return max(NLL_CAP, 2 * math.log(tolerance) if tolerance else 0.0)


def _perplexity(units: Units, alpha: float, tolerance: float | None) -> Interval | None:
    """The ratio of perplexities is exp of the mean difference over sequences of one length, each capped beforehand."""
    if units.nll is None:
        return None
    cap = nll_cap(tolerance)
    capped = units.nll.clamp(-cap, cap)
    low, high = (math.exp(bound(capped, alpha, -cap, cap)) for bound in (stats.betting_lower, stats.betting_upper))
    beyond = int((units.nll.abs() > cap).sum())
    method = (
        f"betting on each sequence's mean difference, capped at {cap:g} nats ({beyond} of {len(units)} were beyond)"
    )
    measured = math.exp(float(units.nll.mean()))
    # at the cap the bound is what was assumed, not what was seen
    informative = high < min(math.exp(units.constant_nll), math.exp(cap) * (1 - 1e-6))
    return Interval(measured, low, high, method, informative)


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


def _finite(outputs: Tensor, names: tuple[str, ...], error: type[ModhifiError], which: str) -> None:
    good = outputs.isfinite().flatten(1).all(1)
    if not bool(good.all()):
        name = names[int((~good).nonzero()[0])]
        raise error(f"the {which} model's output is not finite on '{name}'; it cannot be bounded; check its weights")
