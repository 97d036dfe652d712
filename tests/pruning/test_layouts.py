"""Widths by hand: groups of one parameter a component, or of ``unit`` each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from modhifi.errors import ModhifiError
from modhifi.pruning.allocation import allocate
from modhifi.pruning.budget import Budget
from modhifi.pruning.elimination import Curve
from modhifi.pruning.layouts import LAYOUTS
from modhifi.pruning.layouts.base import Problem, Rounding
from modhifi.pruning.layouts.greedy import greedy
from modhifi.pruning.layouts.uniform import uniform
from modhifi.structure.groups import Group, Kind
from modhifi.structure.sizes import Sizes, Term


@dataclass(frozen=True)
class Toy:
    """A group of ``n`` components of ``unit`` parameters, whose first j cost ``cost[j]``, in ``parts`` alike."""

    n: int
    unit: int = 1
    kind: Kind = "channels"
    cost: Tensor | None = None
    lowest: int = 1
    parts: int = 1


def problem(toys: Mapping[str, Toy], target: float, *, fixed: int = 0, round_to: int = 1) -> Problem:
    """The toys beside ``fixed`` parameters, of which ``target`` are to stay in all."""
    terms = tuple(Term(0, t.unit * t.n, 0, {}, 0, {name: 1.0}, t.n) for name, t in toys.items())
    costs = {name: torch.arange(t.n + 1) if t.cost is None else t.cost for name, t in toys.items()}
    return Problem(
        tuple(Group(name, t.n, (), torch.arange(t.n) % t.parts, kind=t.kind) for name, t in toys.items()),
        {name: Curve(torch.arange(t.n), costs[name].double(), 1.0) for name, t in toys.items()},
        Sizes(terms, {name: t.n for name, t in toys.items()}, fixed),
        Budget("parameters", target / (fixed + sum(t.unit * t.n for t in toys.values()))),
        {name: t.lowest for name, t in toys.items()},
        Rounding(round_to),
        None,
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("target", range(16, 61))
def test_a_single_group_is_cut_to_the_nearest_allowed_width(layout: str, target: int) -> None:
    """Of 60 components, rounded to fours: 60 is allowed as it is all of them."""
    found = LAYOUTS[layout].widths(problem({"a": Toy(60, lowest=20)}, target, round_to=4))
    assert abs(found["a"] - target) == min(abs(w - target) for w in range(20, 61, 4))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("target, width", [(970, None), (969, 1), (975, None), (980, None), (981, 2)])
def test_a_budget_may_be_missed_by_two_percent(layout: str, target: int, width: int | None) -> None:
    """Two components of 50 parameters beside 900: 950 or 1,000 can stay, 1.96 and 2.06 % off 969 and 970."""
    toy = problem({"a": Toy(2, 50)}, target, fixed=900)
    if width is None:
        with pytest.raises(ModhifiError, match=r"the nearest to .* is (0.95|1)x"):
            allocate(toy.groups, toy.curves, toy.sizes, toy.budget, layout=layout)
    else:
        plan = allocate(toy.groups, toy.curves, toy.sizes, toy.budget, layout=layout)
        assert len(plan.kept.get("a", range(2))) == width


@pytest.mark.parametrize("layout", LAYOUTS)
def test_floors_and_curves_say_how_far_a_group_may_be_cut(layout: str) -> None:
    """Of 30 components 12 stay by the floor of 0.4, or 20 as the curve has removed ten only; of 60, 24 stay."""
    toy = problem({"a": Toy(30), "b": Toy(60)}, 44)
    with pytest.raises(
        ModhifiError, match=r"every prunable group \(2\) at its least width 0.4x remains; try --params 0.4x"
    ):
        allocate(toy.groups, toy.curves, toy.sizes, Budget("parameters", 0.39), layout=layout, floor=0.4)
    short = {**toy.curves, "a": Curve(torch.arange(10), torch.arange(11).double(), 1.0)}
    plan = allocate(toy.groups, short, toy.sizes, Budget("parameters", 44 / 90), layout=layout, floor=0.4)
    assert {name: len(kept) for name, kept in plan.kept.items()} == {"a": 20, "b": 24}
    # 44 are 1.9 % more than 43.2 and 2.3 % more than 43.
    allocate(toy.groups, short, toy.sizes, Budget("parameters", 43.2 / 90), layout=layout, floor=0.4)
    with pytest.raises(ModhifiError, match="no allocation keeps only 0.478x"):
        allocate(toy.groups, short, toy.sizes, Budget("parameters", 43.0 / 90), layout=layout, floor=0.4)


# -- uniform -----------------------------------------------------------------------------------------------------------
def test_every_group_keeps_the_same_share() -> None:
    toys = {"a": Toy(10), "b": Toy(30, 7), "c": Toy(20, kind="neurons"), "d": Toy(4, kind="heads")}
    assert uniform(problem(toys, 122)) == {"a": 5, "b": 15, "c": 10, "d": 2}


def test_a_group_whose_size_is_no_multiple_of_the_rounding_keeps_all_at_most() -> None:
    assert uniform(problem({"a": Toy(11), "b": Toy(7, kind="heads")}, 17, round_to=4)) == {"a": 11, "b": 7}


def test_heads_stay_above_the_share_and_the_others_make_up_for_it() -> None:
    """One share gives 2 heads and 40 neurons, 100 in all, or 3 and 40, 130; two heads and all neurons are 120."""
    toys = {"heads": Toy(3, 30, kind="heads"), "neurons": Toy(60, kind="neurons")}
    assert uniform(problem(toys, 125)) == {"heads": 3, "neurons": 35}
    assert uniform(problem(toys, 130)) == {"heads": 3, "neurons": 40}


def test_a_miss_of_two_percent_is_left_as_it_is() -> None:
    """3 heads and 40 neurons are 130: 1.6 % and 2.4 % too many."""
    toys = {"heads": Toy(3, 30, kind="heads"), "neurons": Toy(60, kind="neurons")}
    assert uniform(problem(toys, 128)) == {"heads": 3, "neurons": 40}
    assert uniform(problem(toys, 127)) == {"heads": 3, "neurons": 37}


def test_a_share_that_is_a_whole_number_of_heads_asks_for_no_more() -> None:
    """At five sixths, 2.5 neurons become 3, and 5 heads stay 5 in spite of the bisection's rounding."""
    toys = {"heads": Toy(6, kind="heads"), "neurons": Toy(3, kind="neurons")}
    assert uniform(problem(toys, 999, fixed=991)) == {"heads": 5, "neurons": 3}


