"""The Pareto front, against every pair of points."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from modhifi.artifacts.pareto import front

values = st.integers(0, 4)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.tuples(values, values), max_size=8), st.sampled_from([0.0, 0.5]))
def test_the_front_is_what_no_other_point_beats(points: list[tuple[int, int]], tolerance: float) -> None:
    expected = [
        not any(c <= (1 + tolerance) * cost and q >= quality and (c < cost or q > quality) for c, q in points)
        for cost, quality in points
    ]
    assert front([cost for cost, _ in points], [quality for _, quality in points], tolerance) == expected
