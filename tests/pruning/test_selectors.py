"""Every selector against its definition, on the contributions themselves."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_readers import READERS, TINY, reader, residual
from torch import Tensor

from modhifi.errors import ModhifiError
from modhifi.pruning.elimination import eliminate
from modhifi.pruning.fidelity import singleton_fidelity, subset_fidelity, top_hifi
from modhifi.pruning.readers import Reader
from modhifi.pruning.selectors import SELECTORS
from modhifi.pruning.selectors.naive import hifi_union, naive_rank

quick = settings(max_examples=12, deadline=None, derandomize=True)


def channels(readers: list[Reader]) -> Iterator[tuple[list[int], Tensor]]:
    """Of every output channel its components and what each adds to it in some rows: ``(rows, k)``.

    The rows are a square root of S, so that sums over them are expectations.
    """
    for part in (part for r in readers for part in r.parts):
        rows = torch.linalg.cholesky(part.second).T
        for weight in part.weight:
            yield part.components.tolist(), (rows * weight)[:, part.columns].sum(2)


def rising(score: dict[int, float]) -> list[int]:
    return sorted(score, key=lambda component: score[component])


def by_contribution(of: Callable[[Tensor, Tensor], Tensor]) -> Callable[[list[Reader], int], list[int]]:
    """The order of a sum over channels of a figure of one contribution ``a`` and the whole output ``y``."""

    def order(readers: list[Reader], seed: int) -> list[int]:
        total = dict.fromkeys(range(6), 0.0)
        for components, parts in channels(readers):
            for component, a in zip(components, parts.T, strict=True):
                total[component] += float(of(a, parts.sum(1)))
        return rising(total)

    return order


def greedy(readers: list[Reader], seed: int) -> list[int]:
    removed: list[int] = []
    while len(removed) < 6:
        errors = {c: residual(readers, torch.tensor([*removed, c])) for c in range(6) if c not in removed}
        removed.append(rising(errors)[0])
    return removed


def naive(readers: list[Reader], seed: int) -> list[int]:
    """By the best place in any channel's ranking of singletons, ties by the reader's best singleton; the last goes."""
    best = dict.fromkeys(range(6), (7.0, 0.0))
    for r in readers:
        places, tops = dict.fromkeys(range(6), 7.0), dict.fromkeys(range(6), 0.0)
        for components, parts in channels([r]):
            y = parts.sum(1)
            singletons = (y @ parts).square() / (parts.square().sum(0) * (y @ y))
            for component, s in zip(components, singletons, strict=True):
                places[component] = min(places[component], 1.0 + int((singletons > s).sum()))
                tops[component] = max(tops[component], float(s))
        best = {c: min(best[c], (places[c], -tops[c])) for c in best}
    return sorted(best, key=lambda component: best[component], reverse=True)


def weight_norms(readers: list[Reader], seed: int) -> list[int]:
    total = dict.fromkeys(range(6), 0.0)
    for r in readers:
        for component, group in enumerate(r.owner.tolist()):
            total[component] += float(r.weight[group][:, r.columns[component]].norm() ** 2)
    return rising(total)


def permutation(readers: list[Reader], seed: int) -> list[int]:
    return torch.randperm(6, generator=torch.Generator().manual_seed(seed)).tolist()


EXPECTED: dict[str, Callable[[list[Reader], int], list[int]]] = {
    "obs": greedy,
    "naive": naive,
    "energy": by_contribution(lambda a, y: (y @ a).square() / (a @ a)),
    "wanda": by_contribution(lambda a, y: a @ a),
    "magnitude": weight_norms,
    "random": permutation,
}


def test_every_selector_that_comes_with_the_package_is_checked() -> None:
    assert set(EXPECTED) <= set(SELECTORS)
    assert SELECTORS["cholesky"] is SELECTORS["wanda"]


@pytest.mark.parametrize("kind", READERS)
@pytest.mark.parametrize("name", EXPECTED)
def test_the_order_is_that_of_the_definition(name: str, kind: str) -> None:
    readers = READERS[kind](2)
    order = SELECTORS[name].order(readers, 3)
    if order is not None:
        assert order.dtype == torch.int64 and order.tolist() == EXPECTED[name](readers, 3)
    curve = eliminate(readers, keep_at_least=1, order=order, ridge=TINY, steps=100)
    assert curve.order.tolist() == EXPECTED[name](readers, 3)[:5]


@pytest.mark.parametrize("name", SELECTORS)
def test_parts_lose_equally_many(name: str) -> None:
    readers, labels = [reader(2, n=24, m=1, groups=2)], torch.arange(2).repeat_interleave(12)
    order = SELECTORS[name].order(readers, 0)
    assert order is None or order.sort().values.tolist() == list(range(24))
    curve = eliminate(readers, keep_at_least=6, order=order, partition=labels, ridge=TINY, steps=100)
    for stage in range(0, 19, 2):
        assert torch.bincount(labels[curve.order[:stage]], minlength=2).tolist() == [stage // 2] * 2


@pytest.mark.parametrize("name", SELECTORS)
def test_second_moments_matter_to_all_but_weight_norms_and_chance(name: str) -> None:
    seen = [reader(4, n=12, m=1)]
    blind = [replace(r, second=torch.eye(12).double()[None]) for r in seen]
    orders = [
        eliminate(readers, keep_at_least=1, order=SELECTORS[name].order(readers, 0), steps=100).order.tolist()
        for readers in (seen, blind)
    ]
    assert (orders[0] != orders[1]) == (name not in ("magnitude", "random"))


@quick
@given(st.integers(0, 10_000), st.integers(1, 6))
def test_naive_keeps_the_union_of_the_channels_best(seed: int, k: int) -> None:
    readers = [reader(seed, out=3), reader(seed + 1, out=2, m=1)]
    singles = [singleton_fidelity(p.weight, p.second, p.columns) for r in readers for p in r.parts]
    union = top_hifi(singles[0], k) | top_hifi(singles[1], k)
    best = naive_rank(readers).argsort(stable=True)[: int(union.sum())]
    assert set(best.tolist()) == set(torch.nonzero(union).flatten().tolist())


def test_hifi_union_reaches_the_fidelity_in_every_channel() -> None:
    readers = [reader(11, n=8, m=1, out=3), reader(12, n=8, m=2, out=2)]
    for eta in (0.5, 0.9, 1.0):
        kept = torch.nonzero(hifi_union(readers, eta)).flatten()
        for part in (part for r in readers for part in r.parts):
            assert bool((subset_fidelity(part.weight, part.second, part.columns, kept) >= eta - 1e-9).all())
    assert int(hifi_union(readers, 0.5).sum()) <= int(hifi_union(readers, 0.9).sum())


def test_unknown_names_and_orders_that_are_none_are_errors() -> None:
    with pytest.raises(ModhifiError, match="unknown selector 'best'; choose one of .*obs"):
        SELECTORS["best"]
    for order in ([0, 1, 2], [0, 1, 2, 3, 4, 4], [1, 2, 3, 4, 5, 6]):
        with pytest.raises(ModhifiError, match="all 6 components of the group once each"):
            eliminate([reader(0)], keep_at_least=1, order=torch.tensor(order))