def test_a_share_does_not_depend_on_the_number_of_parts() -> None:
    assert uniform(problem({"a": Toy(12), "b": Toy(12, parts=3)}, 12)) == {"a": 6, "b": 6}


def test_channels_give_one_step_more_in_turn_and_neurons_stay_alike() -> None:
    """All at once give 12 or 16."""
    toys = {"a": Toy(4), "b": Toy(4, kind="neurons"), "c": Toy(4), "d": Toy(4)}
    assert uniform(problem(toys, 14)) == {"a": 3, "b": 4, "c": 3, "d": 4}
    # 1.6 % less is near enough to stay alike.
    assert uniform(problem({name: Toy(40) for name in "abc"}, 61)) == {"a": 20, "b": 20, "c": 20}


# -- greedy ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("steps", [1, 2, 4, 8])
@pytest.mark.parametrize("n, round_to, step", [(40, 1, 1), (40, 2, 2), (130, 1, 3)])
def test_a_block_that_costs_no_more_than_one_goes_at_once(n: int, round_to: int, step: int, steps: int) -> None:
    """Steps are a sixty-fourth of the group, and 1, 2, 4 and 8 of them are tried."""
    block = steps * step
    cost = torch.cat([torch.zeros(1), torch.ones(block), 1 + 100.0 * torch.arange(1, n - block + 1)])
    # Dearer than the block as a whole, cheaper than any smaller one.
    rival = torch.arange(n + 1) / (block - 0.4 * step)
    for names in (("a", "b"), ("b", "a")):  # the first wins no tie
        toys = {name: Toy(n, cost=cost if name == "a" else rival) for name in names}
        assert greedy(problem(toys, 2 * n - block, round_to=round_to)) == {"a": n - block, "b": n}


