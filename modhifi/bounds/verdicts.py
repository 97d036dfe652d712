"""From bounds to verdicts: the order of precedence of docs/bounds.md, and the sentence beside each."""

from __future__ import annotations

import math
from dataclasses import dataclass

from modhifi.bounds.confidence import divided_alpha, settling_n_mean, settling_n_rate
from modhifi.bounds.held_out import HeldOut
from modhifi.bounds.statistical import QUANTILE, Forgetting, Interval, Statistical, nll_cap
from modhifi.errors import GateFailed, ModhifiError, SelfTestFailed
from modhifi.models.loaded import LoadedModel


@dataclass(frozen=True)
class Tolerances:
    """The largest changes that the user allows.

    ``max_flip``: the share of inputs whose top-1 may change. ``max_error``: the Euclidean change of the output that at
    most one input in twenty may exceed. ``max_perplexity_ratio``: of causal language models, the modified network's
    perplexity over the original's. ``not_a_sample``: the held-out units were not drawn at random, so that nothing is
    claimed beyond them. Raises ModhifiError for a number outside its range.
    """

    max_flip: float | None = None
    max_error: float | None = None
    confidence: float = 0.95
    not_a_sample: bool = False
    max_perplexity_ratio: float | None = None

    def __post_init__(self) -> None:
        if self.max_flip is not None and not 0 <= self.max_flip <= 1:
            raise ModhifiError(f"--max-flip {self.max_flip} is no share; give a number between 0 and 1")
        if self.max_error is not None and not 0 <= self.max_error < math.inf:
            raise ModhifiError(f"--max-error {self.max_error} is no error; give a number of at least 0")
        if (ratio := self.max_perplexity_ratio) is not None and not 1 < ratio < math.inf:
            raise ModhifiError(f"--max-perplexity-ratio {ratio} allows no loss; give a number above 1, such as 1.05")
        divided_alpha(self.confidence)

    def fit(self, original: LoadedModel) -> None:
        """Raises ModhifiError where a tolerance does not apply to such a model."""
        if self.max_perplexity_ratio is not None and original.kind != "text":
            raise ModhifiError("--max-perplexity-ratio is for causal language models; use --max-flip or --max-error")
        if self.max_flip is not None and original.gives_values:
            raise ModhifiError("--max-flip counts changed classes, and these outputs are values; use --max-error")

    def require(self, incomparable: str) -> None:
        """Raises ModhifiError where a tolerance is given and outputs are ``incomparable``, for that reason."""
        if incomparable and self.given:
            raise ModhifiError(f"no tolerance can be checked: {incomparable}; leave out --max-flip and --max-error")

    @property
    def alpha(self) -> float:
        """The error probability of one bound: all tolerances together hold at the confidence asked for."""
        return divided_alpha(self.confidence, max(1, self.given))

    @property
    def given(self) -> int:
        """How many tolerances there are."""
        return sum(t is not None for t in (self.max_flip, self.max_error, self.max_perplexity_ratio))


@dataclass(frozen=True)
class Verdict:
    """One line of the report; ``settling_n`` is the number of held-out units that would settle an INCONCLUSIVE one."""

    name: str
    verdict: str
    text: str
    settling_n: int | None = None


def self_test(violations: tuple[str, ...], samples: int, compared: bool = True) -> Verdict:
    """The verdict on measured <= R2 <= R1, on the very samples the bounds were computed from.

    Nothing is ``compared`` where neither bound is available.
    """
    if violations:
        return Verdict("self-test", "BUG", "; ".join(violations))
    if samples == 0:
        return Verdict("self-test", "not measured", "no sample was walked")
    if not compared:
        return Verdict("self-test", "not measured", "neither R1 nor R2 is available here: there was nothing to compare")
    return Verdict("self-test", "HOLDS", f"measured <= R2 <= R1 on each of {samples} samples")


