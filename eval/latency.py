"""Plans by measured time against plans by FLOPs, and predicted against measured time.

    MODHIFI_DATA=DIR python eval/latency.py [--part curve|predicted|picture] [--model demo|resnet|swin|resnet50]
                                          [--runtime eager|onnx] [--batch N]

One thread, timed by its own clock, so that other work on the machine counts for little. Without a part
all run; the picture is drawn from the curve's results. Rows that the results file has are not measured again.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from common import RESULTS, Missing, accuracy, cifar10, data_directory, reference, write_results
from matplotlib.figure import Figure

from modhifi.cache import default_directory
from modhifi.calibration.moments import Moments
from modhifi.data.samples import Samples
from modhifi.data.sources import load_samples
from modhifi.models.load import load_model
from modhifi.models.loaded import LoadedModel
from modhifi.pruning.budget import Budget
from modhifi.pruning.curves import removal_curves
from modhifi.pruning.depth_order import depth_curves
from modhifi.pruning.elimination import Curve
from modhifi.pruning.layouts.base import EXACT, Rounding
from modhifi.pruning.metered import Attempt, meet
from modhifi.pruning.sensitivity import TRIAL, least_change, probed_plan
from modhifi.pruning.settings import PruneSettings
from modhifi.pruning.stages import apply_plan, choose_groups, find_structure, make_plan, measure_moments
from modhifi.runs.timing.machine import device_name
from modhifi.runs.timing.networks import Timer, plan_of
from modhifi.structure.groups import Structure
from modhifi.structure.plan import Plan
from modhifi.structure.sizes import Sizes, sizes_of


@dataclass(frozen=True)
class Case:
    """The batch that is timed, the amounts of images, the shares of the time asked for, and how the model is pruned."""

    batch: int
    calibration: int
    test: int
    shares: tuple[float, ...]
    depth: bool = True
    sequential: str | None = "dense"


CASES = {
    "demo": Case(32, 1000, 2000, (0.8, 0.65, 0.5)),
    "resnet": Case(32, 1000, 2000, (0.8, 0.65, 0.5)),
    "swin": Case(32, 1000, 2000, (0.8, 0.65, 0.5), sequential=None),
    "resnet50": Case(16, 1000, 5000, (0.5,), depth=False),
}
PLANS = 20
ROUNDING = Rounding(8, less=True)
TIME, DEPTH, ROUNDED, EXACTLY = "time", "time, blocks too", "FLOPs, rounded", "FLOPs, widths rounded to 1"
KINDS = {TIME: "#2f6db5", DEPTH: "#3d8a4f", ROUNDED: "#8a5a00", EXACTLY: "#7a8594"}
COLUMNS = ["plan", "asked", "time", "spread", "predicted", "timings", "FLOPs", "top-1"]


def model_of(name: str) -> LoadedModel:
    if name == "resnet50":
        return load_model(data_directory("resnet50_cifar10", "resnet50_cifar10"))
    return reference(name)


def timer_of(name: str, runtime: str, batch: int | None) -> Timer:
    return Timer(runtime, batch or CASES[name].batch, 1, cache=default_directory() / "latency")


def widths_of(plan: Plan) -> dict[str, int]:
    return {group: len(kept) for group, kept in plan.kept.items()}


def cached(samples: Samples) -> Samples:
    """The same samples, loaded once."""
    items = [samples.load(i) for i in range(len(samples))]
    return replace(samples, load=items.__getitem__)


class Bench:
    """A model with what its plans are made of, each made when a row first asks."""

    def __init__(self, name: str, runtime: str, batch: int | None) -> None:
        self.case, self.loaded, self.timer = CASES[name], model_of(name), timer_of(name, runtime, batch)
        root = cifar10()
        self.calibration = cached(load_samples(f"images:{root / 'train'}", self.loaded, n=self.case.calibration))
        self.held = cached(load_samples(f"images:{root / 'test'}", self.loaded, n=self.case.test))
        self.settings = PruneSettings(sequential=self.case.sequential)
        self.structure = choose_groups(find_structure(self.loaded), self.settings)
        self.known: dict[tuple[str, float], tuple[Structure, Plan, Attempt, int]] = {}

    @cached_property
    def sizes(self) -> Sizes:
        return sizes_of(self.loaded.model, self.structure)

    @cached_property
    def moments(self) -> dict[str, Moments]:
        return measure_moments(self.loaded, self.structure, self.calibration, self.settings.sampling)

    @cached_property
    def curves(self) -> dict[str, Curve]:
        return removal_curves(self.loaded.model, self.structure, self.moments, self.settings, trial=TRIAL)

    @cached_property
    def weights(self) -> Mapping[str, float]:
        half = Budget("macs", 0.5)
        planned = probed_plan(
            self.loaded, self.structure, self.curves, self.moments, self.calibration, half, self.settings
        )
        assert planned.weights is not None
        return planned.weights

    @cached_property
    def deep(self) -> tuple[Structure, dict[str, Curve], dict[str, float]]:
        """The structure with whole blocks, and the curves and weights of all its groups."""
        kinds = tuple({group.kind for group in self.structure.prunable})
        settings = replace(self.settings, only=(*kinds, "blocks"))
        structure = choose_groups(find_structure(self.loaded, on_request=True), settings)
        added = depth_curves(self.loaded, structure, self.calibration, Budget("macs", 0.5), settings, measured=True)
        return structure, {**self.curves, **added}, {**self.weights, **dict.fromkeys(added, 1.0)}

    @cached_property
    def times(self) -> dict[str, Budget]:
        """Budgets of half the time, without blocks and, where the case has them, with them."""
        structures = {TIME: self.structure} | ({DEPTH: self.deep[0]} if self.case.depth else {})
        half = Budget("latency", 0.5)
        return {k: half.gauged(self.timer.gauge(self.loaded, s, ROUNDING)) for k, s in structures.items()}

    def met(self, kind: str, share: float) -> tuple[Structure, Plan, Attempt, int]:
        """A plan of one kind at a share of the time, what it takes, and how many were timed."""
        structure, curves, weights = self.deep if kind == DEPTH else (self.structure, self.curves, self.weights)
        rounding = EXACT if kind == EXACTLY else ROUNDING
        budget = Budget("macs", 0.5)
        if kind in (TIME, DEPTH):
            budget = self.times[kind]
        order = {g.name: curves[g.name].order.tolist() for g in structure.prunable if g.parts}
        sizes = sizes_of(self.loaded.model, structure).ordered(order)
        settings = replace(self.settings, rounding=rounding)
        plan, taken, attempts = meet(
            planner(self.loaded, structure, curves, weights, budget, settings),
            partial(kept, budget.ordered(order), sizes),
            partial(self.timer.ratio, self.loaded, structure),
            share,
        )
        return structure, plan, taken, len(attempts)

    def taken(self, kind: str, share: float) -> tuple[Structure, Plan, Attempt, int]:
        """The plan of a kind; where blocks may go, that without them if it changes the output less."""
        kinds = (DEPTH, TIME) if kind == DEPTH else (kind,)
        for name in kinds:
            if (name, share) not in self.known:
                self.known[name, share] = self.met(name, share)
        if kind == DEPTH:
            plans = {name: self.known[name, share][1] for name in kinds}
            kind, _ = least_change(self.loaded, self.deep[0], plans, self.moments, self.calibration, self.settings)
        return self.known[kind, share]

    def row(self, kind: str, share: float) -> dict[str, Any]:
        structure, plan, taken, timings = self.taken(kind, share)
        model = apply_plan(self.loaded, structure, plan, self.moments, self.settings, self.calibration).model
        ordered = {g.name: self.deep[1][g.name].order.tolist() for g in structure.prunable if g.parts}
        sizes = sizes_of(self.loaded.model, structure).ordered(ordered)
        return {
            "plan": f"by {kind}",
            "asked": share,
            "top-1": accuracy(lambda batch: self.loaded.logits(batch, model), self.held, 100),
            "FLOPs": sizes.macs(widths_of(plan)) / sizes.macs({}),
            "time": taken.measured,
            "spread": taken.spread,
            "predicted": taken.predicted,
            "timings": timings,
        }

    def dense(self) -> dict[str, Any]:
        top = accuracy(self.loaded.logits, self.held, 100)
        return {"plan": "dense", "top-1": top, "FLOPs": 1.0, "time": 1.0, "spread": 0.0}


def result_of(name: str, runtime: str, batch: int | None) -> str:
    return f"latency_{name}_{runtime}" + ("" if batch in (None, CASES[name].batch) else f"_batch{batch}")


def curve(name: str, runtime: str, batch: int | None) -> None:
    """Accuracy at the same measured time, of plans by FLOPs, exact and rounded, and by time, with blocks or without."""
    case, result = CASES[name], result_of(name, runtime, batch)
    kinds = [kind for kind in KINDS if case.depth or kind != DEPTH]
    settings = {**vars(case), "shares": list(case.shares), "batch": batch or case.batch}
    earlier = json.loads(path.read_text()) if (path := RESULTS / f"{result}.json").is_file() else {}
    rows: list[dict[str, Any]] = earlier["rows"] if earlier.get("settings") == settings else []
    done = {(row["plan"], row.get("asked")) for row in rows}
    missing = [(kind, share) for share in case.shares for kind in kinds if (f"by {kind}", share) not in done]
    bench = Bench(name, runtime, batch) if missing else None
    for kind, share in missing:
        assert bench is not None
        if not rows:
            rows.append(bench.dense())
        rows.append(bench.row(kind, share))
        print(rows[-1], flush=True)
        how = "towards the dense outputs, reader after reader" if case.sequential else "in one shot"
        write_results(
            result,
            rows,
            COLUMNS,
            f"""# Accuracy at a measured time: {name}, {runtime}, batch {batch or case.batch}, one thread
{device_name("cpu")}. {case.calibration} unlabelled training images, {case.test} test images, no training, `obs`
and least squares {how}. `time` is the measured time over the dense model's, timed in turns,
`spread` its interquartile range; every plan is corrected by timings (at most three) until it is within 5 % of what was
asked for. `predicted` is in the plan's own measure.
Command: `python eval/latency.py --part curve --model {name} --runtime {runtime} --batch {batch or case.batch}`.""",
            settings=settings,
        )
        draw_curve(name, runtime, batch)


def draw_curve(name: str, runtime: str, batch: int | None) -> None:
    """Draws the rows of the results file: top-1 against measured time, a line a kind of plan."""
    path = RESULTS / f"{result_of(name, runtime, batch)}.json"
    dense, *others = json.loads(path.read_text())["rows"]
    figure = Figure(figsize=(6.4, 3.4), layout="constrained")
    axes = figure.subplots()
    for kind, colour in KINDS.items():
        points = sorted((row["time"], row["top-1"]) for row in others if row["plan"] == f"by {kind}")
        if points:
            line = [*points, (dense["time"], dense["top-1"])]
            axes.plot(*zip(*line, strict=True), marker="o", markersize=4, color=colour, label=f"by {kind}")
    axes.annotate("dense", (dense["time"], dense["top-1"]), xytext=(-4, -14), textcoords="offset points", fontsize=9)
    timed = f"{runtime}, batch {batch or CASES[name].batch}, one CPU thread"
    axes.set_xlabel(f"measured time over the dense model's ({timed})")
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


def predicted(name: str, runtime: str, batch: int | None) -> None:
    """Random widths: the predicted share of the time against the measured one."""
    loaded, timer, draw = model_of(name), timer_of(name, runtime, batch), random.Random(0)
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
        result_of(name, runtime, batch).replace("latency", "latency_predicted"),
        rows,
        ["plan", "predicted", "measured", "spread", "error"],
        f"""# Predicted against measured time: {name}, {runtime}, batch {batch or CASES[name].batch}, one thread
{device_name("cpu")}. {PLANS} plans of random widths; shares of the dense model's time.
The error is {100 * errors[PLANS // 2]:.1f} % in the median and {100 * errors[-1]:.1f} % at most;
{sum(e <= 0.1 for e in errors)} of {PLANS} plans are within 10 %.
Command: `python eval/latency.py --part predicted --model {name} --runtime {runtime}`.""",
    )


PARTS = {"curve": curve, "predicted": predicted, "picture": draw_curve}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", choices=PARTS)
    parser.add_argument("--model", choices=CASES, default="demo")
    parser.add_argument("--runtime", choices=("eager", "onnx"), default="eager")
    parser.add_argument("--batch", type=int, help="by default what the case has")
    wanted = parser.parse_args()
    torch.set_num_threads(1)
    for part in [wanted.part] if wanted.part else PARTS:
        try:
            PARTS[part](wanted.model, wanted.runtime, wanted.batch)
        except Missing as missing:
            print(f"{part}: not run: {missing}")
