"""Plans by measured time against plans by FLOPs, and predicted against measured time.

    MODHIFI_DATA=DIR python eval/latency.py [--part curve|predicted|picture] [--model demo|resnet50]
                                          [--runtime eager|onnx]

One thread, timed by its own clock, so that other work on the machine counts for little. Without a part
all run; the picture is drawn from the curve's results.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from common import RESULTS, Missing, accuracy, cifar10, data_directory, reference, write_results
from matplotlib.figure import Figure

from modhifi.cache import default_directory
from modhifi.data.samples import Samples
from modhifi.data.sources import load_samples
from modhifi.models.load import load_model
from modhifi.models.loaded import LoadedModel
from modhifi.pruning.budget import Budget
from modhifi.pruning.elimination import Curve
from modhifi.pruning.layouts.base import EXACT, Rounding
from modhifi.pruning.metered import Attempt, meet
from modhifi.pruning.sensitivity import TRIAL, probed_plan
from modhifi.pruning.settings import PruneSettings
from modhifi.pruning.stages import apply_plan, choose_groups, find_structure, make_plan, measure_moments, removal_curves
from modhifi.runs.timing.machine import device_name
from modhifi.runs.timing.networks import Timer, plan_of
from modhifi.structure.groups import Structure
from modhifi.structure.plan import Plan
from modhifi.structure.sizes import Sizes, sizes_of

# By model: the batch that is timed, calibration images, test images, and the shares of the time asked for.
SETTINGS: dict[str, tuple[int, int, int, tuple[float, ...]]] = {
    "demo": (32, 1000, 2000, (0.8, 0.65, 0.5)),
    "resnet50": (16, 500, 1000, (0.5,)),
}
PLANS = 20
ROUNDING = Rounding(8, less=True)


def model_of(name: str) -> LoadedModel:
    if name == "demo":
        return reference("demo")
    return load_model(data_directory("resnet50_cifar10", "resnet50_cifar10"))


def timer_of(name: str, runtime: str) -> Timer:
    return Timer(runtime, SETTINGS[name][0], 1, cache=default_directory() / "latency")


def widths_of(plan: Plan) -> dict[str, int]:
    return {group: len(kept) for group, kept in plan.kept.items()}


def cached(samples: Samples) -> Samples:
    """The same samples, loaded once."""
    items = [samples.load(i) for i in range(len(samples))]
    return replace(samples, load=items.__getitem__)


def curve(name: str, runtime: str) -> None:
    """Accuracy at the same measured time, of plans by FLOPs, exact and rounded, and by time."""
    _, calibrate, test, shares = SETTINGS[name]
    loaded, root, timer = model_of(name), cifar10(), timer_of(name, runtime)
    calibration = cached(load_samples(f"images:{root / 'train'}", loaded, n=calibrate))
    held = cached(load_samples(f"images:{root / 'test'}", loaded, n=test))
    settings = PruneSettings()
    structure = choose_groups(find_structure(loaded), settings)
    sizes, times = sizes_of(loaded.model, structure), timer.gauge(loaded, structure, ROUNDING)
    moments = measure_moments(loaded, structure, calibration, settings.sampling)
    curves = removal_curves(loaded.model, structure, moments, settings, trial=TRIAL)
    half = Budget("macs", 0.5)
    planned = probed_plan(loaded, structure, curves, moments, calibration, half, settings)
    weights = planned.weights
    assert weights is not None
    rows: list[dict[str, Any]] = [
        {"plan": "dense", "top-1": accuracy(loaded.logits, held, 100), "FLOPs": 1.0, "time": 1.0, "spread": 0.0}
    ]
    print(rows[0], flush=True)
    kinds: tuple[tuple[str, Budget, Rounding], ...] = (
        ("time", Budget("latency", 0.5).gauged(times), ROUNDING),
        ("FLOPs, rounded", half, ROUNDING),
        ("FLOPs, widths rounded to 1", half, EXACT),
    )
    for share in shares:
        for kind, budget, rounding in kinds:
            plan_at = planner(loaded, structure, curves, weights, budget, replace(settings, rounding=rounding))
            plan, taken, attempts = meet(
                plan_at, partial(kept, budget, sizes), partial(timer.ratio, loaded, structure), share
            )
            pruned = apply_plan(loaded, structure, plan, moments, settings)
            rows.append(
                row(kind, share, loaded, pruned.model, held, sizes.macs(widths_of(plan)) / sizes.macs({}), taken)
            )
            rows[-1]["timings"] = len(attempts)
            print(rows[-1], flush=True)
            write_curve(name, runtime, rows, len(calibration), len(held))


def write_curve(name: str, runtime: str, rows: list[dict[str, Any]], calibrated: int, tested: int) -> None:
    write_results(
        f"latency_{name}_{runtime}",
        rows,
        ["plan", "asked", "time", "spread", "predicted", "timings", "FLOPs", "top-1"],
        f"""# Accuracy at a measured time: {name}, {runtime}, batch {SETTINGS[name][0]}, one thread
{device_name("cpu")}. {calibrated} unlabelled training images, {tested} test images, no training, `obs`
and least squares. `time` is the measured time over the dense model's, timed in turns, `spread` its interquartile range;
every plan is corrected by timings (at most three) until it is within 5 % of what was asked for. `predicted` is in the
plan's own measure.
Command: `python eval/latency.py --part curve --model {name} --runtime {runtime}`.""",
    )
    draw_curve(name, runtime)


def draw_curve(name: str, runtime: str) -> None:
    """Draws the rows of the results file: top-1 against measured time, a line a kind of plan."""
    path = RESULTS / f"latency_{name}_{runtime}.json"
    rows = json.loads(path.read_text())["rows"]
    dense, *others = rows
    figure = Figure(figsize=(6.4, 3.4), layout="constrained")
    axes = figure.subplots()
    for kind, colour in zip(
        dict.fromkeys(row["plan"] for row in others), ("#2f6db5", "#8a5a00", "#7a8594"), strict=False
    ):
        line = sorted((row["time"], row["top-1"]) for row in [dense, *others] if row["plan"] in (kind, "dense"))
        axes.plot(*zip(*line, strict=True), marker="o", markersize=4, color=colour, label=kind)
    axes.annotate("dense", (dense["time"], dense["top-1"]), xytext=(-4, -14), textcoords="offset points", fontsize=9)
    axes.set_xlabel(f"measured time over the dense model's ({runtime}, batch {SETTINGS[name][0]}, one CPU thread)")
    axes.set_ylabel("top-1, %")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower right", frameon=False)
    figure.savefig(path.with_suffix(".png"), dpi=110)


def kept(budget: Budget, sizes: Sizes, plan: Plan) -> float:
    return budget.size(sizes, widths_of(plan)) / budget.size(sizes, {})


def planner(
    loaded: LoadedModel,
    structure: Structure,
    curves: Mapping[str, Curve],
    weights: Mapping[str, float],
    budget: Budget,
    settings: PruneSettings,
) -> Callable[[float], Plan]:
    """Plans of a share of the budget's measure, at the same weights."""
    return lambda keep: make_plan(loaded.model, structure, curves, replace(budget, keep=keep), settings, weights)


