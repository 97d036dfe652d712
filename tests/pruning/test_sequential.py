"""Readers compensated one after the other: on the inputs of the pruned prefix, which is computed once."""

from __future__ import annotations

import copy
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
from modhifi.pruning.prune import prune_model
from modhifi.pruning.sequential import PairedPasses, edit_sequentially, written_modules
from modhifi.pruning.settings import PruneSettings
from modhifi.pruning.stages import find_structure


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


def test_every_layer_runs_once_in_each_model(loaded: LoadedModel, samples: Samples) -> None:
    """The prefix before a reader is remembered, so that depth costs two passes over the data and one on the example."""
    settings = PruneSettings(layout="uniform", weighting="energy", batch_size=16)
    pruned = prune_model(loaded, samples, Budget("macs", 0.5), settings)
    with counted(nn.Conv2d) as convolutions:
        _, errors = edit_sequentially(
            loaded, pruned.structure, pruned.plan, samples, replace(settings, sequential="dense")
        )
    layers = [m for m in loaded.model.modules() if isinstance(m, nn.Conv2d)]
    batches, example = 3, 1
    assert len(errors) > 10 and len(layers) > 20
    assert all(convolutions[layer] <= batches + example for layer in layers)
    assert sum(convolutions.values()) <= len(layers) * (2 * batches + example)


def inputs_of(loaded: LoadedModel, model: nn.Module, reader: str, samples: Samples, size: int) -> Tensor:
    """All rows that a reader sees in whole passes, ``(G, d, r)``."""
    module, rows = model.get_submodule(reader), list[Tensor]()
    with on_input(module, lambda x: rows.append(reader_rows(module, x))), batch_statistics(model, samples.adapted):
        with torch.no_grad():
            for batch in samples.batches(size):
                loaded.logits(batch, model)
    return torch.cat(rows, 2)


@pytest.mark.parametrize("most_bytes, least, most", [(0, 0, 0), (8_000, 1, 2), (2**30, 3, 3)])
@pytest.mark.parametrize("synthetic", [False, True])
def test_paired_moments_are_those_of_whole_passes(
    loaded: LoadedModel, samples: Samples, synthetic: bool, most_bytes: float, least: int, most: int
) -> None:
    """Whatever is remembered, and where every edit changes the batch statistics behind it."""
    samples = replace(samples, synthetic=synthetic)
    structure, edited = find_structure(loaded), copy.deepcopy(loaded.model)
    readers = [name for name in structure.operators if "layer" in name][::3]
    passes = PairedPasses(loaded, edited, samples, Sampling(None, batch_size=20), most_bytes)
    for number, reader in enumerate(readers):
        passes.advance(written_modules(structure, readers[number:]))
        moments = passes.moments(reader)
        rows = [inputs_of(loaded, model, reader, samples, 20).double() for model in (loaded.model, edited)]
        paired = torch.cat(rows, 1)
        torch.testing.assert_close(moments.mean, paired.mean(2), rtol=1e-5, atol=1e-5)
        gram = paired @ paired.transpose(1, 2) / paired.shape[2]
        torch.testing.assert_close(moments.gram, gram, rtol=1e-4, atol=1e-4)
        assert sum(r.nbytes for cache in passes.caches for r in cache.remembered.values()) <= most_bytes
        for name in written_modules(structure, [reader]):
            edited.get_submodule(name).weight.mul_(1.5)
    assert all(least <= len(cache.remembered) <= most for cache in passes.caches)
