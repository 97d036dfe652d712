"""Every closed form against its definition on raw activations."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from modhifi.pruning.fidelity import (
    channel_energy,
    energy_score,
    hifi_size,
    optimal_scalars,
    prefix_fidelity,
    similarity,
    singleton_fidelity,
    subset_fidelity,
    summed_similarity,
    top_hifi,
    wanda_score,
)


@dataclass(frozen=True)
class Case:
    """Raw activations of one reader: ``rows`` ``(r, d)``, ``weight`` ``(out, d)``, ``blocks`` ``(n, m)``."""

    rows: Tensor
    weight: Tensor
    blocks: Tensor

    @property
    def second(self) -> Tensor:
        return self.rows.T @ self.rows / len(self.rows)

    def contributions(self, channel: int) -> Tensor:
        """What each component adds to an output channel in every row: ``(r, n)``."""
        return (self.rows * self.weight[channel])[:, self.blocks].sum(2)

    def similarity(self, channel: int) -> Tensor:
        """The component-similarity matrix of an output channel: ``(n, n)``."""
        columns = self.blocks.reshape(-1)
        return similarity(self.weight[channel, columns], self.second[columns][:, columns], len(self.blocks))


def make(seed: int, n: int = 5, m: int = 1, out: int = 3, rows: int = 60, spare: int = 0) -> Case:
    """Correlated activations whose components' columns lie scattered, ``spare`` columns in no block."""
    generator = torch.Generator().manual_seed(seed)
    d = n * m + spare
    mix = torch.randn(d, d, generator=generator, dtype=torch.float64)
    x = torch.randn(rows, d, generator=generator, dtype=torch.float64) @ mix
    weight = torch.randn(out, d, generator=generator, dtype=torch.float64)
    blocks = torch.randperm(d, generator=generator)[: n * m].view(n, m)
    return Case(x, weight, blocks)


seeds = st.integers(0, 10_000)
cases = st.builds(make, seeds, st.integers(1, 6), st.sampled_from([1, 3]), st.integers(1, 4))
wide_cases = st.builds(make, seeds, st.integers(1, 5), st.sampled_from([1, 2]), spare=st.integers(0, 3))
quick = settings(max_examples=15, deadline=None, derandomize=True)


def kept_of(case: Case, chooser: int) -> Tensor:
    generator = torch.Generator().manual_seed(chooser)
    order = torch.randperm(len(case.blocks), generator=generator)
    return order[: int(torch.randint(0, len(order) + 1, (), generator=generator))]


@quick
@given(wide_cases, st.integers(0, 99))
def test_subset_fidelity_is_its_definition(case: Case, chooser: int):
    kept = kept_of(case, chooser)
    found = subset_fidelity(case.weight, case.second, case.blocks, kept)
    for channel in range(len(case.weight)):
        parts = case.contributions(channel)
        y = parts.sum(1)
        scales = torch.linalg.lstsq(parts[:, kept], y[:, None]).solution if len(kept) else torch.zeros(0, 1).double()
        residual = y - (parts[:, kept] @ scales)[:, 0]
        expected = 1 - residual.square().sum() / y.square().sum()
        assert found[channel] == pytest.approx(float(expected), abs=1e-8)


@quick
@given(cases)
def test_nothing_explains_nothing_and_all_explain_all(case: Case):
    everything = torch.arange(len(case.blocks))
    complete = subset_fidelity(case.weight, case.second, case.blocks, everything)
    assert torch.allclose(complete, torch.ones_like(complete))
    assert not subset_fidelity(case.weight, case.second, case.blocks, everything[:0]).any()


@quick
@given(cases, st.integers(0, 99))
def test_subset_fidelity_is_monotone(case: Case, chooser: int):
    order = torch.randperm(len(case.blocks), generator=torch.Generator().manual_seed(chooser))
    values = torch.stack(
        [subset_fidelity(case.weight, case.second, case.blocks, order[:k]) for k in range(len(order) + 1)]
    )
    assert bool((values.diff(dim=0) >= -1e-9).all())


def test_subset_fidelity_stays_monotone_where_activations_are_degenerate():
    case = make(0, n=6, m=2)
    case.rows[:, case.blocks[1]] = case.rows[:, case.blocks[0]]  # one component twice
    case.rows[:, case.blocks[2]] = 0
    values = torch.stack([subset_fidelity(case.weight, case.second, case.blocks, torch.arange(k)) for k in range(7)])
    assert bool((values.diff(dim=0) >= -1e-7).all())
    assert torch.allclose(values[6], torch.ones(3).double())


@quick
@given(wide_cases)
def test_singletons_are_their_definition(case: Case):
    fidelity = singleton_fidelity(case.weight, case.second, case.blocks)
    alone = torch.stack(
        [subset_fidelity(case.weight, case.second, case.blocks, torch.tensor([i])) for i in range(len(case.blocks))], 1
    )
    torch.testing.assert_close(fidelity, alone, rtol=1e-7, atol=1e-9)
    for channel in range(len(case.weight)):
        parts = case.contributions(channel)
        y = parts.sum(1)
        for i, part in enumerate(parts.T):
            best = part @ y / (part @ part)
            expected = 1 - (y - best * part).square().sum() / y.square().sum()
            assert fidelity[channel, i] == pytest.approx(float(expected), abs=1e-8)


