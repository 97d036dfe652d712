from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from modhifi.errors import IndefiniteError, ModhifiError
from modhifi.pruning.compensation import least_squares
from modhifi.pruning.elimination import WIDE, Curve, Elimination, eliminate
from modhifi.pruning.fidelity import energy_score, singleton_fidelity, subset_fidelity, top_hifi, wanda_score
from modhifi.pruning.linalg import damped_inverse
from modhifi.pruning.readers import Reader
from modhifi.pruning.selectors import hifi_union, naive_rank, removal_order

quick = settings(max_examples=12, deadline=None, derandomize=True)
TINY = 1e-10  # a ridge that leaves least squares as good as exact


def reader(seed: int, n: int = 6, m: int = 2, out: int = 4, groups: int = 1, spare: int = 0) -> Reader:
    """A reader with a random positive definite S; components are dealt out to the conv groups in blocks."""
    generator = torch.Generator().manual_seed(seed)
    d = n // groups * m + spare
    second = []
    for _ in range(groups):
        x = torch.randn(4 * d, d, generator=generator, dtype=torch.float64)
        x = x @ torch.randn(d, d, generator=generator, dtype=torch.float64)
        second.append(x.T @ x / len(x))
    weight = torch.randn(groups, out, d, generator=generator, dtype=torch.float64)
    columns = torch.cat([torch.randperm(d, generator=generator)[: n // groups * m].view(-1, m) for _ in range(groups)])
    owner = torch.arange(groups).repeat_interleave(n // groups)
    return Reader(weight, torch.stack(second), owner, columns)


def local_error(weight: Tensor, edited: Tensor, second: Tensor) -> float:
    return float(((weight - edited) @ second @ (weight - edited).T).trace())


def residual(readers: list[Reader], removed: Tensor, ridge: float = TINY) -> float:
    """Squared error of the best readers without some components, each solved from scratch."""
    total = 0.0
    for r in readers:
        for weight, second, mine, columns in r.parts():
            kept = torch.ones(second.shape[0], dtype=torch.bool)
            kept[columns[torch.isin(mine, removed)].reshape(-1)] = False
            total += local_error(weight, least_squares(weight, second, kept, ridge), second)
    return total


READERS = {
    "one": lambda seed: [reader(seed)],
    "several": lambda seed: [reader(seed, m=1), reader(seed + 1, m=3, out=2)],
    "conv groups": lambda seed: [reader(seed, groups=2)],
    "conv groups beside a plain one": lambda seed: [reader(seed, m=1), reader(seed + 1, groups=3)],
    "part of a concatenation": lambda seed: [reader(seed, spare=5)],
}


@pytest.mark.parametrize("kind", READERS)
def test_the_price_of_a_component_is_what_least_squares_loses(kind: str):
    readers = READERS[kind](0)
    state = Elimination(readers, TINY)
    for component, cost in enumerate(state.costs().tolist()):
        assert cost == pytest.approx(residual(readers, torch.tensor([component])), rel=1e-4)


@pytest.mark.parametrize("kind", READERS)
def test_removals_add_up_to_what_least_squares_loses(kind: str):
    readers = READERS[kind](7)
    state = Elimination(readers, TINY)
    removed = torch.empty(0, dtype=torch.int64)
    total = 0.0
    for step in ([4], [0, 3], [5]):
        alone = state.costs()
        assert bool(alone[removed].isinf().all())
        if len(step) == 1:
            assert residual(readers, torch.cat([removed, torch.tensor(step)])) == pytest.approx(
                total + float(alone[step[0]]), rel=1e-4
            )
        total += state.remove(torch.tensor(step))
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
    nothing = sum(local_error(r.weight[g], 0 * r.weight[g], r.second[g]) for r in readers for g in range(len(r.weight)))
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
    single, double = Elimination(wide, 1e-4, torch.float32), Elimination(wide, 1e-4)
    for step in (torch.arange(0, 60), torch.arange(60, 130)):
        torch.testing.assert_close(single.costs(), double.costs(), rtol=1e-4, atol=0)
        assert single.remove(step) == pytest.approx(double.remove(step), rel=1e-4)
    (one,), (two,) = single.weights(), double.weights()
    assert float((one - two).norm()) < 1e-3 * float(two.norm())


def test_single_precision_that_fails_gives_way_to_double():
    n = WIDE + 8
    x = torch.randn(100, n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    flat = Reader(
        torch.ones(1, 1, n).double(), (x.T @ x)[None], torch.zeros(n, dtype=torch.int64), torch.arange(n)[:, None]
    )
    single = Elimination([flat], 1e-8, torch.float32)
    with pytest.raises(IndefiniteError):
        for start in range(0, n - 8, n // 3):
            single.remove(torch.arange(start, start + n // 3))
    assert bool(eliminate([flat], keep_at_least=5, ridge=1e-8, steps=3).cost.isfinite().all())


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


def test_the_ridge_of_a_broken_gram_grows_and_gives_up():
    second = torch.eye(3).double()
    second[0, 0] = -1e-3
    assert torch.isfinite(damped_inverse(second, 1e-4)).all()
    with pytest.raises(ModhifiError, match="use more calibration samples"):
        damped_inverse(-torch.eye(3).double(), 1e-4)


def parts(r: Reader) -> tuple[Tensor, Tensor, Tensor]:
    return r.weight[0], r.second[0], r.columns


@quick
@given(st.integers(0, 10_000), st.integers(1, 6))
def test_naive_keeps_the_union_of_the_channels_best(seed: int, k: int):
    readers = [reader(seed, out=3), reader(seed + 1, out=2, m=1)]
    union = top_hifi(singleton_fidelity(*parts(readers[0])), k) | top_hifi(singleton_fidelity(*parts(readers[1])), k)
    best = naive_rank(readers).argsort(stable=True)[: int(union.sum())]
    assert set(best.tolist()) == set(torch.nonzero(union).flatten().tolist())
    order = removal_order("naive", readers, seed=0)
    assert set(order[6 - int(union.sum()) :].tolist()) == set(best.tolist())


def test_hifi_union_reaches_the_fidelity_in_every_channel():
    readers = [reader(11, n=8, m=1, out=3), reader(12, n=8, m=2, out=2)]
    for eta in (0.5, 0.9, 1.0):
        kept = torch.nonzero(hifi_union(readers, eta)).flatten()
        for r in readers:
            assert bool((subset_fidelity(*parts(r), kept) >= eta - 1e-9).all())
    assert int(hifi_union(readers, 0.5).sum()) <= int(hifi_union(readers, 0.9).sum())


def test_orders_of_the_scores():
    readers = [reader(0, m=1), reader(1, m=3)]
    for selector, score in (("energy", energy_score), ("wanda", wanda_score), ("cholesky", wanda_score)):
        total = sum(score(*parts(r)) for r in readers)
        assert removal_order(selector, readers, seed=0).tolist() == total.argsort().tolist()
    norms = sum(r.weight[0].square().sum(0)[r.columns].sum(1) for r in readers)
    assert removal_order("magnitude", readers, seed=0).tolist() == norms.argsort().tolist()


def test_random_orders_depend_on_the_seed_alone():
    readers = [reader(0, n=12)]
    first, again, other = (removal_order("random", readers, seed=s) for s in (1, 1, 2))
    assert sorted(first.tolist()) == list(range(12))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_scores_of_conv_groups_are_their_own():
    r = reader(3, n=6, m=1, groups=2)
    halves = [wanda_score(weight, second, columns) for weight, second, _, columns in r.parts()]
    assert removal_order("wanda", [r], seed=0).tolist() == torch.cat(halves).argsort().tolist()


def test_obs_has_no_order_and_other_names_are_errors():
    assert removal_order("obs", [reader(0)], seed=0) is None
    with pytest.raises(ModhifiError, match="unknown selector 'best'; choose one of obs, naive, energy"):
        removal_order("best", [reader(0)], seed=0)


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
        for g, (weight, second, mine, columns) in enumerate(r.parts()):
            kept = torch.ones(len(second), dtype=torch.bool)
            kept[columns[torch.isin(mine, curve.order[:removed])].reshape(-1)] = False
            expected[g] = least_squares(weight, second, kept, 1e-3) if len(mine) else weight
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_the_fidelity_of_a_curve_is_the_best_singleton():
    readers = READERS["part of a concatenation"](3)
    weight, second, _, columns = readers[0].parts()[0]
    best = singleton_fidelity(weight, second, columns).amax(0)
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
