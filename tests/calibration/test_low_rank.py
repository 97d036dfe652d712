"""Second moments in the span of few rows, against the matrices that they stand for."""

from __future__ import annotations

import torch

from modhifi.calibration.accumulator import Accumulator
from modhifi.calibration.low_rank import LowRank, add_outer, as_tensor
from modhifi.calibration.moments import Moments, PairedMoments, Spanned

GROUPS, WIDTH, ROWS = 2, 9, 4


def low_rank() -> tuple[LowRank, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    factor = torch.randn(GROUPS, WIDTH, ROWS, generator=generator).double()
    constant = torch.tensor([0.3, 0.7]).double()
    return LowRank(factor, constant), factor @ factor.mT + constant[:, None, None] * torch.eye(WIDTH).double()


def test_it_says_what_the_matrix_says() -> None:
    second, matrix = low_rank()
    weight = torch.randn(GROUPS, 3, WIDTH, generator=torch.Generator().manual_seed(1)).double()
    vector = torch.randn(GROUPS, WIDTH).double()
    columns = torch.tensor([[0, 5], [7, 2], [1, 8]])
    share, scale = torch.tensor([0.2, 0.9]).double(), torch.tensor([1.5, 0.5]).double()
    identity = torch.eye(WIDTH).double()
    shrunk = (1 - share)[:, None, None] * matrix + (share * scale)[:, None, None] * identity
    some = torch.tensor([3, 0, 6])
    pairs = [
        (second.dense(), matrix),
        (weight @ second, weight @ matrix),
        (second.diagonals(), matrix.diagonal(dim1=1, dim2=2)),
        (second.squares(), matrix.square().sum((1, 2))),
        (second.shrunk(share, scale).dense(), shrunk),
        (second[1].restricted(some).dense(), matrix[1][some][:, some]),
        (second.energy(weight), (weight @ matrix * weight).sum((1, 2))),
        (second[1].product(weight[1], some), (weight[1] @ matrix[1])[:, some]),
        (second[1].blocks(columns), matrix[1][columns[:, :, None], columns[:, None]]),
        (second[1].times_inverse(weight[1], 0.1), weight[1] @ torch.linalg.inv(matrix[1] + 0.1 * identity)),
        (as_tensor(add_outer(second, vector)), matrix + vector[:, :, None] * vector[:, None]),
    ]
    assert second.shape == matrix.shape and len(second) == len(matrix)
    for value, expected in pairs:
        torch.testing.assert_close(value, expected)


def test_few_rows_of_a_large_gram_are_kept_as_they_are(monkeypatch) -> None:
    rows = torch.randn(1, 20, 9) + 3
    monkeypatch.setattr("modhifi.calibration.accumulator.LARGE", 20 * 20 * 8)
    few, many = Accumulator(), Accumulator()
    for part in rows.split(4, 2):
        few.add(part)
    for part in torch.cat([rows, rows], 2).split(4, 2):
        many.add(part)
    state = few.state()
    again = Accumulator()
    again.restore(few.n, state)
    spanned, dense = few.finish(), many.finish()
    assert isinstance(spanned, Spanned) and not isinstance(dense, Spanned)
    assert torch.equal(spanned.rows, rows) and torch.equal(again.finish().rows, rows)
    for value, expected in ((spanned.mean, dense.mean), (spanned.cov, dense.cov), (spanned.gram, dense.gram)):
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-5)
    monkeypatch.setattr("modhifi.calibration.accumulator.LARGE", 20 * 20 * 8 + 1)
    assert type(of(rows)) is Moments


def of(rows: torch.Tensor) -> Moments:
    sums = Accumulator()
    sums.add(rows)
    return sums.finish()


def test_paired_moments_of_rows_are_those_that_are_summed() -> None:
    x, y = torch.randn(2, 6, 30) + 1, torch.randn(2, 3, 30) - 2
    sums = Accumulator(targets=3)
    sums.add(torch.cat([x, y], 1))
    summed, spanned = sums.finish_paired(), PairedMoments.of_rows(x.double(), y.double())
    for one, other in ((summed, spanned), (summed.uncentred, spanned.uncentred)):
        for name, value in vars(one).items():
            expected = vars(other)[name]
            expected = as_tensor(expected) if isinstance(expected, LowRank) else expected
            torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-5)
