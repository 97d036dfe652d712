from __future__ import annotations

import copy

import pytest
import tiny
import tiny_text
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from modhifi.errors import ModhifiError
from modhifi.models.load import load_model
from modhifi.pruning.allocation import allocate, plan_for
from modhifi.pruning.budget import Budget
from modhifi.pruning.elimination import Curve
from modhifi.pruning.layouts import LAYOUTS
from modhifi.pruning.layouts.base import EXACT, Rounding, least_width
from modhifi.pruning.stages import find_structure
from modhifi.structure.groups import Group, Structure
from modhifi.structure.plan import Plan
from modhifi.structure.sizes import sizes_of
from modhifi.structure.surgery import shrink
from modhifi.structure.tracing.tracer import trace


def curves_for(structure: Structure, seed: int = 0) -> dict[str, Curve]:
    """Convex costs of random scale; one component of every part in turn."""
    generator = torch.Generator().manual_seed(seed)
    curves = {}
    for group in structure.prunable:
        labels = torch.zeros(group.n, dtype=torch.int64) if group.partition is None else group.partition
        rows = [torch.nonzero(labels == label).flatten() for label in labels.unique()]
        order = torch.stack([row[torch.randperm(len(row), generator=generator)] for row in rows], 1).reshape(-1)
        cost = torch.linspace(0, 1, group.n + 1, dtype=torch.float64) ** 2
        cost = cost * float(torch.rand((), generator=generator) + 0.1)
        curves[group.name] = Curve(order[: -len(rows)], cost[: group.n - len(rows) + 1], 1.0)
    return curves


def known(name: str) -> tuple[nn.Module, torch.Tensor, Structure]:
    model, x = tiny.pattern(name) if name in tiny.PATTERNS else tiny.architecture(name)
    return model, x, trace(model, lambda model: model(x))


def widths_of(structure: Structure, plan: Plan) -> dict[str, int]:
    return {g.name: len(plan.kept.get(g.name, range(g.n))) for g in structure.prunable}


