from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from modhifi.bounds.ladder import BoundReport
from modhifi.bounds.statistical import Forgetting, Interval, Statistical
from modhifi.bounds.verdicts import Tolerances, Verdict
from modhifi.runs.recipes.heal import HealRecipe
from modhifi.runs.recipes.prune import PruneRecipe
from modhifi.runs.reports.outcome import add_outcome, heal_advice, prune_advice


def interval(measured: float, upper: float, informative: bool = True) -> Interval:
    return Interval(measured, 0.0, upper, "method", informative)


def bounds_of(flips: Interval, perplexity: Interval | None = None, **more: Any) -> BoundReport:
    population = more.pop("population", "held-out images")
    statistics = Statistical(1000, 0.05, flips, flips, flips, population, perplexity)
    return replace(BoundReport((), (), None, 1.0, (), statistics, Tolerances(), ()), **more)


def outcome(bounds: BoundReport, *advice: str) -> dict[str, Any]:
    report: dict[str, Any] = {}
    add_outcome(report, bounds, advice)
    return dict(report["outcome"])


def test_the_sentence_states_bound_confidence_sample_and_measurement() -> None:
    assert outcome(bounds_of(interval(0.081, 0.097)), "do this") == {
        "tone": "weak",
        "text": "At most 9.7 % of such images change their top-1 (95 % confidence, 1,000 held-out images; "
        "measured 8.1 %).",
        "advice": ["do this"],
    }
    synthetic = bounds_of(interval(0.01, 0.02), population="synthetic images (it speaks of synthetic images only)")
    assert outcome(synthetic)["text"] == (
        "At most 2 % of such synthetic images change their top-1 (95 % confidence, 1,000 synthetic images; "
        "measured 1 %)."
    )


def test_a_language_model_is_judged_by_its_perplexity() -> None:
    bounds = bounds_of(interval(0.3, 0.4), interval(1.031, 1.062), population="held-out sequences")
    assert outcome(bounds) == {
        "tone": "good",
        "text": "Perplexity is at most 1.06 times the original's on such text (95 % confidence, 1,000 held-out "
        "sequences; measured 1.03).",
        "advice": [],
    }


def test_features_have_no_top_one() -> None:
    far = replace(bounds_of(interval(0.9, 1.0)), values=True, constant_error=4.0)
    far = replace(far, statistical=replace(far.statistical, error_quantile=interval(0.5, 0.8)))
    assert outcome(far) == {
        "tone": "weak",
        "text": "The outputs of 95 % of such images move by at most 20 % of their spread (95 % confidence, 1,000 "
        "held-out images; measured 12.5 %).",
        "advice": [],
    }


def test_nothing_is_claimed_where_nothing_holds_beyond_the_sample() -> None:
    few = bounds_of(interval(0.2, 1.0))
    assert outcome(few)["text"].startswith("20 % change their top-1, measured on 1,000 held-out images: too few")
    text = outcome(bounds_of(interval(0.3, 0.4), interval(1.4, 2.7, informative=False)))["text"]
    assert text.startswith("Perplexity is 1.40 times the original's, measured on")
    chosen = bounds_of(interval(0.02, 0.03), tolerances=Tolerances(not_a_sample=True))
    assert outcome(chosen)["text"] == (
        "2 % change their top-1, measured on 1,000 held-out images; nothing is claimed beyond them."
    )


@pytest.mark.parametrize(
    ("measured", "verdict", "tone"),
    [
        (0.05, "PASS-STATISTICAL", "good"),
        (0.15, "PASS-STATISTICAL", "weak"),
        (0.151, "PASS-STATISTICAL", "bad"),
        (0.01, "INCONCLUSIVE", "weak"),
        (0.2, "INCONCLUSIVE", "bad"),
        (0.01, "FAIL", "bad"),
        (0.01, "BUG", "bad"),
    ],
)
def test_the_tone_follows_the_measurement_and_what_was_asked_for(measured: float, verdict: str, tone: str) -> None:
    bounds = bounds_of(interval(measured, 0.5), verdicts=(Verdict("max flip", verdict, ""),))
    assert outcome(bounds)["tone"] == tone


def test_forgetting_comes_before_what_the_others_lost() -> None:
    after = Forgetting(n=200, still_predicted=2, measured=0.99, lower=0.97, upper=0.999, alpha=0.05)
    text = outcome(bounds_of(interval(0.01, 0.02), forgetting={"original": after, "edited": after}))["text"]
    assert text == (
        "At most 3 % of images of the forgotten classes are still recognised and at most 2 % of the other images "
        "change their top-1 (95 % confidence, 200 and 1,000 held-out images; measured 1 % and 1 %)."
    )
    few = outcome(bounds_of(interval(0.01, 1.0), forgetting={"original": after, "edited": after}))["text"]
    assert few.startswith("At most 3 % of images of the forgotten classes are still recognised (95 % confidence, 200")
    assert few.endswith("too few, or too different, for a bound.")


