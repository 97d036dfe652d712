"""The Pareto front, against every pair of points."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from modhifi.artifacts.pareto import front

values = st.integers(0, 4)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.tuples(values, values), max_size=8), st.sampled_from([0.0, 0.5]), st.sampled_from([0.0, 1.0]))
def test_the_front_is_what_no_other_point_beats(points: list[tuple[int, int]], share: float, noise: float) -> None:
    expected = [
        not any(
            (c <= (1 + share) * cost and q > quality + noise) or ((1 + share) * c < cost and q >= quality)
            for c, q in points
        )
        for cost, quality in points
    ]
    assert front([cost for cost, _ in points], [quality for _, quality in points], share, noise) == expected


def test_what_differs_by_chance_alone_is_on_the_front_together() -> None:
    costs, qualities = [0.5, 0.505, 0.5, 0.3], [0.80, 0.81, 0.70, 0.75]
    assert front(costs, qualities, 0.02, 0.02) == [True, True, False, True]
    assert front(costs, qualities, 0.02) == [False, True, False, True]
