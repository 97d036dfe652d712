"""What a cut does to the output is measured, of single groups and of whole plans, and the model stays as it was."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import tiny_text
import torch

from modhifi.data.samples import Samples
from modhifi.data.sources import load_samples
from modhifi.models.load import load_model
from modhifi.models.loaded import LoadedModel
from modhifi.pruning.budget import Budget
from modhifi.pruning.curves import removal_curves
from modhifi.pruning.layouts.base import Rounding
from modhifi.pruning.output_change import PROBES, output_change
from modhifi.pruning.prune import prune_model
from modhifi.pruning.sensitivity import amplification, best_plan, plans_between, ways_to_plan
from modhifi.pruning.settings import PruneSettings
from modhifi.pruning.stages import apply_plan, choose_groups, find_structure, make_plan, measure_moments

SETTINGS = PruneSettings(rows_per_column=None, batch_size=4, only=("neurons",))


@pytest.fixture(scope="module")
def language() -> LoadedModel:
    return load_model(tiny_text.llama(num_hidden_layers=3))


@pytest.fixture(scope="module")
def tokens() -> Samples:
    items = torch.randint(3, tiny_text.VOCABULARY, (8, 12), generator=torch.Generator().manual_seed(0))
    names = tuple(map(str, range(8)))
    return Samples(lambda i: items[i], names, None, names, "tokens", False)


def test_amplification_is_the_measured_effect_of_one_group(model_dir: Path, image_dir: Path) -> None:
    loaded = load_model(model_dir)
    samples = load_samples(f"images:{image_dir}", loaded, n=48)
    settings = PruneSettings(only=("layer4.1.conv1", "layer1.0.conv1"))
    structure = choose_groups(find_structure(loaded), settings)
    moments = measure_moments(loaded, structure, samples, settings.sampling)
    curves = removal_curves(loaded.model, structure, moments, settings)
    probe = next(samples.batches(16))
    before = copy.deepcopy(loaded.model.state_dict())
    weights = amplification(loaded, structure, curves, moments, settings, probe)
    assert set(weights) == {g.name for g in structure.prunable} and all(w > 0 for w in weights.values())
    assert all(torch.equal(value, before[name]) for name, value in loaded.model.state_dict().items())


def test_the_plan_that_changes_the_output_least_is_taken(language: LoadedModel, tokens: Samples) -> None:
    structure = choose_groups(find_structure(language), SETTINGS)
    moments = measure_moments(language, structure, tokens, SETTINGS.sampling)
    curves = removal_curves(language.model, structure, moments, SETTINGS)
    probe, budget = next(tokens.batches(4)), Budget("components", 0.625)
    # Weights that were measured wrongly: the first layer seems to matter to nothing.
    weights = {g.name: 1e-9 if i == 0 else 1.0 for i, g in enumerate(structure.prunable)}
    allocated = make_plan(language.model, structure, curves, budget, SETTINGS, weights)
    ways = ways_to_plan(language, structure, SETTINGS, allocated)
    plans = plans_between(language, ways, curves, budget, weights)
    assert list(plans) == ["allocated, floor 0.1", "allocated, floor 0.36", "uniform"]
    kept = {name: [len(plan.kept.get(g.name, range(g.n))) for g in structure.prunable] for name, plan in plans.items()}
    assert kept["allocated, floor 0.1"][0] < kept["allocated, floor 0.36"][0] < kept["uniform"][0]
    assert len(set(kept["uniform"])) == 1 and len({sum(widths) for widths in kept.values()}) == 1
    before = copy.deepcopy(language.model.state_dict())
    name, tried = best_plan(language, structure, plans, moments, SETTINGS, probe)
    assert all(torch.equal(value, before[name]) for name, value in language.model.state_dict().items())
    assert name == min(tried, key=tried.__getitem__) and set(tried) == set(plans)
    with torch.no_grad():
        for name, value in tried.items():
            edited = apply_plan(language, structure, plans[name], moments, SETTINGS).model
            found = output_change(language.logits(probe), language.logits(probe, edited))
            assert value == pytest.approx(found, rel=1e-3)


def test_an_allocation_of_a_language_model_is_no_worse_than_equal_widths(
    language: LoadedModel, tokens: Samples
) -> None:
    pruned = prune_model(language, tokens, Budget("components", 0.625), SETTINGS)
    assert len(pruned.tried) == 3 and min(pruned.tried.values()) <= pruned.tried["uniform"]
    probe = next(tokens.batches(PROBES[0]))
    with torch.no_grad():
        change = output_change(language.logits(probe), language.logits(probe, pruned.model))
    assert change == pytest.approx(min(pruned.tried.values()), rel=1e-3)


def test_equal_widths_that_miss_the_budget_are_left_out(language: LoadedModel, tokens: Samples) -> None:
    settings = PruneSettings(rows_per_column=None, batch_size=4, only=("neurons",), rounding=Rounding(12))
    pruned = prune_model(language, tokens, Budget("components", 5 / 6), settings)
    assert "uniform" not in pruned.tried and pruned.tried