ROSE = 0.15
HEAL = "or train what is left towards the original, without labels: modhifi heal DIR"


def advice(
    content: dict[str, Any], flips: float, kind: str = "image", latency: float = 0.5, used: int = 10_000
) -> tuple[str, ...]:
    recipe = PruneRecipe.model_validate({"model": {"name": "demo:resnet"}, **content})
    report = {
        "data": {"calibration_samples": used},
        "errors": {"accuracy_before": 0.9, "accuracy_after": 0.82, "agreement": 1 - flips},
        "latency": {"after": {"ratio": latency}},
        "size": {"flops": [100, 50]},
    }
    if flips == ROSE:
        report["errors"] |= {"accuracy_after": 0.95}
    if kind == "text":
        report["errors"] = {"perplexity_before": 10.0, "perplexity_after": 13.0, "agreement": 1 - flips}
    return prune_advice(report, recipe, bounds_of(interval(flips, 0.5)), kind)


def test_a_healed_model_that_is_still_far_gets_data_of_its_own_and_more_time() -> None:
    def advice_on(flips: float, early: bool = False, **given: Any) -> tuple[str, ...]:
        recipe = HealRecipe.model_validate({"directory": "DIR", **given})
        report = {"healing": {"ended early": early}}
        return heal_advice(report, recipe, bounds_of(interval(flips, 0.5)), "image")

    assert advice_on(0.02, budget={"minutes": 10}) == ()
    assert advice_on(0.2, budget={"minutes": 10}) == (
        "still far from the original: try real images (--data images:DIR) or more time (--minutes 20)",
    )
    images = {"data": {"source": "images:DIR"}, "budget": {"steps": 300}}
    assert advice_on(0.2, **images) == ("still far from the original: try more steps (--steps 600)",)
    assert advice_on(0.2, early=True, **images) == ()


def test_advice_names_the_options_that_lose_less() -> None:
    assert advice({"budget": {"flops": "0.5x"}}, 0.02) == ()
    assert advice({"budget": {"flops": "0.5x"}, "method": {"sequential": None}}, 0.1) == (
        "top-1 fell by 8 points: try --flops 0.75x or real images (--data images:DIR) or more samples "
        "(--samples 1000) or --sequential dense",
        HEAL,
    )
    content = {
        "budget": {"ratio": 0.3},
        "data": {"source": "self", "samples": 64},
        "method": {"sequential": "dense"},
    }
    assert advice(content, 0.3, "text") == (
        "perplexity grew 1.3 times: try --ratio 0.15 or text of your own (--data text:FILE)",
        f"{HEAL} --data self",
    )
    assert advice({"budget": {"latency": "0.5x"}}, 0.1)[0].startswith("top-1 fell by 8 points: try --latency 0.75x or")
    assert "--latency" not in advice({"budget": {"latency": "9ms"}}, 0.1)[0]
    few = {"data": {"source": "images:x", "samples": 256}, "method": {"sequential": "own", "eta": 0.9}}
    assert advice(few, 0.1)[0].endswith("try more samples (--samples 1000)")
    assert advice(few, 0.1, used=250)[0].endswith("try more images than this source has")
    assert advice(few, ROSE)[0].startswith("15 % of the predictions changed: try")
    settled = {
        "method": {"eta": 0.9, "sequential": "own"},
        "data": {"source": "images:x", "samples": 5000},
    }
    assert advice(settled, 0.3) == (
        "top-1 fell by 8 points: try fewer groups (--only, --exclude)",
        f"{HEAL} --data images:x",
    )
    assert advice({**settled, "out": "small"}, 0.3)[1].endswith(": modhifi heal small --data images:x")


@pytest.mark.parametrize(
    ("source", "option"),
    [
        ("synthetic", ""),
        ("python:Tensor", ""),
        (["python:Tensor@0.5", "images:x@0.5"], ""),
        ("images:my photos", " --data 'images:my photos'"),
        (["self", "text:a.txt@0.2"], " --data self,text:a.txt@0.2"),
    ],
)
def test_advice_to_heal_names_the_data_of_the_cut(source: str | list[str], option: str) -> None:
    assert advice({"data": {"source": source}}, 0.3)[1] == HEAL + option


def test_advice_says_where_no_time_was_gained() -> None:
    (text,) = advice({"budget": {"flops": "0.5x"}, "method": {"round_to": 1}}, 0.01, latency=0.99)
    assert text == "one sample runs no faster on this machine than before: try --round-to 8"
    (text,) = advice({"budget": {"flops": "0.5x"}, "method": {"round_to": 8}}, 0.01, latency=1.2)
    assert text == "one sample runs no faster on this machine than before"
