"""Readers compensated one after the other: on the inputs of the pruned prefix, which is computed once."""

from __future__ import annotations

import copy
from collections import Counter
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from counting import counted
from torch import Tensor, nn

from modhifi.bounds.held_out import tabulate
from modhifi.calibration.im2col import reader_rows
from modhifi.calibration.sampling import Sampling
from modhifi.data.samples import Samples
from modhifi.data.sources import load_samples
from modhifi.models.hooks import batch_statistics, on_input
from modhifi.models.load import load_model
from modhifi.models.loaded import LoadedModel
from modhifi.pruning.allocation import Budget
from modhifi.pruning.editing import edited_readers
from modhifi.pruning.prune import prune_model
from modhifi.pruning.sequential import PairedPasses, edit_sequentially, written_modules
from modhifi.pruning.settings import PruneSettings
from modhifi.pruning.stages import find_structure, measure_moments
from modhifi.structure.clone import clone
from modhifi.structure.operators import columns_of, weight_matrix


@pytest.fixture(scope="module")
def loaded(model_dir: Path) -> LoadedModel:
    return load_model(model_dir)


@pytest.fixture(scope="module")
def samples(loaded: LoadedModel, image_dir: Path) -> Samples:
    return load_samples(f"images:{image_dir}", loaded, n=48)


def logits(loaded: LoadedModel, model: nn.Module, samples: Samples) -> Tensor:
    with torch.no_grad():
        return loaded.logits(next(samples.batches(16)), model)


@pytest.mark.parametrize("target", ["own", "dense"])
def test_sequential_is_one_shot_for_the_first_reader(loaded: LoadedModel, samples: Samples, target: str) -> None:
    """Nothing is pruned before the first edited reader: all targets coincide there."""
    only = PruneSettings(only=("layer2.0.conv1",))
    once = prune_model(loaded, samples, Budget("components", 0.5), only)
    again = prune_model(loaded, samples, Budget("components", 0.5), PruneSettings(only=only.only, sequential=target))
    torch.testing.assert_close(
        logits(loaded, once.model, samples), logits(loaded, again.model, samples), rtol=1e-3, atol=1e-4
    )


def test_sequential_towards_the_dense_output_lowers_the_output_error(loaded: LoadedModel, samples: Samples) -> None:
    def error(sequential: str | None) -> float:
        settings = PruneSettings(layout="uniform", sequential=sequential)
        pruned = prune_model(loaded, samples, Budget("macs", 0.5), settings)
        return tabulate(loaded, pruned.model, samples, 64).relative_error

    assert error("dense") < error(None)


@pytest.mark.parametrize("target, models", [("own", 1), ("dense", 2)])
def test_every_layer_runs_once_in_each_model(loaded: LoadedModel, samples: Samples, target: str, models: int) -> None:
    """Depth costs one pass over the data in each model that runs, and one on the example.

    What a reader makes of the edited prefix by its own dense weights is one more run of that reader.
    """
    settings = PruneSettings(layout="uniform", weighting="energy", batch_size=16)
    pruned = prune_model(loaded, samples, Budget("macs", 0.5), settings)
    moments = measure_moments(loaded, pruned.structure, samples, settings.sampling)
    settings = replace(settings, sequential=target)
    with counted(nn.Conv2d) as convolutions:
        removed = edited_readers(pruned.structure, pruned.plan)
        errors = edit_sequentially(loaded, clone(loaded.model), pruned.structure, removed, samples, moments, settings)
    readers = [loaded.model.get_submodule(error.reader) for error in errors]
    layers = [m for m in loaded.model.modules() if isinstance(m, nn.Conv2d)]
    batches, example = 3, 1
    assert len(readers) > 10 and len(layers) > 20
    twice = sum(isinstance(m, nn.Conv2d) for m in readers) if target == "own" else 0
    assert sum(convolutions.values()) <= len(layers) * (models * batches + example) + twice * batches


def normalising_alike(loaded: LoadedModel, model: nn.Module, batch: Tensor) -> nn.Module:
    """A copy whose BatchNorms remember what the dense model's see of a batch where each normalises by it."""
    copied, dense = copy.deepcopy(model), copy.deepcopy(loaded.model)
    with ExitStack() as stack:
        for name, norm in dense.named_modules():
            if isinstance(norm, nn.BatchNorm2d):
                own, shift = copied.get_submodule(name), model.get_submodule(name).running_mean - norm.running_mean

                def see(x: Tensor, own: nn.BatchNorm2d = own, shift: Tensor = shift) -> None:
                    own.running_mean, own.running_var = x.mean((0, 2, 3)) + shift, x.var((0, 2, 3), correction=0)

                stack.enter_context(on_input(norm, see))
        stack.enter_context(batch_statistics(dense))
        loaded.logits(batch, dense)
    return copied


