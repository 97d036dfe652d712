"""What pruning writes and reports, against brute force on the raw rows that its readers read."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modhifi.calibration.moments import Moments
from modhifi.data.samples import Samples
from modhifi.models.load import load_model
from modhifi.models.loaded import LoadedModel
from modhifi.pruning.budget import Budget
from modhifi.pruning.prune import prune_model
from modhifi.pruning.readers import applied_second
from modhifi.pruning.sensitivity import amplification, output_change
from modhifi.pruning.settings import PruneSettings
from modhifi.pruning.stages import find_structure, removal_curves

ROWS, WIDTH = 60, 12
EXACT = PruneSettings(rows_per_column=None, weighting="energy", ridge=1e-3, selector="magnitude")


def net(bias: bool) -> nn.Sequential:
    """A hidden layer whose mean is larger than its deviation, and a reader with or without a place for it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 5, bias=bias))
    model[0].bias.data.uniform_(1, 3)
    return model.eval()


def samples() -> Samples:
    items = torch.randn(ROWS, 6, generator=torch.Generator().manual_seed(1))
    numbers = tuple(map(str, range(ROWS)))
    return Samples(lambda i: items[i], numbers, None, numbers, "rows", synthetic=False)


def loaded_net(bias: bool) -> tuple[LoadedModel, Tensor]:
    """The model and the rows ``(n, d)`` float64 that its second linear layer reads."""
    model = net(bias)
    inputs = next(samples().batches(ROWS))
    return load_model(model, example=inputs[:2]), model[1](model[0](inputs)).detach().double()


def oracle_share(second: Tensor, n: int) -> float:
    """Chen et al. 2010: how much of S gives way to a multiple of the identity."""
    d, trace, square = len(second), float(second.trace()), float((second @ second).trace())
    share = ((1 - 2 / d) * square + trace**2) / ((n + 1 - 2 / d) * (square - trace**2 / d))
    return min(1.0, share)


def regression(rows: Tensor, weight: Tensor, kept: Tensor, ridge: float) -> Tensor:
    """The best weights ``(out, k)`` of the kept columns: least squares on rows, shrinkage and ridge as further rows."""
    n, d = rows.shape
    second = rows.T @ rows / n
    share, scale = oracle_share(second, n), float(second.trace()) / d
    extra = torch.eye(d, dtype=torch.float64) * (share * scale + ridge * scale) ** 0.5
    design = torch.cat([rows * ((1 - share) / n) ** 0.5, extra])
    # What the kept columns should make: all of the rows' output, and their own part of the further rows.
    target = torch.cat([rows * ((1 - share) / n) ** 0.5, extra * kept]) @ weight.T
    return torch.linalg.lstsq(design[:, kept], target).solution.T


