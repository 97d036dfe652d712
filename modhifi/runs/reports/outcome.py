"""What a run's figures mean: one plain sentence, its tone, and what to do next."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from modhifi.bounds.ladder import BoundReport
from modhifi.bounds.statistical import Forgetting
from modhifi.runs.recipes.budgets import BudgetChoice
from modhifi.runs.recipes.heal import HealRecipe
from modhifi.runs.recipes.prune import PruneRecipe

Tone = Literal["good", "weak", "bad"]
# The largest shares of changed top-1, and ratios of perplexities, that count as good and as weak.
FLIPS, RATIOS = (0.05, 0.15), (1.05, 1.2)
# The same of the change of values, as a share of what they differ from their mean.
VALUES = (0.1, 0.3)
# A smaller gain in time, as a ratio, is lost in the noise of a machine.
FASTER = 0.97
# Below this number of calibration images, more of them still help a strong cut.
MANY = 1000
# The same of windows of text.
MANY_WINDOWS = 64


def add_outcome(report: dict[str, Any], bounds: BoundReport, advice: tuple[str, ...] = ()) -> None:
    """Adds ``outcome`` to a report, in place: ``tone`` (good, weak or bad), ``text`` (a sentence) and ``advice``."""
    text, tone = _change(bounds)
    if bounds.forgetting is not None:
        text = _forgetting(bounds, bounds.forgetting["edited"], text)
    verdicts = {verdict.verdict for verdict in bounds.verdicts}
    if verdicts & {"FAIL", "BUG"}:
        tone = "bad"
    elif "INCONCLUSIVE" in verdicts and tone == "good":
        tone = "weak"
    report["outcome"] = {"tone": tone, "text": text, "advice": list(advice)}


def without_bounds(report: dict[str, Any], reason: str) -> None:
    """Adds the ``outcome`` of a run whose outputs cannot be compared, for that reason, in place."""
    report["outcome"] = {"tone": "weak", "text": f"How far the outputs moved is not known: {reason}.", "advice": []}


def _change(bounds: BoundReport) -> tuple[str, Tone]:
    """How far the outputs moved, as a sentence, and its tone."""
    statistics = bounds.statistical
    units = statistics.population.partition(" (")[0]
    sample = f"{statistics.n:,} {units}"
    if statistics.perplexity is not None:
        interval, limits = statistics.perplexity, RATIOS
        bounded = interval.informative
        claim = "Perplexity is at most {} times the original's on such text"
        plain = "Perplexity is {} times the original's"
        measured, upper = (
            f"{value:.2f}" if value < 10 else f"{value:.3g}" for value in (interval.measured, interval.upper)
        )
    elif bounds.values and not bounds.constant_error:
        text = (
            f"The outputs do not vary on {sample}, so there is no telling how far they moved; give other held-out data."
        )
        return text, "weak"
    elif bounds.values:
        interval, limits = statistics.error_quantile, VALUES
        interval = replace(
            interval, measured=interval.measured / bounds.constant_error, upper=interval.upper / bounds.constant_error
        )
        bounded = math.isfinite(interval.upper)
        unit, share = units.removeprefix("held-out "), f"{100 * statistics.quantile:g} %"
        claim = f"The outputs of {share} of such {unit} move by at most {{}} of their spread"
        plain = f"The outputs of {share} move by at most {{}} of their spread"
        measured, upper = f"{100 * interval.measured:.3g} %", f"{100 * interval.upper:.3g} %"
    else:
        interval, limits = statistics.flips, FLIPS
        bounded = interval.upper < 1
        unit = units.removeprefix("held-out ")
        of = f"the other {unit}" if bounds.forgetting is not None else f"such {unit}"
        claim, plain = f"At most {{}} of {of} change their top-1", "{} change their top-1"
        measured, upper = f"{100 * interval.measured:.3g} %", f"{100 * interval.upper:.3g} %"
    tone: Tone = "good" if interval.measured <= limits[0] else "weak" if interval.measured <= limits[1] else "bad"
    if bounds.tolerances.not_a_sample:
        return f"{plain.format(measured)}, measured on {sample}; nothing is claimed beyond them.", tone
    if not bounded:
        return f"{plain.format(measured)}, measured on {sample}: too few, or too different, for a bound.", tone
    return f"{claim.format(upper)} ({_confidence(bounds)}, {sample}; measured {measured}).", tone


def _forgetting(bounds: BoundReport, after: Forgetting, others: str) -> str:
    """How many images of the forgotten classes are still recognised, and what the ``others`` lost, where one can."""
    flips, n = bounds.statistical.flips, bounds.statistical.n
    claim = f"At most {100 * (1 - after.lower):.3g} % of images of the forgotten classes are still recognised"
    still = f"{100 * (1 - after.measured):.3g} %"
    if bounds.tolerances.not_a_sample or flips.upper >= 1:
        return f"{claim} ({_confidence(bounds)}, {after.n:,} held-out images; measured {still}). {others}"
    return (
        f"{claim} and at most {100 * flips.upper:.3g} % of the other images change their top-1 ({_confidence(bounds)}, "
        f"{after.n:,} and {n:,} held-out images; measured {still} and {100 * flips.measured:.3g} %)."
    )


def _confidence(bounds: BoundReport) -> str:
    return f"{100 * (1 - bounds.statistical.alpha):.4g} % confidence"


def prune_advice(report: Mapping[str, Any], recipe: PruneRecipe, bounds: BoundReport, kind: str) -> tuple[str, ...]:
    """What to do about a pruning run that lost much, or gained no time; empty where all is well.

    ``kind`` is the model's, as in `LoadedModel.kind`.
    """
    advice = []
    _, tone = _change(bounds)
    if tone != "good":
        loss = "the outputs moved far" if bounds.values else _loss(report)
        advice.append(f"{loss}: try {' or '.join(_remedies(recipe, kind, report['data']['calibration_samples']))}")
        heal = f"modhifi heal {recipe.out or 'DIR'}{_same_data(recipe.data.source)}"
        advice.append(f"or train what is left towards the original, without labels: {heal}")
    latency, flops = report["latency"]["after"]["ratio"], report["size"]["flops"]
    if latency > FASTER and flops[1] < FASTER * flops[0]:
        text = "one sample runs no faster on this machine than before"
        advice.append(f"{text}: try --round-to 8" if recipe.method.round_to == 1 else text)
    return tuple(advice)


def _loss(report: Mapping[str, Any]) -> str:
    errors = report["errors"]
    if (before := errors.get("accuracy_before")) is not None and before > errors["accuracy_after"]:
        return f"top-1 fell by {100 * (before - errors['accuracy_after']):.3g} points"
    if (before := errors.get("perplexity_before")) is not None:
        return f"perplexity grew {errors['perplexity_after'] / before:.3g} times"
    return f"{100 * (1 - errors['agreement']):.3g} % of the predictions changed"


def _remedies(recipe: PruneRecipe, kind: str, used: int) -> list[str]:
    """The options that are likely to lose less than the run that ``used`` so many samples, the surest first."""
    remedies = []
    budget = _halfway(recipe.budget)
    if budget:
        remedies.append(budget)
    remedies += _own_data(recipe.data.source, kind)
    asked, many = recipe.data.samples or 0, MANY if kind == "image" else MANY_WINDOWS
    if kind in ("image", "text") and asked < many:
        more = f"more {'images' if kind == 'image' else 'text'} than this source has"
        remedies.append(f"more samples (--samples {many})" if used >= asked else more)
    if kind == "image" and recipe.method.sequential is None:
        remedies.append("--sequential dense")
    return remedies or ["fewer groups (--only, --exclude)"]


def _same_data(given: str | Sequence[str]) -> str:
    """The option that names the data of a run again, where it is not the default and has a name."""
    text = given if isinstance(given, str) else ",".join(given)
    return "" if text == "synthetic" or "python:" in text else f" --data {shlex.quote(text)}"


def _own_data(given: str | Sequence[str], kind: str) -> list[str]:
    """Data of one's own as a remedy, where all that was given is synthetic."""
    sources = [given] if isinstance(given, str) else given
    if all(source.startswith(("synthetic", "self")) for source in sources) and kind == "text":
        return ["text of your own (--data text:FILE)"]
    if all(source.startswith("synthetic") for source in sources) and kind == "image":
        return ["real images (--data images:DIR)"]
    return []