def judge(
    tolerances: Tolerances, bounds: Statistical, table: HeldOut, every_input: float | None
) -> tuple[Verdict, ...]:
    """The verdict on each tolerance given.

    ``every_input`` is R1 in its every-input form, None where there is none. Raises ModhifiError where a tolerance of
    the perplexity meets sequences of one token. Source: docs/bounds.md.
    """
    verdicts = []
    alpha = bounds.alpha
    if (tau := tolerances.max_flip) is not None:
        if table.sequences:
            settling = settling_n_mean(table.flips, tau, alpha)
            quantity = "positions of a unit whose top-1 changes"
        else:
            settling = settling_n_rate(int(table.flips.sum()), len(table), tau, alpha)
            quantity = "inputs whose top-1 changes"
        certified = every_input == 0
        name = f"max flip {tau:g}"
        verdicts.append(
            _verdict(name, tau, tolerances, bounds, bounds.flips, certified, settling, quantity, percent=True)
        )
    if (tau := tolerances.max_error) is not None:
        above = int((table.error > tau).sum())
        settling = settling_n_rate(above, len(table), 1 - QUANTILE, alpha)
        certified = every_input is not None and every_input <= tau
        quantity = f"{QUANTILE:.0%} quantile of the output's change"
        name = f"max error {tau:g}"
        verdicts.append(_verdict(name, tau, tolerances, bounds, bounds.error_quantile, certified, settling, quantity))
    if (tau := tolerances.max_perplexity_ratio) is not None:
        growth = table.nll_growth
        if bounds.perplexity is None or growth is None:
            raise ModhifiError("perplexity needs sequences of at least two tokens; give a longer --window")
        cap = nll_cap(tau)
        settling = settling_n_mean(growth.clamp(-cap, cap), math.log(tau), alpha, -cap, cap)
        quantity, name = f"ratio of perplexities ({bounds.perplexity.method})", f"max perplexity ratio {tau:g}"
        certified = every_input == 0
        verdicts.append(_verdict(name, tau, tolerances, bounds, bounds.perplexity, certified, settling, quantity))
    return tuple(verdicts)


def _verdict(
    name: str,
    tau: float,
    tolerances: Tolerances,
    bounds: Statistical,
    interval: Interval,
    certified: bool,
    settling: int | None,
    quantity: str,
    percent: bool = False,
) -> Verdict:
    def show(value: float) -> str:
        return f"{100 * value:.3g} %" if percent else f"{value:.4g}"

    measured = f"{quantity}: {show(interval.measured)} measured on {bounds.n} {bounds.population}"
    if tolerances.not_a_sample:
        verdict = "PASS-ON-SAMPLES" if interval.measured <= tau else "FAIL"
        return Verdict(name, verdict, f"{measured}; nothing is claimed beyond them")
    confidence = f"{100 * (1 - bounds.alpha):.4g} % confidence"
    if interval.lower > tau:
        return Verdict(name, "FAIL", f"{measured}, at least {show(interval.lower)} with {confidence}")
    if certified:
        return Verdict(name, "PASS-CERTIFIED", f"{measured}; proven for every input of the box (R1)")
    if interval.upper <= tau:
        return Verdict(name, "PASS-STATISTICAL", f"{measured}, at most {show(interval.upper)} with {confidence}")
    outlook = (
        f"about {settling:,} units would settle it" if settling else "no number of units can be named that settles it"
    )
    return Verdict(
        name, "INCONCLUSIVE", f"{measured}, at most {show(interval.upper)} with {confidence}; {outlook}", settling
    )


def unsettled(verdict: Verdict, reason: str) -> Verdict:
    """The verdict on a tolerance where the figures behind it change from pass to pass: a failure stays one."""
    return verdict if verdict.verdict == "FAIL" else Verdict(verdict.name, "INCONCLUSIVE", f"{verdict.text}; {reason}")


def forgetting_verdict(before: Forgetting, after: Forgetting) -> dict[str, str]:
    """The verdict on forgetting.

    INFORMATIVE where the edited model misses the forgotten classes more often than the original.
    """
    return {
        "name": "forgotten classes no longer predicted",
        "verdict": "INFORMATIVE" if after.lower > before.upper else "VACUOUS",
        "text": f"for at least {100 * after.lower:.3g} % of their images (Clopper-Pearson, {after.n} held-out images, "
        f"{100 * (1 - after.alpha):.4g} % confidence); measured {100 * after.measured:.3g} %, "
        f"{100 * before.measured:.3g} % before the edit; no proof that anything was erased",
    }


def enforce(verdicts: tuple[Verdict, ...]) -> None:
    """Raises SelfTestFailed for a bug of ours, then GateFailed where a tolerance failed or stayed open."""
    for verdict in verdicts:
        if verdict.verdict == "BUG":
            raise SelfTestFailed(f"the bound's self-test failed, a bug of modhifi: {verdict.text}")
    for verdict in verdicts:
        if verdict.verdict in ("FAIL", "INCONCLUSIVE"):
            raise GateFailed(f"{verdict.name}: {verdict.verdict}: {verdict.text}")