@quick
@given(cases)
def test_similarities_are_inner_products_of_contributions(case: Case):
    for channel in range(len(case.weight)):
        parts = case.contributions(channel)
        expected = parts.T @ parts / len(parts)
        torch.testing.assert_close(case.similarity(channel), expected)


@quick
@given(wide_cases, st.integers(0, 99))
def test_compensation_is_least_squares_over_scalars(case: Case, chooser: int):
    kept = kept_of(case, chooser)
    scales = optimal_scalars(case.weight, case.second, case.blocks, kept, ridge=0.0)
    assert scales.shape == (len(case.weight), len(kept))
    for channel in range(len(case.weight)) if len(kept) else ():
        parts = case.contributions(channel)
        expected = torch.linalg.lstsq(parts[:, kept], parts.sum(1, keepdim=True)).solution[:, 0]
        torch.testing.assert_close(scales[channel], expected, rtol=1e-6, atol=1e-8)


@quick
@given(st.integers(0, 10_000), st.integers(2, 6), st.integers(0, 99))
def test_compensation_of_a_linear_reader_is_least_squares_on_its_inputs(seed: int, n: int, chooser: int):
    """With one column per component a scalar per weight can reach what any weight can."""
    case = make(seed, n=n, m=1, out=1)
    kept = kept_of(case, chooser)
    scales = optimal_scalars(case.weight, case.second, case.blocks, kept, ridge=0.0)
    columns = case.blocks[kept, 0]
    best = torch.linalg.lstsq(case.rows[:, columns], case.rows @ case.weight.T)
    if len(kept):
        torch.testing.assert_close(scales[0] * case.weight[0, columns], best.solution[:, 0], rtol=1e-5, atol=1e-7)


def test_a_small_ridge_moves_the_compensation_little():
    case = make(4, n=6, m=3)
    kept = torch.tensor([0, 2, 5])
    exact = optimal_scalars(case.weight, case.second, case.blocks, kept, ridge=0.0)
    damped = optimal_scalars(case.weight, case.second, case.blocks, kept, ridge=1e-6)
    assert not torch.equal(exact, damped)
    torch.testing.assert_close(exact, damped, rtol=1e-3, atol=1e-3)
    strong = optimal_scalars(case.weight, case.second, case.blocks, kept, ridge=1e9)
    torch.testing.assert_close(strong, torch.ones_like(strong), rtol=0, atol=1e-6)  # nothing changes


@quick
@given(cases, st.integers(0, 99))
def test_permuting_components_permutes_scores(case: Case, chooser: int):
    order = torch.randperm(len(case.blocks), generator=torch.Generator().manual_seed(chooser))
    args = case.weight, case.second
    torch.testing.assert_close(
        singleton_fidelity(*args, case.blocks)[:, order], singleton_fidelity(*args, case.blocks[order])
    )
    for total in (energy_score, wanda_score):
        torch.testing.assert_close(total(*args, case.blocks)[order], total(*args, case.blocks[order]))


@quick
@given(cases, st.floats(1e-6, 1e6))
def test_fidelity_does_not_depend_on_the_scale_of_a_channel(case: Case, factor: float):
    scaled = case.weight.clone()
    scaled[0] *= factor
    before = singleton_fidelity(case.weight, case.second, case.blocks)
    after = singleton_fidelity(scaled, case.second, case.blocks)
    torch.testing.assert_close(before, after, rtol=1e-6, atol=1e-12)


def test_energy_and_wanda_scores():
    case = make(7, n=4, m=2, out=3)
    energies = torch.stack([case.contributions(c).sum(1).square().mean() for c in range(3)])
    fidelity = singleton_fidelity(case.weight, case.second, case.blocks)
    torch.testing.assert_close(energy_score(case.weight, case.second, case.blocks), energies @ fidelity)
    own = sum(case.contributions(c).square().mean(0) for c in range(3))
    torch.testing.assert_close(wanda_score(case.weight, case.second, case.blocks), own)


def test_wanda_is_the_row_norm_of_the_cholesky_factor():
    case = make(8, n=5, m=1)
    summed = sum(case.similarity(c) for c in range(3))
    rows = torch.linalg.cholesky(summed).square().sum(1)
    torch.testing.assert_close(wanda_score(case.weight, case.second, case.blocks), rows)


def test_naive_is_optimal_without_correlation():
    torch.manual_seed(0)
    weight, blocks = torch.randn(1, 6, dtype=torch.float64), torch.arange(6)[:, None]
    second = torch.diag(torch.rand(6, dtype=torch.float64) + 0.1)
    singles = singleton_fidelity(weight, second, blocks)
    for k in range(1, 6):
        best = max(
            float(subset_fidelity(weight, second, blocks, torch.tensor(subset)))
            for subset in torch.combinations(torch.arange(6), k).tolist()
        )
        naive = torch.nonzero(top_hifi(singles, k)).flatten()
        assert len(naive) == k
        assert float(subset_fidelity(weight, second, blocks, naive)) == pytest.approx(best)


