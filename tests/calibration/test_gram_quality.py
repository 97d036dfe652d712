from __future__ import annotations

import pytest
import torch

from modhifi.calibration.gram_quality import GramQuality, gram_quality, gram_warnings
from modhifi.calibration.moments import Moments


@pytest.mark.parametrize("size", [1e-9, 1.0, 1e9])
def test_the_rank_is_that_of_the_correlations_of_the_columns_that_vary(size: float) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(2, 50, 6, generator=generator, dtype=torch.float64)
    rows = rows @ torch.randn(6, 6, generator=generator, dtype=torch.float64)
    rows[:, :, 1] *= 1e5  # a channel so large that it alone would decide
    rows *= size
    rows[:, :, 4] = 0
    covariance = torch.stack([torch.cov(group.T) for group in rows])
    (found,) = gram_quality({"conv": Moments(50, rows.mean(1), covariance)})
    live = [0, 1, 2, 3, 5]
    ranks = []
    for group in rows:
        values = torch.linalg.eigvalsh(torch.corrcoef(group[:, live].T))
        ranks.append(float(values.sum() ** 2 / values.square().sum()))
    assert found == GramQuality("conv", 50, 6, pytest.approx(min(ranks)))


def test_a_reader_of_nothing_has_rank_zero() -> None:
    (found,) = gram_quality({"dead": Moments(9, torch.zeros(1, 4).double(), torch.zeros(1, 4, 4).double())})
    assert found.rank == 0


def test_the_shortest_gram_says_how_many_samples_would_do() -> None:
    grams = (
        GramQuality("enough", 64, 64, 30.0),
        GramQuality("wider", 100, 200, 30.0),
        GramQuality("worst", 16, 50, 30.0),
    )
    (warning,) = gram_warnings(grams, 8)
    # 8 samples gave 16 rows, two each.
    assert (
        "2 of 3 layers" in warning and "worst: worst, 16 rows for 50 columns" in warning and "--samples 25" in warning
    )
    assert gram_warnings(grams[:1], 8) == []


def test_inputs_that_vary_along_one_direction_are_told_of_readers_that_have_several() -> None:
    grams = (
        GramQuality("narrow", 99, 8, 1.0),
        GramQuality("still", 99, 9, 1.4),
        GramQuality("lively", 99, 9, 1.5),
    )
    (warning,) = gram_warnings(grams, 8)
    assert "of 1 of 3 layers" in warning and "first: still" in warning


def test_experts_that_saw_few_tokens_are_named() -> None:
    covariance = torch.eye(16, dtype=torch.float64).expand(3, 16, 16)
    moments = Moments(90, torch.zeros(3, 16, dtype=torch.float64), covariance, torch.tensor([90, 3, 0]))
    (quality,) = gram_quality({"experts.down_proj": moments})
    assert (quality.few, quality.rank) == ((1, 2), 16)
    (warning,) = gram_warnings((quality,), 10)
    assert warning.startswith("2 experts of experts.down_proj saw too few tokens for a Gram (1, 2)")
