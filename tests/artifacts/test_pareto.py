"""The Pareto front, against every pair of points."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from modhifi.artifacts.pareto import front

values = st.integers(0, 4)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.tuples(values, values), max_size=8))
def test_the_front_is_what_no_other_point_beats(points: list[tuple[int, int]]) -> None:
    expected = [
        not any(c <= cost and q >= quality and (c, q) != (cost, quality) for c, q in points) for cost, quality in points
    ]
    assert front([cost for cost, _ in points], [quality for _, quality in points]) == expected