@torch.no_grad()
def inputs_of(loaded: LoadedModel, model: nn.Module, reader: str, samples: Samples, size: int, alike: bool) -> Tensor:
    """All rows that a reader sees in whole passes, ``(G, d, r)``."""
    rows = list[Tensor]()
    for batch in samples.batches(size):
        used = normalising_alike(loaded, model, batch) if alike else model
        module = used.get_submodule(reader)
        with on_input(module, lambda x, module=module: rows.append(reader_rows(module, x))):
            with batch_statistics(used, samples.adapted and not alike):
                loaded.logits(batch, used)
    return torch.cat(rows, 2)


@pytest.mark.parametrize("most_bytes, least, most", [(0, 0, 0), (4_000, 1, 2), (2**30, 3, 3)])
@pytest.mark.parametrize("synthetic", [False, True])
@pytest.mark.parametrize("dense", [False, True])
def test_paired_moments_are_those_of_whole_passes(
    loaded: LoadedModel, samples: Samples, dense: bool, synthetic: bool, most_bytes: float, least: int, most: int
) -> None:
    """Whatever is remembered, and whichever statistics BatchNorm takes on synthetic samples."""
    samples = replace(samples, synthetic=synthetic)
    structure, edited = find_structure(loaded), copy.deepcopy(loaded.model)
    readers = [name for name in structure.operators if "layer" in name][::3]
    passes = PairedPasses(
        loaded, edited, readers, samples, Sampling(None, batch_size=20), dense, most_bytes * (1 + dense)
    )
    for number, reader in enumerate(readers):
        passes.advance(*(written_modules(structure, readers[at:]) for at in (number, number + 1)))
        module = edited.get_submodule(reader)
        groups, width = columns_of(module)
        columns = torch.arange(0, width, 2).expand(groups, -1)
        moments = passes.moments(reader, columns)
        alike = dense and synthetic
        x = inputs_of(loaded, edited, reader, samples, 20, alike).double()
        y = inputs_of(loaded, loaded.model if dense else edited, reader, samples, 20, alike).double()
        y = weight_matrix(module) @ y
        x, n = x[:, ::2], x.shape[2]
        found = moments.uncentred
        assert moments.n == n
        pairs = [
            (moments.mean, x.mean(2)),
            (moments.target, y.mean(2)),
            (moments.cov, torch.stack([torch.cov(part, correction=0) for part in x])),
            (found.cov, x @ x.mT / n),
            (found.cross, y @ x.mT / n),
            (moments.cross, y @ (x - x.mean(2)[:, :, None]).mT / n),
            (found.energy, y.square().mean(2)),
            (moments.energy, y.var(2, correction=0)),
        ]
        for value, expected in pairs:
            torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-4)
        caches = [cache for cache in (passes.edited, passes.dense) if cache is not None]
        assert sum(r.nbytes for cache in caches for r in cache.remembered.values()) <= most_bytes * (1 + dense)
        for name in written_modules(structure, [reader]):
            edited.get_submodule(name).weight.mul_(1.5)
            if isinstance(norm := edited.get_submodule(name), nn.BatchNorm2d):
                norm.running_mean.sub_(0.1)
    assert all(least <= len(cache.remembered) <= most for cache in caches)


def test_an_item_is_loaded_once_for_all_readers(loaded: LoadedModel, samples: Samples) -> None:
    loads: Counter[int] = Counter()

    def load(index: int) -> Tensor:
        loads[index] += 1
        return samples.load(index)

    structure = find_structure(loaded)
    readers = [name for name in structure.operators if "layer" in name][:4]
    counting = replace(samples, load=load)
    passes = PairedPasses(loaded, copy.deepcopy(loaded.model), readers, counting, Sampling(2, batch_size=16))
    loads.clear()
    for number, reader in enumerate(readers):
        passes.advance(*(written_modules(structure, readers[at:]) for at in (number, number + 1)))
        passes.moments(reader, torch.arange(columns_of(loaded.model.get_submodule(reader))[1])[None])
    assert set(loads.values()) == {1} and loads.total() >= len(samples) - 1  # the first was looked at before
