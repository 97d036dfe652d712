from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch

from modhifi.calibration.batchnorm import reestimate_batchnorm
from modhifi.calibration.sampling import Sampling
from modhifi.data.in_memory import samples_from
from modhifi.data.samples import Samples
from modhifi.data.sources import load_samples
from modhifi.errors import ModhifiError
from modhifi.models.load import load_model
from modhifi.models.loaded import LoadedModel
from modhifi.pruning.budget import Budget
from modhifi.pruning.curves import removal_curves
from modhifi.pruning.linalg import shrinkage
from modhifi.pruning.local_error import local_error
from modhifi.pruning.prune import prune_model
from modhifi.pruning.readers import applied_second
from modhifi.pruning.selectors import SELECTORS
from modhifi.pruning.settings import PruneSettings
from modhifi.pruning.stages import apply_plan, choose_groups, find_structure, make_plan, measure_moments
from modhifi.runs import measure
from modhifi.structure.expand import expand
from modhifi.structure.operators import weight_matrix


@pytest.fixture(scope="module")
def loaded(model_dir: Path) -> LoadedModel:
    return load_model(model_dir)


@pytest.fixture(scope="module")
def samples(loaded: LoadedModel, image_dir: Path) -> Samples:
    return load_samples(f"images:{image_dir}", loaded, n=48)


def logits(loaded: LoadedModel, model: torch.nn.Module, samples: Samples) -> torch.Tensor:
    with torch.no_grad():
        return loaded.logits(next(samples.batches(16)), model)


@pytest.mark.parametrize("budget", [Budget("components", 0.5), Budget("macs", 0.5), Budget("parameters", 0.5)])
@pytest.mark.parametrize("layout", ["global", "uniform"])
def test_budgets_are_met_and_both_shapes_agree(
    loaded: LoadedModel, samples: Samples, budget: Budget, layout: str
) -> None:
    before = copy.deepcopy(loaded.model.state_dict())
    pruned = prune_model(loaded, samples, budget, PruneSettings(layout=layout, weighting="energy"))
    twin = expand(pruned.model, loaded.model, pruned.structure, pruned.plan)
    torch.testing.assert_close(
        logits(loaded, pruned.model, samples), logits(loaded, twin, samples), rtol=1e-4, atol=1e-5
    )
    if budget.measure == "macs":
        reached = measure.count_flops(pruned.model, loaded.example) / measure.count_flops(loaded.model, loaded.example)
    elif budget.measure == "parameters":
        reached = measure.count_parameters(pruned.model) / measure.count_parameters(loaded.model)
    else:
        kept = sum(len(pruned.plan.kept.get(g.name, range(g.n))) for g in pruned.structure.prunable)
        reached = kept / sum(g.n for g in pruned.structure.prunable)
    assert abs(reached / budget.keep - 1) <= 0.02
    assert all(torch.equal(value, before[name]) for name, value in loaded.model.state_dict().items())


def test_predicted_local_error_is_the_error_that_is_made(loaded: LoadedModel, samples: Samples) -> None:
    """The curve's cost is the local error of the weights written, in the matrix that was solved with."""
    settings = PruneSettings(only=("layer3.1.conv1",), ridge=1e-8)
    structure = choose_groups(find_structure(loaded), settings)
    pruned = prune_model(loaded, samples, Budget("components", 0.5), settings)
    reader, name = structure.prunable[0].readers[0].module, structure.prunable[0].name
    twin = expand(pruned.model, loaded.model, pruned.structure, pruned.plan)
    before, after = (weight_matrix(m.get_submodule(reader))[0] for m in (loaded.model, twin))
    moments = measure_moments(loaded, structure, samples, settings.sampling)[reader]
    second = applied_second(moments, structure.operators[reader].sink)[0]
    assert local_error(before, after, second)[0] == pytest.approx(pruned.plan.removal_cost[name], rel=1e-3)
    assert 0 < pruned.errors[0].relative < 1


def test_few_rows_shrink_towards_the_identity_and_many_do_not() -> None:
    generator = torch.Generator().manual_seed(0)
    shares = []
    for rows in (20, 200, 20000):
        x = torch.randn(rows, 50, generator=generator, dtype=torch.float64) * torch.linspace(0.1, 3, 50)
        shares.append(float(shrinkage((x.T @ x / rows)[None], rows)))
    assert 1 > shares[0] > shares[1] > shares[2] > 0 and shares[2] < 0.01


def test_better_methods_make_smaller_local_errors(loaded: LoadedModel, samples: Samples) -> None:
    def local(selector: str, compensate: str) -> float:
        settings = PruneSettings(selector=selector, compensate=compensate, layout="uniform", coupled=False)
        pruned = prune_model(loaded, samples, Budget("components", 0.5), settings)
        return sum(e.error for e in pruned.errors)

    assert local("obs", "lstsq") < local("naive", "lstsq") < local("naive", "delta") < local("naive", "none")


