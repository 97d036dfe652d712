"""Budgets of time and memory, without a clock: tables of prices in its place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from modhifi.data.sources import load_samples
from modhifi.errors import ModhifiError
from modhifi.models.load import load_model
from modhifi.models.loaded import LoadedModel
from modhifi.pruning.allocation import allocate
from modhifi.pruning.budget import Budget
from modhifi.pruning.elimination import Curve
from modhifi.pruning.layouts import LAYOUTS
from modhifi.pruning.layouts.base import Rounding
from modhifi.pruning.metered import Attempt, meet
from modhifi.pruning.metered_plan import metered_plan
from modhifi.pruning.planned import Planned, Way
from modhifi.pruning.prune import prune_model
from modhifi.pruning.settings import PruneSettings
from modhifi.structure.footprint import Footprint
from modhifi.structure.groups import Structure
from modhifi.structure.plan import Plan
from modhifi.structure.sizes import Term, sizes_of
from modhifi.structure.times import OperatorTime, Times
from modhifi.structure.tracing.tracer import trace


def plan(width: float) -> Plan:
    """A plan that is its predicted share of the time."""
    return Plan({"a": tuple(range(round(100 * width)))})


def share(made: Plan) -> float:
    return len(made.kept["a"]) / 100


@pytest.mark.parametrize(
    ("slower", "measured", "taken"),
    [
        (1.0, [0.5], 0.5),  # as predicted
        (1.04, [0.52], 0.52),  # within five percent
        (1.25, [0.625, 0.5], 0.5),  # one correction is enough where the prediction is off by one factor
    ],
)
def test_a_miss_is_corrected_by_as_much(slower: float, measured: Sequence[float], taken: float) -> None:
    made, attempt, attempts = meet(plan, share, lambda p: (slower * share(p), 0.01), 0.5)
    assert [a.measured for a in attempts] == pytest.approx(measured)
    assert attempt.measured == pytest.approx(taken) and slower * share(made) == pytest.approx(taken)


def test_the_nearest_of_at_most_four_is_taken() -> None:
    # The time never falls below 0.7: every correction asks for less.
    asked: list[float] = []

    def plan_at(keep: float) -> Plan:
        asked.append(keep)
        return plan(keep)

    made, attempt, attempts = meet(plan_at, share, lambda p: (0.7 + 0.1 * share(p), 0.0), 0.5)
    assert len(attempts) == 4 and asked == sorted(asked, reverse=True)
    assert attempt == attempts[-1] and share(made) == attempt.predicted


def test_what_cannot_be_predicted_ends_the_corrections_or_the_run() -> None:
    def only_half(keep: float) -> Plan:
        if keep < 0.45:
            raise ModhifiError("out of reach")
        return plan(keep)

    made, attempt, attempts = meet(lambda keep: plan(0.5), share, lambda p: (0.8, 0.0), 0.5)
    assert (share(made), len(attempts)) == (0.5, 1)  # the same plan again would take the same time
    made, attempt, attempts = meet(only_half, share, lambda p: (0.8, 0.0), 0.5)
    assert (share(made), attempt, len(attempts)) == (0.5, Attempt(0.5, 0.8, 0.0), 1)
    with pytest.raises(ModhifiError, match="out of reach"):
        meet(only_half, share, lambda p: (0.4, 0.0), 0.4)


# -- prices ------------------------------------------------------------------------------------------------------------
def price(name: str, seconds: tuple[tuple[float, ...], ...], elements: int = 0) -> OperatorTime:
    term = Term(0, 0, 0, {f"{name} in": 1}, 8, {f"{name} out": 2}, 16, name)
    return OperatorTime(term, (2, 8), (4, 16), seconds, elements)


def test_an_operators_time_is_bilinear_and_goes_on() -> None:
    operator = price("a", ((1.0, 3.0), (2.0, 8.0)))
    points = {(2, 4): 1, (8, 16): 8, (5, 4): 1.5, (2, 10): 2, (5, 10): 3.5, (2, 22): 3, (1, 4): 1}
    for (inputs, outputs), expected in points.items():
        assert operator.at(inputs, outputs) == pytest.approx(expected)
    alone = OperatorTime(operator.term, (8,), (4, 16), ((1.0, 4.0),), 0)
    assert alone.at(3, 10) == 2.5
    by_three = replace(operator, at_once=3)
    assert [by_three.at(i, 4) for i in (1, 2, 3, 4, 6, 7, 8)] == [operator.at(i, 4) for i in (2, 2, 3, 6, 6, 8, 8)]


def test_times_add_operators_elements_and_what_is_fixed() -> None:
    full = {"a in": 8, "a out": 8}
    times = Times((price("a", ((1.0, 3.0), (2.0, 8.0)), elements=160),), full, 2.0, 0.1, 5.0)
    assert times.amount({}) == 2 * 8 + 0.1 * 160 + 5
    # two positions of each of eight components: 5 of 8 in, 10 of 16 out
    assert times.amount({"a in": 5, "a out": 5}) == pytest.approx(2 * 3.5 + 0.1 * 100 + 5)
    assert times.touching()["a in"].amount({"a in": 5, "a out": 5}) == pytest.approx(2 * 3.5 + 0.1 * 100)
    assert times.by_operator({}) == {"a": 32.0}


@pytest.mark.parametrize("true", [(1.3, 0.02, 0.5), (0.7, 0.05, 0.0), (2.0, 0.0, 0.0)])
def test_coefficients_are_found_from_whole_networks(true: tuple[float, float, float]) -> None:
    full = {"a in": 8, "a out": 8}
    times = Times((price("a", ((1.0, 3.0), (2.0, 8.0)), elements=160),), full)
    networks = []
    for widths in ({}, {"a in": 4}, {"a out": 3}, {"a in": 2, "a out": 2}):
        seconds, elements, there = times.parts(widths)
        assert there == 1
        networks.append((widths, true[0] * seconds + true[1] * elements + true[2]))
    fitted = times.fitted(networks)
    assert (fitted.scale, fitted.per_element, fitted.fixed) == pytest.approx(true, abs=1e-9)
    # what an unconstrained fit would make negative is zero
    assert times.fitted([({}, 8.0), ({"a in": 2, "a out": 2}, 0.9)]).fixed == 0


def two_layers() -> tuple[nn.Module, Structure]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 2)).eval()
    return model, trace(model, lambda m: m(torch.randn(2, 4)))


def prices(model: nn.Module, structure: Structure, dear: str) -> Times:
    """Every component of one layer's output takes ten times as long as one of another's."""
    operators = []
    for term in sizes_of(model, structure).terms:
        each = 10.0 if term.module == dear else 1.0
        grid = ((0.0, each * term.output_total),)
        operators.append(OperatorTime(term, (term.input_total,), (0, term.output_total), grid, 0))
    return Times(tuple(operators), {g.name: g.n for g in structure.prunable})


@pytest.mark.parametrize("dear", ["0", "2"])
def test_the_layer_whose_time_is_dear_gives_more(dear: str) -> None:
    model, structure = two_layers()
    line = torch.linspace(0, 1, 41, dtype=torch.float64) ** 2
    curves = {name: Curve(torch.arange(40), line, 1.0) for name in ("0", "2")}
    budget = Budget.parse(latency="0.5x").gauged(prices(model, structure, dear))
    made = allocate(structure.prunable, curves, sizes_of(model, structure), budget)
    widths = {g.name: len(made.kept.get(g.name, range(g.n))) for g in structure.prunable}
    assert widths[dear] < widths["2" if dear == "0" else "0"]
    assert budget.size(sizes_of(model, structure), widths) / budget.gauge.amount({}) == pytest.approx(0.5, rel=0.02)


@pytest.mark.parametrize(
    ("measure", "text", "expected"),
    [
        ("latency", "0.6x", (0.6, None)),
        ("latency", "12ms", (1.0, 0.012)),
        ("latency", "0.5 s", (1.0, 0.5)),
        ("memory", "0.25", (0.25, None)),
        ("memory", "300MB", (1.0, 300e6)),
        ("memory", "1.5 GiB", (1.0, 1.5 * 2**30)),
    ],
)
def test_a_latency_or_memory_is_a_share_or_an_amount(
    measure: str, text: str, expected: tuple[float, float | None]
) -> None:
    budget = Budget.parse(**{measure: text})
    assert (budget.measure, budget.keep, budget.absolute) == (measure, *expected)


@pytest.mark.parametrize(
    ("measure", "text"),
    [
        *(("latency", text) for text in ("1.2x", "0x", "-3ms", "0ms", "fast", "12 hours", "12MB")),
        *(("memory", text) for text in ("1.2x", "0MB", "300", "12ms", "300 megabytes")),
    ],
)
def test_no_other_text_is_a_latency_or_memory(measure: str, text: str) -> None:
    with pytest.raises(ModhifiError, match=f"--{measure} is the share"):
        Budget.parse(**{measure: text})


def test_the_nearest_stair_to_a_time_is_taken() -> None:
    model, structure = two_layers()
    terms = {t.module: t for t in sizes_of(model, structure).terms}
    stairs = (OperatorTime(terms["0"], (4,), (20, 40), ((1.0, 2.0),), 0, at_once=20),)
    budget = Budget("latency", 0.6).gauged(Times(stairs, {g.name: g.n for g in structure.prunable}))
    line = torch.linspace(0, 1, 41, dtype=torch.float64)
    curves = {name: Curve(torch.arange(40), line, 1.0) for name in ("0", "2")}
    made = allocate(structure.prunable, curves, sizes_of(model, structure), budget)
    assert {name: len(kept) for name, kept in made.kept.items()} == {"0": 20}  # half of the time


def test_a_time_is_a_share_of_the_dense_one() -> None:
    model, structure = two_layers()
    times = prices(model, structure, "0")  # 400 + 40 + 2 seconds
    assert Budget.parse(latency="221s").gauged(times).keep == pytest.approx(0.5)
    with pytest.raises(ModhifiError, match="already"):
        Budget.parse(latency="500s").gauged(times)


class FakeTimer:
    """Prices in place of a clock; whole networks are slower than these say by a factor."""

    def __init__(self, slower: float) -> None:
        self.slower = slower
        self.plans: list[Plan] = []

    def gauge(self, loaded: LoadedModel, structure: Structure, rounding: Rounding) -> Times:
        self.prices = prices(loaded.model, structure, "2")
        return self.prices

    def ratio(self, loaded: LoadedModel, structure: Structure, plan: Plan) -> tuple[float, float]:
        self.plans.append(plan)
        widths = {name: len(kept) for name, kept in plan.kept.items()}
        return self.slower * self.prices.amount(widths) / self.prices.amount({}), 0.01

    def by_operator(self, loaded: LoadedModel, structure: Structure, plan: Plan) -> Mapping[str, tuple[float, float]]:
        return {"2": (1.0, 0.5)}


@pytest.mark.parametrize("selector", ["obs", "magnitude"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_run_meets_the_measured_time(layout: str, selector: str) -> None:
    model, _ = two_layers()
    loaded = load_model(model, example=torch.randn(2, 4))
    inputs = torch.randn(64, 4, generator=torch.Generator().manual_seed(1))
    samples = load_samples(inputs, loaded, n=len(inputs))
    meter = FakeTimer(1.3)
    compensate = "lstsq" if selector == "obs" else "none"  # with magnitude in equal widths nothing asks for moments
    settings = PruneSettings(layout=layout, selector=selector, compensate=compensate, rows_per_column=None)
    pruned = prune_model(loaded, samples, Budget.parse(latency="0.5x"), settings, meter=meter)
    assert pruned.metered is not None and pruned.metered.met
    assert [a.measured for a in pruned.metered.attempts] == pytest.approx([0.65, 0.5], abs=0.02)
    assert pruned.plan.kept == meter.plans[-1].kept
    assert pruned.metered.by_operator == {"2": (1.0, 0.5)}
    before, after = pruned.metered.operators["2"]
    assert pruned.metered.rest == 0 and before == 400 and after == 10 * len(pruned.plan.kept["2"])


def test_of_several_ways_each_meets_the_time_before_one_is_chosen() -> None:
    model, structure = two_layers()
    loaded, meter, settings = load_model(model, example=torch.randn(2, 4)), FakeTimer(1.3), PruneSettings()
    budget = Budget("latency", 0.5).gauged(meter.gauge(loaded, structure, settings.rounding))
    line = torch.linspace(0, 1, 41, dtype=torch.float64)
    curves = {name: Curve(torch.arange(40), line, 1.0) for name in ("0", "2")}
    ways = tuple(Way(s, settings) for s in (structure, structure.select(["2"]), structure.select(["0"])))
    asked: dict[str, Plan] = {}

    def choose(plans: Mapping[str, Plan]) -> tuple[str, None]:
        asked.update(plans)
        return max(plans, key=lambda name: name), None

    metered, _, planned = metered_plan(
        loaded, structure, curves, budget, settings, Planned(Plan({}), ways=ways), meter, choose
    )
    assert [plan.kept.keys() for plan in asked.values()] == [{"0", "2"}, {"2"}]  # alone, "0" is too little
    assert planned.plan == asked["1"] and planned.ways == (ways[1],)
    assert metered.taken.measured == pytest.approx(0.5, rel=0.05)


def test_stairs_are_seen_from_afar() -> None:
    # Nothing is saved between two stairs, nor below the least one.
    model, structure = two_layers()
    terms = {t.module: t for t in sizes_of(model, structure).terms}
    stairs = (OperatorTime(terms["0"], (4,), (8, 40), ((1.0, 2.0),), 0, at_once=16),)
    budget = Budget("latency", 0.5).gauged(Times(stairs, {g.name: g.n for g in structure.prunable}))
    line = torch.linspace(0, 1, 41, dtype=torch.float64)
    curves = {name: Curve(torch.arange(40), line, 1.0) for name in ("0", "2")}
    assert {
        name: len(kept)
        for name, kept in allocate(
            structure.prunable, curves, sizes_of(model, structure), budget, floor=0.1
        ).kept.items()
    } == {"0": 8}


def footprint(model: nn.Module, structure: Structure, instants: list[list[float]]) -> Footprint:
    """Weights of four bytes, and results of both layers and of none at some instants."""
    sizes = sizes_of(model, structure)
    writers = tuple(t for t in sizes.terms if t.module in ("0", "2"))
    return Footprint(sizes, 4.0, writers, np.array(instants))


def test_memory_is_that_of_weights_and_of_the_fullest_instant() -> None:
    model, structure = two_layers()
    gauge = footprint(model, structure, [[400.0, 0.0, 10.0], [200.0, 300.0, 10.0]])
    weights = 4 * sum(p.numel() for p in model.parameters())
    assert gauge.amount({}) == weights + 510
    widths = {"0": 20, "2": 10}
    kept = 4 * sizes_of(model, structure).parameters(widths)
    assert gauge.held(widths) == pytest.approx([210, 100 + 75 + 10]) and gauge.amount(widths) == kept + 210
    assert gauge.seen(np.array([1])).held(widths) == pytest.approx([185])


def test_instants_that_are_as_full_shrink_together() -> None:
    # One layer alone lowers no peak, so that a descent by single steps would take weights only.
    model, structure = two_layers()
    gauge = footprint(model, structure, [[100_000.0, 0.0, 0.0], [0.0, 100_000.0, 0.0]])
    line = torch.linspace(0, 1, 41, dtype=torch.float64) ** 4
    curves = {name: Curve(torch.arange(40), line, 1.0) for name in ("0", "2")}
    budget = Budget.parse(memory="0.5x").gauged(gauge)
    made = allocate(structure.prunable, curves, sizes_of(model, structure), budget)
    widths = {g.name: len(made.kept.get(g.name, range(g.n))) for g in structure.prunable}
    assert gauge.amount(widths) == pytest.approx(0.5 * gauge.amount({}), rel=0.03)
    assert all(abs(width - 20) <= 1 for width in widths.values())


def test_a_memory_that_nothing_can_lower_is_refused() -> None:
    model, structure = two_layers()
    gauge = footprint(model, structure, [[0.0, 0.0, 1e6]])
    curves = {name: Curve(torch.arange(40), torch.arange(41, dtype=torch.float64), 1.0) for name in ("0", "2")}
    with pytest.raises(ModhifiError, match="of the memory"):
        allocate(structure.prunable, curves, sizes_of(model, structure), Budget.parse(memory="0.5x").gauged(gauge))