def test_a_width_that_is_no_multiple_of_the_step_is_first_cut_to_one() -> None:
    """11 to 8 is nearly free, and 8 to 4 dear: the step from 11 ends at 8, not at 7 and so at 4."""
    first = torch.tensor([0, 0.01, 0.01, 0.01, 90, 90, 90, 100, 200, 200, 200, 200])
    second = torch.cat([torch.zeros(1), torch.ones(4), torch.full((8,), 4.0)])
    toys = {"a": Toy(11, cost=first, lowest=4), "b": Toy(12, cost=second, lowest=4)}
    assert greedy(problem(toys, 16, round_to=4)) == {"a": 8, "b": 8}


def test_what_saves_most_for_its_cost_goes_first() -> None:
    """At equal costs a component, those of three parameters."""
    toys = {"a": Toy(20, cost=torch.arange(21) ** 2), "b": Toy(20, 3, cost=torch.arange(21) ** 2)}
    # Slopes 2 a = 2 b / 3 meet at b = 3 a: 2 of one and 6 of the other save 20.
    assert greedy(problem(toys, 60)) == {"a": 18, "b": 14}


def test_a_miss_of_the_last_step_is_made_up_for_by_other_groups() -> None:
    """Components of ten parameters go until 3 too many or too few are left."""
    toys = {"a": Toy(10, 10, cost=torch.arange(11) / 100), "b": Toy(10, cost=10.0 * torch.arange(11))}
    assert greedy(problem(toys, 97)) == {"a": 9, "b": 7}
    assert greedy(problem({**toys, "b": Toy(10, cost=toys["b"].cost, lowest=9)}, 97)) == {"a": 9, "b": 9}
    assert greedy(problem(toys, 93)) == {"a": 8, "b": 10}
    free = torch.cat([torch.zeros(6), 10.0 * torch.arange(1, 6)])
    assert greedy(problem({**toys, "b": Toy(10, cost=free)}, 88)) == {"a": 8, "b": 8}


def test_a_group_makes_up_for_a_miss_in_steps_of_its_own() -> None:
    """11 components in fours: from 11 down to 8 and 4, and from 8 up to 11, as 12 are too many."""
    toys = {"a": Toy(40, 10, cost=torch.arange(41) / 1000), "b": Toy(11, cost=10.0 * torch.arange(12))}
    assert greedy(problem(toys, 368, round_to=4)) == {"a": 36, "b": 8}
    free = torch.cat([torch.zeros(4), 10.0 * torch.arange(1, 9)])
    assert greedy(problem({**toys, "b": Toy(11, cost=free)}, 371, round_to=4)) == {"a": 36, "b": 11}
    half = torch.cat([torch.zeros(13), 10.0 * torch.arange(1, 9)])
    assert greedy(problem({**toys, "b": Toy(20, cost=half)}, 372, round_to=4)) == {"a": 36, "b": 12}


@pytest.mark.parametrize("target, widths", [(320, (5, 40, 6)), (120, (5, 20, 1))])
def test_what_a_cut_saves_is_known_anew_when_its_neighbour_was_cut(target: int, widths: tuple[int, ...]) -> None:
    """``a b + 20 c`` multiply-adds: with half of a gone, b saves half as much, and c goes first."""
    first = torch.cat([0.1 * torch.arange(6), 1000.0 * torch.arange(1, 6)])
    costs = {"a": first, "b": 1.2 * torch.arange(41), "c": 2.8 * torch.arange(11)}
    full = {name: len(cost) - 1 for name, cost in costs.items()}
    terms = (
        Term(400, 0, 0, {"a": 1.0}, 10, {"b": 1.0}, 40),
        Term(200, 0, 0, {}, 0, {"c": 1.0}, 10),
    )
    found = greedy(
        Problem(
            tuple(Group(name, n, ()) for name, n in full.items()),
            {name: Curve(torch.arange(full[name]), cost.double(), 1.0) for name, cost in costs.items()},
            Sizes(terms, full, 0),
            Budget("macs", target / 600),
            dict.fromkeys(full, 1),
            Rounding(),
            None,
        )
    )
    assert tuple(found.values()) == widths
