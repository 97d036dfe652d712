"""Cells on shared moments are the runs that they stand for."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor, nn

from modhifi.data.samples import Samples
from modhifi.data.sources import load_samples
from modhifi.errors import IndefiniteError, ModhifiError
from modhifi.models.load import load_model
from modhifi.models.loaded import LoadedModel
from modhifi.pruning import grid
from modhifi.pruning.budget import Budget
from modhifi.pruning.compensations import COMPENSATIONS
from modhifi.pruning.prune import prune_model
from modhifi.pruning.selectors import SELECTORS
from modhifi.pruning.settings import PruneSettings


@pytest.fixture(scope="module")
def given() -> tuple[LoadedModel, Samples]:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 12, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()]
    data = torch.randn(24, 3, 9, 9)
    loaded = load_model(nn.Sequential(*layers, nn.Linear(48, 5)), example=data[:2])
    return loaded, load_samples(data, loaded, n=24)


@pytest.mark.parametrize("layout", ["global", "uniform"])
def test_a_cell_is_the_run_that_it_stands_for(given: tuple[LoadedModel, Samples], layout: str) -> None:
    loaded, samples = given
    common = PruneSettings(layout=layout)
    measured = grid.measure_once(loaded, samples, common)
    for selector in SELECTORS:
        settings = [replace(common, selector=selector, compensate=compensate) for compensate in COMPENSATIONS]
        ordered, curves = grid.order_once(measured, settings)
        for share, chosen in product((0.6, 0.4), settings):
            budget = Budget("components", share)
            cell = grid.prune_measured(ordered, curves, budget, chosen)
            alone = prune_model(loaded, samples, budget, chosen)
            assert cell.plan.kept == alone.plan.kept
            for one, other in zip(cell.model.parameters(), alone.model.parameters(), strict=True):
                assert torch.equal(one, other)


def test_groups_that_cannot_be_solved_stay(given: tuple[LoadedModel, Samples], monkeypatch: pytest.MonkeyPatch) -> None:
    loaded, samples = given
    measured = grid.measure_once(loaded, samples, PruneSettings())
    first, *others = (g.name for g in measured.structure.prunable)
    original = grid.removal_curves

    def unsolved(model: nn.Module, structure, *rest: object) -> dict[str, Tensor]:
        if any(g.name == first for g in structure.prunable):
            raise IndefiniteError([first])
        return original(model, structure, *rest)

    monkeypatch.setattr(grid, "removal_curves", unsolved)
    ordered, curves = grid.order_once(measured, [PruneSettings()])
    assert list(curves) == others and list(ordered.left) == [first]
    with pytest.raises(ModhifiError, match="cannot be pruned"):
        grid.order_once(measured, [PruneSettings(strict=True)])
