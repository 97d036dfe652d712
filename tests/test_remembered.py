"""What a BatchNorm remembers corrects the moments of synthetic data."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from modhifi import stages
from modhifi.data import load_samples
from modhifi.load import load_model
from modhifi.moments import Moments
from modhifi.readers import weight_matrix
from modhifi.remembered import remembered
from modhifi.settings import PruneSettings
from modhifi.stages import find_structure, measure_moments


def drawn(groups: int, out: int, width: int) -> tuple[Moments, torch.Tensor]:
    torch.manual_seed(0)
    root = torch.randn(groups, width, width, dtype=torch.float64)
    cov = root @ root.transpose(1, 2) / width
    mean = torch.randn(groups, width, dtype=torch.float64)
    return Moments(100, mean, cov), torch.randn(groups, out, width, dtype=torch.float64)


@pytest.mark.parametrize("groups", [1, 3])
def test_the_output_takes_the_remembered_mean_and_variances_and_keeps_its_correlations(groups):
    moments, weight = drawn(groups, 4, 10)
    before = (weight @ moments.mean[:, :, None]).flatten()
    scatter = (weight @ moments.cov @ weight.transpose(1, 2)).diagonal(dim1=1, dim2=2).flatten()
    mean, var = before + 0.05 * scatter.sqrt() * torch.randn(4 * groups), scatter * (0.8 + 0.3 * torch.rand(4 * groups))
    after = remembered(moments, weight, mean, var)
    assert torch.allclose((weight @ after.mean[:, :, None]).flatten(), mean, atol=1e-9)
    output = weight @ after.cov @ weight.transpose(1, 2)
    assert torch.allclose(output.diagonal(dim1=1, dim2=2).flatten(), var, rtol=1e-9)
    for old, new in zip(weight @ moments.cov @ weight.transpose(1, 2), output, strict=True):
        assert torch.allclose(_correlation(old), _correlation(new), atol=1e-9)
    assert float(torch.linalg.eigvalsh(after.cov).min()) > -1e-9


def _correlation(cov: torch.Tensor) -> torch.Tensor:
    scale = cov.diagonal().rsqrt()
    return scale[:, None] * cov * scale


def test_what_the_output_does_not_see_stays_and_right_statistics_change_nothing():
    moments, weight = drawn(1, 3, 8)
    mean = (weight @ moments.mean[:, :, None]).flatten()
    var = (weight @ moments.cov @ weight.transpose(1, 2)).diagonal(dim1=1, dim2=2).flatten()
    same = remembered(moments, weight, mean, var)
    assert torch.allclose(same.cov, moments.cov, atol=1e-9) and torch.allclose(same.mean, moments.mean, atol=1e-9)
    changed = remembered(moments, weight, mean + 0.1, 2 * var)
    # what is left of x when its best guess from y is taken away
    gain = torch.linalg.solve(weight[0] @ moments.cov[0] @ weight[0].T, weight[0] @ moments.cov[0]).T
    rest = torch.eye(8, dtype=torch.float64) - gain @ weight[0]
    assert torch.allclose(rest @ changed.cov[0] @ rest.T, rest @ moments.cov[0] @ rest.T, atol=1e-9)
    assert torch.allclose(rest @ changed.mean[0], rest @ moments.mean[0], atol=1e-9)
    assert torch.allclose(weight[0] @ changed.cov[0] @ weight[0].T, 2 * weight[0] @ moments.cov[0] @ weight[0].T)


def test_statistics_that_contradict_each_other_change_no_direction_much():
    moments, weight = drawn(1, 20, 8)  # more outputs than inputs: their variances cannot be chosen freely
    weight[0, 1] = 0
    after = remembered(moments, weight, torch.full((20,), 50.0), 10 ** torch.linspace(-3, 3, 20))
    sizes = torch.linalg.eigvals(torch.linalg.solve(moments.cov[0], after.cov[0])).real
    assert 0.249 < float(sizes.min()) < float(sizes.max()) < 4.001
    shift = after.mean[0] - moments.mean[0]
    assert float(shift @ torch.linalg.solve(moments.cov[0], shift)) <= 8.001
    same = remembered(moments, 0 * weight, torch.ones(20), torch.ones(20))
    assert torch.equal(same.cov, moments.cov) and torch.equal(same.mean, moments.mean)


def test_moments_of_synthetic_images_give_what_the_norms_remember_and_real_ones_do_not(monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 64, 4),
    )  # fmt: skip
    loaded = load_model(model.eval(), example=torch.randn(2, 3, 8, 8))
    model = loaded.model
    model[1].momentum = model[4].momentum = None
    with torch.no_grad():
        model.train()(next(load_samples("synthetic:textures", loaded, n=64, balanced=False).batches(64)))
        model.eval()
    structure = find_structure(loaded)
    assert structure.operators["3"].sink == "bias" and structure.operators["3"].norm == "4"
    settings = PruneSettings(rows_per_column=None)
    made = load_samples("synthetic", loaded, n=16, balanced=False)
    weight, bias = weight_matrix(model[3])[0], model[3].bias.detach().double()

    def gaps() -> tuple[float, float]:
        found = measure_moments(loaded, structure, made, settings)["3"]
        mean, variance = weight @ found.mean[0] + bias, (weight @ found.cov[0] @ weight.T).diagonal()
        norm = model[4]
        return float((mean - norm.running_mean).norm()), float((variance / norm.running_var).log().norm())

    after = gaps()
    monkeypatch.setattr(stages, "as_remembered", lambda model, structure, found: found)
    before = gaps()
    assert after[0] < 0.3 * before[0] and after[1] < 0.3 * before[1]
    real = load_samples([made.load(i) for i in range(16)], loaded, n=16)
    monkeypatch.undo()
    found = measure_moments(loaded, structure, real, settings)["3"]
    assert float((weight @ found.mean[0] + bias - model[4].running_mean).norm()) > 2 * after[0]
