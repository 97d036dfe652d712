"""Readers of fewer rows than columns give the same plan and weights in the span of their rows as with their Grams."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from modhifi.calibration.gram_quality import gram_quality
from modhifi.calibration.moments import Spanned
from modhifi.data.in_memory import samples_from
from modhifi.data.samples import Samples
from modhifi.models.load import load_model
from modhifi.models.loaded import LoadedModel
from modhifi.pruning.budget import Budget
from modhifi.pruning.prune import prune_model
from modhifi.pruning.settings import PruneSettings
from modhifi.pruning.stages import Pruned, find_structure, measure_moments

SAMPLES = 40


class Flattened(nn.Module):
    """A classifier that reads every position of every channel, with or without a place for its mean."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU())
        self.wide = nn.Linear(12 * 16, 10, bias=bias)
        self.last = nn.Linear(10, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.wide(self.conv(x).flatten(1)).relu())


def world(bias: bool) -> tuple[LoadedModel, Samples]:
    torch.manual_seed(0)
    images = torch.randn(SAMPLES, 3, 4, 4)
    loaded = load_model(Flattened(bias).eval(), example=images[:2])
    return loaded, samples_from(images, loaded, n=SAMPLES, seed=0)


def pruned(loaded: LoadedModel, samples: Samples, settings: PruneSettings) -> Pruned:
    return prune_model(loaded, samples, Budget("macs", 0.5), settings)


@pytest.mark.parametrize("bias", [False, True], ids=["without bias", "with bias"])
@pytest.mark.parametrize("part", [1, 2**24], ids=["few weights at a time", "all weights at once"])
@pytest.mark.parametrize("how", ["obs", "obs behind norms", "dense", "own", "energy", "naive", "wanda", "delta"])
def test_the_span_of_the_rows_gives_the_same_plan(
    bias: bool, how: str, part: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, samples = world(bias)
    settings = PruneSettings(rows_per_column=None, behind_norms=how == "obs behind norms")
    if how in ("dense", "own"):
        settings = replace(settings, sequential=how)
    elif how == "delta":
        settings = replace(settings, compensate=how)
    elif not how.startswith("obs"):
        settings = replace(settings, selector=how)
    with_grams = pruned(loaded, samples, settings)
    monkeypatch.setattr("modhifi.calibration.accumulator.LARGE", 0)
    monkeypatch.setattr("modhifi.pruning.span_surgeon.PART", part)
    moments = measure_moments(loaded, find_structure(loaded), samples, settings.sampling)
    assert isinstance(moments["wide"], Spanned) and not isinstance(moments["last"], Spanned)
    spanned = pruned(loaded, samples, settings)
    assert spanned.plan.kept == with_grams.plan.kept
    for name, curve in with_grams.curves.items():
        other = spanned.curves[name]
        assert torch.equal(other.order, curve.order)
        torch.testing.assert_close(other.cost, curve.cost, rtol=1e-5, atol=1e-9)
        torch.testing.assert_close(other.fidelity, curve.fidelity, rtol=1e-5, atol=1e-7)
        assert other.energy == pytest.approx(curve.energy, rel=1e-5)
    for value, expected in zip(spanned.model.parameters(), with_grams.model.parameters(), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-3, atol=1e-5)
    for error, expected_error in zip(spanned.errors, with_grams.errors, strict=True):
        assert error.error == pytest.approx(expected_error.error, rel=1e-3)
        assert error.energy == pytest.approx(expected_error.energy, rel=1e-3)
    for quality, expected_quality in zip(spanned.grams, with_grams.grams, strict=True):
        assert quality.rank == pytest.approx(expected_quality.rank, rel=1e-4)
    assert gram_quality({"last": moments["last"]})[0].width == 10