@pytest.mark.parametrize("bias", [False, True], ids=["without bias", "with bias"])
@pytest.mark.parametrize("layout", ["global", "uniform"])
@pytest.mark.parametrize("sequential", [None, "own", "dense"])
def test_least_squares_and_its_error_are_those_of_the_raw_rows(bias: bool, layout: str, sequential: str | None) -> None:
    loaded, rows = loaded_net(bias)
    settings = PruneSettings(**{**vars(EXACT), "layout": layout, "sequential": sequential})
    pruned = prune_model(loaded, samples(), Budget("components", 0.5), settings)
    kept = torch.zeros(WIDTH, dtype=torch.bool)
    kept[list(pruned.plan.kept["0"])] = True
    assert int(kept.sum()) == WIDTH // 2
    before, after = loaded.model[2].weight.double(), pruned.model[2].weight.double()
    mean = rows.mean(0)
    # A bias takes the change of the mean; without one the rows count as they are.
    counted = rows - mean if bias else rows
    expected = regression(counted, before, kept, settings.ridge)
    torch.testing.assert_close(after, expected, rtol=1e-4, atol=1e-5)
    (error,) = pruned.errors
    change = pruned.model[2](rows[:, kept].float()).double() - loaded.model[2](rows.float()).double()
    assert error.error == pytest.approx(float(change.square().sum(1).mean()), rel=1e-3)
    assert error.energy == pytest.approx(float((counted @ before.T).square().sum(1).mean()), rel=1e-4)
    if bias:
        torch.testing.assert_close(change.mean(0), torch.zeros(5).double(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("compensate", ["none", "delta"])
@pytest.mark.parametrize("bias", [False, True], ids=["without bias", "with bias"])
def test_reported_errors_are_those_of_the_raw_rows(bias: bool, compensate: str) -> None:
    loaded, rows = loaded_net(bias)
    settings = PruneSettings(**{**vars(EXACT), "compensate": compensate})
    pruned = prune_model(loaded, samples(), Budget("components", 0.5), settings)
    kept = list(pruned.plan.kept["0"])
    before = loaded.model[2].weight.double()
    after = torch.zeros_like(before)
    after[:, kept] = pruned.model[2].weight.double()
    counted = rows - rows.mean(0) if bias else rows
    (error,) = pruned.errors
    assert error.error == pytest.approx(float((counted @ (before - after).T).square().sum(1).mean()), rel=1e-4)
    assert error.energy == pytest.approx(float((counted @ before.T).square().sum(1).mean()), rel=1e-4)
    if compensate == "none":
        assert torch.equal(after[:, kept], before[:, kept])


@pytest.mark.parametrize("sink", [None, "bias"])
def test_the_matrix_to_solve_with_is_the_gram_where_nothing_takes_the_mean(sink: str | None) -> None:
    _, rows = loaded_net(False)
    mean = rows.mean(0)
    covariance = (rows - mean).T @ (rows - mean) / ROWS
    second = covariance if sink else rows.T @ rows / ROWS
    share = oracle_share(second, ROWS)
    assert 0 < share < 1
    expected = (1 - share) * second + share * second.trace() / WIDTH * torch.eye(WIDTH, dtype=torch.float64)
    found = applied_second(Moments(ROWS, mean[None], covariance[None]), sink)
    torch.testing.assert_close(found[0], expected)


def test_the_change_of_the_output_is_the_divergence_from_the_dense_model() -> None:
    dense = torch.tensor([[2.0, 0.0, -1.0], [0.5, 0.4, 3.0]])
    changed = torch.tensor([[0.0, 1.0, -3.0], [0.5, 0.5, 0.5]])
    divergence = F.kl_div(changed.log_softmax(-1), dense.log_softmax(-1), log_target=True, reduction="batchmean")
    assert output_change(dense, changed) == pytest.approx(float(divergence), rel=1e-6)
    assert output_change(changed, dense) != pytest.approx(float(divergence), rel=0.1)
    assert output_change(dense[:, None], changed[:, None]) == pytest.approx(float(divergence), rel=1e-6)
    assert output_change(dense, dense) == 0


@pytest.mark.parametrize("bias", [False, True], ids=["without bias", "with bias"])
@pytest.mark.parametrize("compensate", ["lstsq", "none"])
def test_amplification_is_the_divergence_over_the_local_error(bias: bool, compensate: str) -> None:
    """One group by hand: half of its components go, 6 of 12."""
    loaded, rows = loaded_net(bias)
    settings = PruneSettings(**{**vars(EXACT), "compensate": compensate, "ridge": 1e-9})
    structure = find_structure(loaded)
    mean = rows.mean(0)
    moments = {"2": Moments(ROWS, mean[None], ((rows - mean).T @ (rows - mean) / ROWS)[None])}
    curves = removal_curves(loaded.model, structure, moments, settings)
    probe = next(samples().batches(20))
    found = amplification(loaded, structure, curves, moments, settings, probe, share=0.5)

    kept = torch.ones(WIDTH, dtype=torch.bool)
    kept[curves["0"].order[:6]] = False
    reader = loaded.model[2]
    weight = reader.weight.double()
    counted = rows - mean if bias else rows
    second = counted.T @ counted / ROWS
    share = oracle_share(second, ROWS)
    second = (1 - share) * second + share * second.trace() / WIDTH * torch.eye(WIDTH, dtype=torch.float64)
    best = torch.zeros_like(weight)
    best[:, kept] = regression(counted, weight, kept, 1e-9)
    # Curves price every compensation by least squares, in the matrix that was solved with.
    cost = float(((weight - best) @ second @ (weight - best).T).trace())
    written = best if compensate == "lstsq" else weight * kept
    takes_mean = bias and compensate == "lstsq"
    shift = (weight - written) @ mean if takes_mean else 0.0
    hidden = loaded.model[1](loaded.model[0](probe)).double()
    dense = hidden @ weight.T + (reader.bias.double() if bias else 0.0)
    changed = hidden @ written.T + (reader.bias.double() if bias else 0.0) + shift
    divergence = F.kl_div(changed.log_softmax(-1), dense.log_softmax(-1), log_target=True, reduction="batchmean")
    assert float(curves["0"].cost[6]) == pytest.approx(cost, rel=1e-3)
    assert found == {"0": pytest.approx(float(divergence) / cost, rel=1e-3)}