def row(
    kind: str, share: float, loaded: LoadedModel, model: torch.nn.Module, held: Samples, flops: float, taken: Attempt
) -> dict[str, Any]:
    return {
        "plan": f"by {kind}",
        "asked": share,
        "top-1": accuracy(lambda batch: loaded.logits(batch, model), held, 100),
        "FLOPs": flops,
        "time": taken.measured,
        "spread": taken.spread,
        "predicted": taken.predicted,
    }


def predicted(name: str, runtime: str) -> None:
    """Random widths: the predicted share of the time against the measured one."""
    loaded, timer, draw = model_of(name), timer_of(name, runtime), random.Random(0)
    structure = find_structure(loaded)
    times, rows = timer.gauge(loaded, structure, ROUNDING), []
    for number in range(PLANS):
        least, widths = draw.uniform(0.15, 0.8), {}
        for group in structure.prunable:
            step = ROUNDING.step(group)
            widths[group.name] = min(group.n, max(1, round(draw.uniform(least, 1) * group.n / step)) * step)
        share = times.amount(widths) / times.amount({})
        measured, spread = timer.ratio(loaded, structure, plan_of(structure, widths))
        rows.append({"plan": number, "predicted": share, "measured": measured, "spread": spread})
        rows[-1]["error"] = share / measured - 1
        print(rows[-1], flush=True)
    errors = sorted(abs(row["error"]) for row in rows)
    write_results(
        f"latency_predicted_{name}_{runtime}",
        rows,
        ["plan", "predicted", "measured", "spread", "error"],
        f"""# Predicted against measured time: {name}, {runtime}, batch {SETTINGS[name][0]}, one thread
{device_name("cpu")}. {PLANS} plans of random widths; shares of the dense model's time.
The error is {100 * errors[PLANS // 2]:.1f} % in the median and {100 * errors[-1]:.1f} % at most;
{sum(e <= 0.1 for e in errors)} of {PLANS} plans are within 10 %.
Command: `python eval/latency.py --part predicted --model {name} --runtime {runtime}`.""",
    )


PARTS = {"curve": curve, "predicted": predicted, "picture": draw_curve}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", choices=PARTS)
    parser.add_argument("--model", choices=SETTINGS, default="demo")
    parser.add_argument("--runtime", choices=("eager", "onnx"), default="eager")
    wanted = parser.parse_args()
    torch.set_num_threads(1)
    for part in [wanted.part] if wanted.part else PARTS:
        try:
            PARTS[part](wanted.model, wanted.runtime)
        except Missing as missing:
            print(f"{part}: not run: {missing}")
