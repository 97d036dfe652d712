"""The weights that a distillation takes: what is better by more than chance, else what diverges less."""

from __future__ import annotations

import pytest

from modhifi.healing.healed import best_entry


def curve(*points: tuple[float | None, float], error: float = 1.0) -> list[dict[str, float | None]]:
    return [{"agreement": agreement, "divergence": divergence, "error": error} for agreement, divergence in points]


@pytest.mark.parametrize(
    ("points", "best"),
    [
        ([(90.0, 3.0), (92.0, 4.0)], 1),  # more than chance
        ([(90.0, 3.0), (90.5, 4.0)], 0),  # chance, and further away
        ([(90.0, 3.0), (89.5, 2.0)], 1),  # chance, and nearer
        ([(90.0, 3.0), (88.5, 2.0)], 0),  # less by more than chance
        ([(90.0, 3.0), (90.0, 3.0)], 0),  # the earlier of equals
        ([(90.0, 3.0), (90.8, 3.5), (91.5, 4.0)], 2),
    ],
)
def test_the_best_entry_is_better_by_more_than_chance_or_diverges_less(
    points: list[tuple[float, float]], best: int
) -> None:
    assert best_entry(curve(*points)) == best


def test_features_have_divergences_alone() -> None:
    assert best_entry(curve((None, 3.0), (None, 2.0), (None, 2.5), error=0.0)) == 1