def heal_advice(report: Mapping[str, Any], recipe: HealRecipe, bounds: BoundReport, kind: str) -> tuple[str, ...]:
    """What to do about a healing run that left much of the change; empty where all is well, or nothing is known."""
    _, tone = _change(bounds)
    if tone == "good":
        return ()
    remedies, budget = _own_data(recipe.data.source, kind), recipe.budget
    if not report["healing"]["ended early"] and budget.steps is not None:
        remedies.append(f"more steps (--steps {2 * budget.steps})")
    elif not report["healing"]["ended early"] and budget.minutes is not None:
        remedies.append(f"more time (--minutes {2 * budget.minutes:g})")
    return (f"still far from the original: try {' or '.join(remedies)}",) if remedies else ()


def _halfway(budget: BudgetChoice) -> str:
    """The option that removes half of what was asked for; empty without a budget."""
    if budget.ratio is not None:
        return f"--ratio {budget.ratio / 2:.2g}"
    shares = {name: getattr(budget, name) for name in ("flops", "params", "kv_cache", "latency", "memory")}
    for flag, share in ((name.replace("_", "-"), share) for name, share in shares.items()):
        if share is not None and budget.parse().absolute is None:
            keep = (1 + budget.parse().keep) / 2
            return f"--{flag} {math.floor(100 * keep) / 100:g}x"
    return ""
