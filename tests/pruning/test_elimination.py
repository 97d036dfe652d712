from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from counting import Dispatched
from hypothesis import given, settings
from hypothesis import strategies as st
from random_readers import READERS, TINY, reader, residual

from modhifi.pruning.brain_surgeon import Elimination
from modhifi.pruning.compensations.lstsq import least_squares
from modhifi.pruning.elimination import Curve, Job, eliminate, eliminate_together
from modhifi.pruning.fidelity import singleton_fidelity
from modhifi.pruning.gram_surgeon import WIDE
from modhifi.pruning.local_error import local_error
from modhifi.pruning.readers import Reader

quick = settings(max_examples=12, deadline=None, derandomize=True)


@pytest.mark.parametrize("kind", READERS)
def test_the_price_of_a_component_is_what_least_squares_loses(kind: str):
    readers = READERS[kind](0)
    state = Elimination([readers], TINY)
    for component, cost in enumerate(state.costs()[0].tolist()):
        assert cost == pytest.approx(residual(readers, torch.tensor([component])), rel=1e-4)


@pytest.mark.parametrize("kind", READERS)
def test_removals_add_up_to_what_least_squares_loses(kind: str):
    readers = READERS[kind](7)
    state = Elimination([readers], TINY)
    removed = torch.empty(0, dtype=torch.int64)
    total = 0.0
    for number, step in enumerate(([4], [0, 3], [5]), start=1):
        alone = state.costs()[0]
        assert bool(alone[removed].isinf().all())
        if len(step) == 1:
            assert residual(readers, torch.cat([removed, torch.tensor(step)])) == pytest.approx(
                total + float(alone[step[0]]), rel=1e-4
            )
        state.remove(torch.tensor([step]))
        total = float(state.lost()[0, number])
        removed = torch.cat([removed, torch.tensor(step)])
        assert total == pytest.approx(residual(readers, removed), rel=1e-4)


@quick
@given(st.integers(0, 10_000), st.sampled_from(sorted(READERS)))
def test_curves_hold_the_error_of_every_stage(seed: int, kind: str):
    readers = READERS[kind](seed)
    curve = eliminate(readers, keep_at_least=1, ridge=TINY, steps=100)
    assert sorted(curve.order.tolist()) == sorted(set(curve.order.tolist())) and len(curve.order) == 5
    assert len(curve.cost) == 6 and curve.cost[0] == 0 and bool((curve.cost.diff() >= 0).all())
    for stage in range(1, 6):
        assert float(curve.cost[stage]) == pytest.approx(residual(readers, curve.order[:stage]), rel=1e-3, abs=1e-9)
    # what is removed counts against the whole output of the readers
    nothing = sum(
        local_error(r.weight[g], 0 * r.weight[g], r.second[g])[0] for r in readers for g in range(len(r.weight))
    )
    assert curve.energy == pytest.approx(nothing)


def test_greedy_takes_the_cheapest_every_time():
    readers = READERS["several"](3)
    curve = eliminate(readers, keep_at_least=1, ridge=TINY, steps=100)
    removed: list[int] = []
    for component in curve.order.tolist():
        prices = {c: residual(readers, torch.tensor([*removed, c])) for c in range(6) if c not in removed}
        assert prices[component] == pytest.approx(min(prices.values()), rel=1e-6)
        removed.append(component)


def test_several_at_a_time_still_cost_what_they_cost():
    readers = [reader(5, n=40, m=1)]
    curve = eliminate(readers, keep_at_least=4, ridge=TINY, steps=5)
    assert len(curve.order) == 36 and len(set(curve.order.tolist())) == 36
    for stage in (8, 16, 36):  # ends of steps
        assert float(curve.cost[stage]) == pytest.approx(residual(readers, curve.order[:stage]), rel=1e-3)