def test_top_hifi_is_a_union_over_channels():
    singles = torch.tensor([[0.9, 0.1, 0.5, 0.0], [0.0, 0.2, 0.1, 0.3]])
    assert top_hifi(singles, 0).tolist() == [False] * 4
    assert top_hifi(singles, 1).tolist() == [True, False, False, True]
    assert top_hifi(singles, 2).tolist() == [True, True, True, True]
    assert top_hifi(singles, 9).tolist() == [True] * 4


@quick
@given(st.integers(0, 10_000), st.sampled_from([1, 3]), st.sampled_from([0.3, 0.8, 0.99, 1.0]))
def test_hifi_size_is_the_smallest_naive_set(seed: int, m: int, eta: float):
    case = make(seed, n=6, m=m, out=2)
    order = singleton_fidelity(case.weight, case.second, case.blocks).argsort(dim=1, descending=True)
    for channel, size in enumerate(hifi_size(case.weight, case.second, case.blocks, eta).tolist()):
        row = case.weight[channel : channel + 1]
        values = [float(subset_fidelity(row, case.second, case.blocks, order[channel, :k])) for k in range(1, 7)]
        assert size == next((k for k, value in enumerate(values, 1) if value >= eta), 6)


def test_what_carries_no_energy_scores_nothing():
    case = make(9, n=4, m=2, out=3)
    case.weight[1] = 0  # a silent output channel
    case.rows[:, case.blocks[2]] = 0  # a silent component
    args = case.weight, case.second, case.blocks
    fidelity = singleton_fidelity(*args)
    assert not fidelity[1].any() and not fidelity[:, 2].any()
    assert bool((fidelity[[0, 2]][:, [0, 1, 3]] > 0).all())
    assert energy_score(*args)[2] == 0 and wanda_score(*args)[2] == 0
    assert hifi_size(*args, 0.9)[1] == 0
    without = torch.tensor([0, 1, 3])
    assert torch.allclose(subset_fidelity(*args, without), torch.ones(3).double())
    assert torch.isfinite(optimal_scalars(*args, without)).all()
    assert torch.isfinite(optimal_scalars(*args, torch.tensor([2]))).all()


def test_contributions_that_cancel_leave_a_channel_without_energy():
    rows = torch.randn(50, 1, dtype=torch.float64).expand(-1, 2)
    weight, blocks = torch.tensor([[1.0, -1.0]]).double(), torch.arange(2)[:, None]
    assert not singleton_fidelity(weight, rows.T @ rows / 50, blocks).any()


@quick
@given(wide_cases, st.integers(0, 99), st.booleans())
def test_the_fidelity_of_prefixes_is_that_of_each_subset(case: Case, chooser: int, shared: bool):
    generator = torch.Generator().manual_seed(chooser)
    n, out = len(case.blocks), len(case.weight)
    order = torch.stack([torch.randperm(n, generator=generator) for _ in range(out)])
    curves = prefix_fidelity(case.weight, case.second, case.blocks, order[0] if shared else order)
    for channel in range(out):
        row, own = case.weight[channel : channel + 1], order[0 if shared else channel]
        expected = [subset_fidelity(row, case.second, case.blocks, own[:k])[0] for k in range(n + 1)]
        torch.testing.assert_close(curves[channel], torch.stack(expected), rtol=0, atol=1e-6)


def test_prefixes_of_what_carries_no_energy_or_is_there_twice(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("modhifi.pruning.fidelity.NUMBERS", 1)  # a channel at a time
    case = make(9, n=4, m=2, out=3)
    case.weight[1] = 0
    case.rows[:, case.blocks[2]] = 0
    case.weight[:, case.blocks[3]] = case.weight[:, case.blocks[0]]
    case.rows[:, case.blocks[3]] = case.rows[:, case.blocks[0]]
    curves = prefix_fidelity(case.weight, case.second, case.blocks, torch.tensor([2, 0, 3, 1]))
    assert curves[1].tolist() == [1.0] * 5
    assert not curves[[0, 2], :2].any()
    torch.testing.assert_close(curves[:, 2], curves[:, 3], rtol=0, atol=1e-6)  # the same once more adds nothing
    torch.testing.assert_close(curves[:, 4], torch.ones(3).double())


@quick
@given(wide_cases)
def test_the_summed_similarity_is_that_of_all_channels(case: Case):
    expected = sum(case.similarity(c) for c in range(len(case.weight)))
    torch.testing.assert_close(summed_similarity(case.weight, case.second, case.blocks), expected)
    energies = torch.stack([case.contributions(c).sum(1).square().mean() for c in range(len(case.weight))])
    torch.testing.assert_close(channel_energy(case.weight, case.second, case.blocks), energies)