def test_hifi_sets_of_full_fidelity_keep_every_useful_component(loaded: LoadedModel, samples: Samples) -> None:
    settings = PruneSettings(eta=0.5, selector="naive", compensate="delta", coupled=False)
    some = prune_model(loaded, samples, None, settings)
    most = prune_model(loaded, samples, None, PruneSettings(eta=0.99, coupled=False))
    sizes = [
        sum(len(k) for k in p.plan.kept.values()) + sum(g.n for g in p.structure.prunable if g.name not in p.plan.kept)
        for p in (some, most)
    ]
    assert sizes[0] < sizes[1]


def test_a_plan_is_replayed(loaded: LoadedModel, samples: Samples) -> None:
    first = prune_model(loaded, samples, Budget("macs", 0.6), PruneSettings(weighting="energy"))
    second = prune_model(loaded, samples, None, PruneSettings(), plan=first.plan)
    assert second.plan.kept == first.plan.kept
    torch.testing.assert_close(logits(loaded, first.model, samples), logits(loaded, second.model, samples))


def test_patterns_choose_groups(loaded: LoadedModel) -> None:
    structure = find_structure(loaded)
    assert {g.name for g in choose_groups(structure, PruneSettings(only=("layer2*",))).prunable} == {
        g.name for g in structure.prunable if g.name.startswith("layer2")
    }
    assert not any(g.coupled for g in choose_groups(structure, PruneSettings(coupled=False)).prunable)
    with pytest.raises(ModhifiError, match="matches no group"):
        choose_groups(structure, PruneSettings(exclude=("nothing*",)))
    with pytest.raises(ModhifiError, match="no group"):
        choose_groups(structure, PruneSettings(exclude=("*",)))


def test_a_gram_too_large_for_memory_is_refused_before_anything_is_measured(
    loaded: LoadedModel, samples: Samples, monkeypatch: pytest.MonkeyPatch
) -> None:
    structure = find_structure(loaded)
    monkeypatch.setattr("modhifi.calibration.memory.free_bytes", lambda device: 100_000)
    with pytest.raises(ModhifiError, match="--exclude") as caught:
        measure_moments(loaded, structure, samples, Sampling())
    name = str(caught.value).split()[-1]
    assert name in {g.name for g in structure.prunable}


BLIND = [name for name, selector in SELECTORS.items() if not selector.needs_moments]


@pytest.mark.parametrize("selector", BLIND)
@pytest.mark.parametrize("name", ["plain", "grouped", "halves", "model_dir"])
def test_a_run_that_reads_no_moments_collects_none(
    loaded: LoadedModel, samples: Samples, name: str, selector: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name != "model_dir":
        model, _ = tiny.pattern(name)
        x = torch.randn(24, 3, 12, 12)
        loaded = load_model(model.float(), example=x[:2])
        samples = samples_from(x, loaded, n=24, seed=0)
    settings = PruneSettings(selector=selector, compensate="none", layout="uniform", seed=3)
    structure = choose_groups(find_structure(loaded), settings)
    moments = measure_moments(loaded, structure, samples, settings.sampling)
    curves = removal_curves(loaded.model, structure, moments, settings)
    plan = make_plan(loaded.model, structure, curves, Budget("components", 0.5), settings)
    expected = apply_plan(loaded, structure, plan, moments, settings)

    def refuse(*args: object, **options: object) -> None:
        raise AssertionError("moments are collected")

    monkeypatch.setattr("modhifi.pruning.prune.measure_moments", refuse)
    for given in (None, plan):
        pruned = prune_model(loaded, samples, None if given else Budget("components", 0.5), settings, plan=given)
        assert pruned.plan.kept == plan.kept and not pruned.errors and not pruned.grams
        assert pruned.model.state_dict().keys() == expected.model.state_dict().keys()
        for key, value in expected.model.state_dict().items():
            assert torch.equal(pruned.model.state_dict()[key], value)
    for change in ({"layout": "global"}, {"compensate": "delta"}, {"selector": "obs"}, {"eta": 0.9}):
        with pytest.raises(AssertionError, match="moments are collected"):
            prune_model(loaded, samples, Budget("components", 0.5), replace(settings, **change))


def test_reestimated_statistics_are_those_of_the_data(loaded: LoadedModel, samples: Samples) -> None:
    model = copy.deepcopy(loaded.model)
    reestimate_batchnorm(model, loaded, samples, 48)
    seen: list[torch.Tensor] = []
    model.bn1.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    with torch.no_grad():
        loaded.logits(next(samples.batches(48)), model)
    torch.testing.assert_close(model.bn1.running_mean, seen[0].mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    assert not model.bn1.training


def test_the_twin_carries_reestimated_statistics(loaded: LoadedModel, samples: Samples) -> None:
    pruned = prune_model(loaded, samples, Budget("components", 0.5), PruneSettings(weighting="energy"))
    before = expand(pruned.model, loaded.model, pruned.structure, pruned.plan)
    reestimate_batchnorm(pruned.model, loaded, samples, 48)
    twin = expand(pruned.model, loaded.model, pruned.structure, pruned.plan)
    outputs = logits(loaded, pruned.model, samples)
    torch.testing.assert_close(outputs, logits(loaded, twin, samples), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(outputs, logits(loaded, before, samples), rtol=1e-3)