def test_wide_readers_cost_in_single_precision_what_they_cost_in_double():
    wide = [reader(2, n=WIDE // 4 + 8, m=4)]
    single, double = Elimination([wide], 1e-4, torch.float32), Elimination([wide], 1e-4)
    for step in (torch.arange(0, 60), torch.arange(60, 130)):
        torch.testing.assert_close(single.costs(), double.costs(), rtol=2e-4, atol=0)
        single.remove(step[None])
        double.remove(step[None])
        torch.testing.assert_close(single.lost(), double.lost(), rtol=1e-4, atol=0)
    ((one,),), ((two,),) = single.weights(), double.weights()
    assert float((one - two).norm()) < 1e-3 * float(two.norm())


def test_single_precision_that_fails_gives_way_to_double():
    n = WIDE + 8
    x = torch.randn(100, n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    flat = Reader(
        torch.ones(1, 1, n).double(), (x.T @ x)[None], torch.zeros(n, dtype=torch.int64), torch.arange(n)[:, None]
    )
    single = Elimination([[flat]], 1e-8, torch.float32)
    for start in range(0, n - 8, n // 3):
        single.remove(torch.arange(start, start + n // 3)[None])
    assert single.solved().tolist() == [False]
    assert bool(eliminate([flat], keep_at_least=5, ridge=1e-8, steps=3).cost.isfinite().all())


def test_a_block_that_rounding_has_spoiled_goes_next_and_raises_nothing():
    """LAPACK refuses the pivots that an LU decomposition finds in some of them."""
    state = Elimination([[reader(3, m=3)]], 1e-4)
    costs = state.costs()
    state.stacks[0].blocks[:, 2] = math.nan
    costs[0, 2] = 0
    torch.testing.assert_close(state.costs(), costs)


def test_a_given_order_is_followed():
    readers = READERS["one"](1)
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    curve = eliminate(readers, keep_at_least=2, order=order, ridge=TINY, steps=100)
    assert curve.order.tolist() == [3, 1, 5, 0]
    assert float(curve.cost[4]) == pytest.approx(residual(readers, curve.order), rel=1e-4)
    greedy = eliminate(readers, keep_at_least=2, ridge=TINY, steps=100)
    assert greedy.cost[1] <= curve.cost[1] * (1 + 1e-9)


@pytest.mark.parametrize("steps", [3, 100])
@pytest.mark.parametrize("given_order", [False, True])
def test_parts_lose_equally_many_at_every_stage(steps: int, given_order: bool):
    readers = [reader(2, n=24, m=1, groups=2)]
    labels = torch.tensor([7, 3]).repeat_interleave(12)  # any labels, not only 0 and 1
    order = torch.arange(24) if given_order else None
    curve = eliminate(readers, keep_at_least=5, order=order, partition=labels, ridge=TINY, steps=steps)
    assert len(curve.order) == 18  # 6 stay: 3 of each, as 5 cannot be shared out
    for stage in range(0, 19, 2):
        kept = torch.ones(24, dtype=torch.bool)
        kept[curve.order[:stage]] = False
        assert torch.bincount(labels[kept])[[3, 7]].tolist() == [12 - stage // 2] * 2


@pytest.mark.parametrize("kind", READERS)
@pytest.mark.parametrize("given_order", [False, True])
def test_together_each_group_loses_what_it_loses_alone(kind: str, given_order: bool):
    partition = torch.arange(6) // 2 if "conv" in kind else None
    orders = [torch.tensor(o) if given_order else None for o in ([0, 1, 2, 3, 4, 5], [5, 3, 4, 1, 0, 2])]
    jobs = [Job(READERS[kind](seed), 1, order, partition, 3) for seed, order in zip((3, 30), orders, strict=True)]
    for job, curve in zip(jobs, eliminate_together(jobs), strict=True):
        alone = eliminate(job.readers, keep_at_least=1, order=job.order, partition=partition, trial=3)
        assert curve is not None and curve.trial is not None and alone.trial is not None
        assert torch.equal(curve.order, alone.order) and len(curve.order) == (3 if partition is not None else 5)
        torch.testing.assert_close(curve.cost, alone.cost)
        for one, two in zip(curve.trial.weights, alone.trial.weights, strict=True):
            torch.testing.assert_close(one, two)


def test_wide_readers_lose_together_what_they_lose_alone_when_stale_columns_go():
    readers = [[reader(seed, n=WIDE // 2 + 20, m=2), reader(seed + 1, n=WIDE // 2 + 20, m=2, out=2)] for seed in (1, 5)]
    curves = eliminate_together([Job(r, 100, trial=150) for r in readers])
    for own, curve in zip(readers, curves, strict=True):
        assert curve is not None and curve.trial is not None
        gone = curve.order[: curve.trial.removed]
        assert float(curve.cost[curve.trial.removed]) == pytest.approx(residual(own, gone, 1e-4), rel=1e-3)
        for r, found in zip(own, curve.trial.weights, strict=True):
            kept = torch.ones(r.second.shape[-1], dtype=torch.bool)
            kept[r.columns[gone].reshape(-1)] = False
            torch.testing.assert_close(
                found[0].double(), least_squares(r.weight[0], r.second[0], kept), rtol=1e-3, atol=1e-3
            )


def test_groups_of_one_shape_lose_components_in_the_operations_of_one():
    def operations(jobs: int, steps: int, m: int = 1, n: int = 48) -> int:
        some = [Job([reader(seed, n=n, m=m)], 4) for seed in range(jobs)]
        with Dispatched() as dispatched:
            eliminate_together(some, steps=steps)
        return dispatched.count

    # what is gathered and cut for each group, before and behind all steps
    assert operations(6, 22) - operations(2, 22) == operations(6, 11) - operations(2, 11) <= 4 * 12
    for m, n, most in ((1, 48, 20), (3, 48, 26), (12, 48, 50)):  # in double, and in single precision where wide
        assert operations(2, 22, m, n) - operations(2, 11, m, n) <= 11 * most, m


def test_a_group_that_cannot_be_solved_takes_no_other_with_it():
    good, bad = reader(0), reader(1)
    bad.second.fill_(math.nan)
    found, none = eliminate_together([Job([good], 2), Job([bad], 2)])
    assert none is None and found is not None
    assert torch.equal(found.order, eliminate([good], keep_at_least=2).order)


def test_nothing_to_remove_gives_an_empty_curve():
    curve = eliminate([reader(0)], keep_at_least=6)
    assert len(curve.order) == 0 and curve.cost.tolist() == [0.0]


def test_a_dead_component_goes_first_and_for_nothing():
    r = reader(4)
    r.second[0][r.columns[2]] = 0
    r.second[0][:, r.columns[2]] = 0
    curve = eliminate([r], keep_at_least=1, ridge=1e-6)
    assert int(curve.order[0]) == 2
    assert float(curve.cost[1]) < 1e-5 * curve.energy


def test_curves_are_values():
    curve = eliminate([reader(0)], keep_at_least=3)
    assert isinstance(curve, Curve) and curve.order.dtype == torch.int64 and curve.cost.dtype == torch.float64


@pytest.mark.parametrize("kind", READERS)
@pytest.mark.parametrize("wanted", [1, 3, 6])
def test_a_trial_has_the_least_squares_weights_of_its_stop(kind: str, wanted: int):
    readers = READERS[kind](3)
    partition = torch.arange(6) // 2 if "conv" in kind else None
    curve = eliminate(readers, keep_at_least=1, partition=partition, ridge=1e-3, trial=wanted)
    assert curve.trial is not None
    removed = curve.trial.removed
    assert removed == (3 if partition is not None else min(wanted, 5))
    for r, found in zip(readers, curve.trial.weights, strict=True):
        expected = r.weight.clone()
        for part in r.parts:
            kept = torch.ones(len(part.second), dtype=torch.bool)
            kept[part.columns[torch.isin(part.components, curve.order[:removed])].reshape(-1)] = False
            expected[part.group] = least_squares(part.weight, part.second, kept, 1e-3)
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_the_fidelity_of_a_curve_is_the_best_singleton():
    readers = READERS["part of a concatenation"](3)
    (part,) = readers[0].parts
    best = singleton_fidelity(part.weight, part.second, part.columns).amax(0)
    torch.testing.assert_close(eliminate(readers, keep_at_least=1).fidelity, best)


def test_the_order_counts_errors_as_they_leave_a_norm_and_the_price_those_ahead_of_it():
    bare = reader(5, groups=2)
    scale = torch.linspace(0.1, 3, 8, dtype=torch.float64).view(2, 4)
    seen = eliminate([replace(bare, scale=scale)], keep_at_least=1, trial=3)
    scaled = eliminate([replace(bare, weight=bare.weight * scale[:, :, None])], keep_at_least=1, trial=3)
    assert torch.equal(seen.order, scaled.order)
    assert not torch.equal(seen.order, eliminate([bare], keep_at_least=1).order)
    gone = seen.order[:3]
    assert float(seen.cost[3]) == pytest.approx(residual([bare], gone, 1e-4), rel=1e-3)
    assert seen.trial is not None and scaled.trial is not None
    # the weights are those of the reader itself
    torch.testing.assert_close(seen.trial.weights[0] * scale[:, :, None].float(), scaled.trial.weights[0])