def counted(model: nn.Module, x: torch.Tensor) -> tuple[int, int]:
    """Multiply-adds per sample as torch counts them, and parameters."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x)
    return counter.get_total_flops() // 2 // len(x), sum(p.numel() for p in model.parameters())


REAL = ("resnet18", "mobilenetv3_small_100", "resnext50_32x4d", "ghostnet_100", "convnext_atto", "densenet121")


@pytest.mark.parametrize("name", [*tiny.PATTERNS, *REAL])
def test_predicted_sizes_are_those_of_the_cut_model(name: str):
    model, x, structure = known(name)
    sizes = sizes_of(model, structure)
    assert (sizes.macs({}), sizes.parameters({})) == counted(model, x)
    if not structure.prunable:
        return
    kept = {}
    for number, (group, curve) in enumerate(zip(structure.prunable, curves_for(structure).values(), strict=True)):
        stay = torch.ones(group.n, dtype=torch.bool)
        stay[curve.order[: group.step * (1 + number % 2)]] = False
        kept[group.name] = tuple(torch.nonzero(stay).flatten().tolist())
    plan = Plan({name: k for name, k in kept.items() if k})
    widths = widths_of(structure, plan)
    small = shrink(copy.deepcopy(model), structure, plan)
    macs, parameters = counted(small, x)
    if "own forward" not in name:
        assert sizes.macs(widths) == pytest.approx(macs, rel=1e-9)
    assert sizes.parameters(widths) == pytest.approx(parameters, rel=1e-9)


BUDGETS = [Budget("components", 0.5), Budget("parameters", 0.5), Budget("macs", 0.5), Budget("macs", 0.8)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("budget", BUDGETS, ids=lambda b: f"{b.measure} {b.keep}")
@pytest.mark.parametrize("name", ["resnet18", "mobilenetv3_small_100", "resnext50_32x4d"])
def test_budgets_are_met_and_plans_can_be_carried_out(name: str, budget: Budget, layout: str):
    model, x, structure = known(name)
    sizes = sizes_of(model, structure)
    plan = allocate(structure.prunable, curves_for(structure), sizes, budget, layout=layout)
    plan.check(structure)
    reached = budget.size(sizes, widths_of(structure, plan)) / budget.size(sizes, {})
    assert reached == pytest.approx(budget.keep, rel=0.02)
    for group in structure.prunable:
        assert len(plan.kept.get(group.name, range(group.n))) >= 0.1 * group.n


def two_groups() -> tuple[Structure, nn.Module]:
    model = tiny.randomise(nn.Sequential(nn.Linear(4, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 3)))
    x = torch.randn(2, 4)
    return trace(model, lambda model: model(x)), model


def test_the_cheaper_group_gives_more():
    structure, model = two_groups()
    sizes = sizes_of(model, structure)
    line = torch.linspace(0, 1, 41, dtype=torch.float64) ** 2
    curves = {"0": Curve(torch.arange(40), line, 1.0), "2": Curve(torch.arange(40), 9 * line, 1.0)}
    widths = widths_of(structure, allocate(structure.prunable, curves, sizes, Budget("components", 0.5)))
    # the costs' slopes meet where one group has lost nine times as much as the other: 36 and 4
    assert widths["0"] + widths["2"] == 40 and abs(widths["0"] - 4) <= 2
    weighted = allocate(
        structure.prunable, curves, sizes, Budget("components", 0.5), weights={"0": 9.0, "2": 1.0}, floor=0.05
    )
    assert abs(widths_of(structure, weighted)["0"] - 20) <= 2  # equal prices
    even = allocate(structure.prunable, curves, sizes, Budget("components", 0.5), layout="uniform")
    assert set(widths_of(structure, even).values()) == {20}


def test_a_cost_is_measured_against_the_energy_of_its_readers():
    structure, model = two_groups()
    line = torch.linspace(0, 1, 41, dtype=torch.float64) ** 2
    curves = {"0": Curve(torch.arange(40), line, 1.0), "2": Curve(torch.arange(40), 100 * line, 100.0)}
    plan = allocate(structure.prunable, curves, sizes_of(model, structure), Budget("components", 0.5))
    assert abs(widths_of(structure, plan)["0"] - 20) <= 2


def test_a_free_block_is_found_behind_a_dear_first_step():
    """The look-ahead: one step alone costs much, four together cost no more."""
    structure, model = two_groups()
    flat = torch.cat([torch.zeros(1), torch.full((40,), 0.5)]).double()
    steep = torch.linspace(0, 20, 41).double()
    curves = {"0": Curve(torch.arange(40), flat, 1.0), "2": Curve(torch.arange(40), steep, 1.0)}
    plan = allocate(structure.prunable, curves, sizes_of(model, structure), Budget("components", 0.6))
    assert widths_of(structure, plan) == {"0": 8, "2": 40}


def test_plans_keep_the_components_that_go_last():
    structure, _ = two_groups()
    order = torch.arange(39, -1, -1)
    curves = {name: Curve(order, torch.arange(41).double(), 1.0) for name in ("0", "2")}
    plan = plan_for(structure.prunable, curves, {"0": 3, "2": 40})
    assert plan.kept == {"0": (0, 1, 2)} and plan.removal_cost == {"0": 37.0}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rounding_and_floors(layout: str):
    model, _, structure = known("mobilenetv3_small_100")
    plan = allocate(
        structure.prunable,
        curves_for(structure),
        sizes_of(model, structure),
        Budget("macs", 0.6),
        layout=layout,
        rounding=Rounding(8),
        floor=0.25,
    )
    for group in structure.prunable:
        width = len(plan.kept.get(group.name, range(group.n)))
        assert width == group.n or width % 8 == 0
        assert width >= 0.25 * group.n
    assert plan.kept


def test_steps_and_least_widths():
    plain = Group("a", 30, ())
    parted = Group("b", 30, (), partition=torch.arange(3).repeat_interleave(10))
    heads = Group("c", 30, (), kind="heads")
    eight, less = Rounding(8), Rounding(8, less=True)
    assert [EXACT.step(g) for g in (plain, parted, heads)] == [1, 3, 1]
    assert [eight.step(g) for g in (plain, parted, heads)] == [8, 24, 1]
    # a group keeps at least two steps where the rounding may be less
    assert [less.step(Group("d", n, ())) for n in (1, 3, 7, 15, 16, 40)] == [1, 1, 2, 4, 8, 8]
    assert [eight.half(), less.half(), Rounding(1, less=True).half()] == [None, Rounding(4, less=True), None]
    floors = ((plain, 0.0, EXACT, 1), (plain, 0.1, EXACT, 3), (plain, 0.1, eight, 8), (plain, 0.9, eight, 30))
    for group, floor, rounding, least in (*floors, (parted, 0.11, EXACT, 6)):
        assert least_width(group, floor, rounding) == least


def test_a_rounding_that_may_be_less_meets_the_budget():
    structure, model = two_groups()
    curves = {name: Curve(torch.arange(40), torch.arange(41).double(), 1.0) for name in ("0", "2")}
    problem = structure.prunable, curves, sizes_of(model, structure), Budget("components", 0.65)
    with pytest.raises(ModhifiError, match="--round-to 1"):
        allocate(*problem, rounding=Rounding(16))
    widths = widths_of(structure, allocate(*problem, rounding=Rounding(16, less=True)))
    assert sum(widths.values()) == 52 and all(width % 4 == 0 for width in widths.values())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_parts_stay_equal(layout: str):
    model, _, structure = known("resnext50_32x4d")
    plan = allocate(
        structure.prunable, curves_for(structure), sizes_of(model, structure), Budget("components", 0.4), layout=layout
    )
    parted = [g for g in structure.prunable if g.partition is not None and g.name in plan.kept]
    assert parted
    for group in parted:
        counts = torch.bincount(group.partition[list(plan.kept[group.name])])
        assert len(counts) == group.step and len(set(counts.tolist())) == 1


def test_budgets_out_of_reach_are_errors():
    model, _, structure = known("layer norm")
    curves, sizes = curves_for(structure), sizes_of(model, structure)
    with pytest.raises(ModhifiError, match=r"no allocation keeps only 0\.1x of the parameters"):
        allocate(structure.prunable, curves, sizes, Budget("parameters", 0.1))
    with pytest.raises(ModhifiError, match=r"no allocation keeps only 0\.3x of the components"):
        allocate(structure.prunable, curves, sizes, Budget("components", 0.3), floor=0.5)
    with pytest.raises(ModhifiError, match="remains; try --.*, a lower --floor, or widths rounded less"):
        allocate(structure.prunable, curves, sizes, Budget("components", 0.3), rounding=Rounding(10))
    with pytest.raises(ModhifiError, match=r"the nearest to 0\.55x of the components .* is 0\.[56]x"):
        allocate(structure.prunable, curves, sizes, Budget("components", 0.55))  # ten components cannot do that
    with pytest.raises(ModhifiError, match="unknown layout 'spiral'"):
        allocate(structure.prunable, curves, sizes, Budget("components", 0.5), layout="spiral")


@pytest.mark.parametrize(
    "options, budget",
    [
        (dict(ratio=0.3), Budget("components", 0.7)),
        (dict(params="0.5x"), Budget("parameters", 0.5)),
        (dict(flops=" .25 x"), Budget("macs", 0.25)),
        (dict(flops="0.75"), Budget("macs", 0.75)),
        (dict(kv_cache="0.67x"), Budget("cache", 0.67)),
    ],
)
def test_budgets_from_options(options: dict, budget: Budget):
    assert Budget.parse(**options) == budget


@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(ratio=0.5, flops="0.5x"),
        dict(ratio=0.0),
        dict(ratio=1.0),
        dict(ratio=-1.0),
        dict(ratio=float("nan")),
        dict(params="abc"),
        dict(params="0x"),
        dict(flops="1x"),
        dict(flops="-0.5x"),
        dict(flops="50%"),
        dict(kv_cache="1x"),
    ],
)
def test_bad_budgets(options: dict):
    with pytest.raises(ModhifiError, match="exactly one|--(ratio|params|flops|kv-cache) is the share"):
        Budget.parse(**options)


def test_heads_are_rounded_up_in_uniform_layout_and_neurons_make_up_for_it():
    loaded = load_model(tiny_text.llama(hidden_size=24, num_attention_heads=6, num_key_value_heads=3, head_dim=4))
    structure = find_structure(loaded)
    sizes, budget = sizes_of(loaded.model, structure), Budget("components", 0.8)
    plan = allocate(structure.prunable, curves_for(structure), sizes, budget, layout="uniform")
    kept = {
        g.kind: {len(plan.kept.get(h.name, range(h.n))) for h in structure.prunable if h.kind == g.kind}
        for g in structure.prunable
    }
    assert kept["heads"] == {3} and len(kept["neurons"]) == 1
    reached = sizes.components(widths_of(structure, plan)) / sizes.components({})
    assert reached == pytest.approx(0.8, rel=0.02)
