"""Passes that begin at the first changed operator."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import pytest
import timm
import torch
from tiny_timm import convnext, resnet, samples_of, swin, vit
from torch import Tensor, nn

from modhifi.calibration.prefix_cache import Passes, Reached
from modhifi.data.samples import Samples
from modhifi.models.load import load_model
from modhifi.models.loaded import LoadedModel
from modhifi.structure.operators import weight_matrix, write_weight
from modhifi.structure.tracing.branches import Calls
from modhifi.unlearning.sites import Sites, find_sites


def densenet() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("densenet121", num_classes=5, growth_rate=8, block_config=(2, 2))


class TwiceRead(nn.Module):
    """The first layer is read by a function as well as by the second, which is called twice."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.third, self.head = (nn.Linear(6, n) for n in (6, 6, 6, 5))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu_()
        y = self.second(self.second(x)).relu_() + x
        return self.head(self.third(y).relu_())


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "resnet": (resnet, (3, 64, 64)),
    "convnext": (convnext, (3, 64, 64)),
    "swin": (swin, (3, 56, 56)),
    "vit": (vit, (3, 48, 48)),
    "densenet": (densenet, (3, 64, 64)),
    "twice read": (TwiceRead, (6,)),
}


def world(name: str) -> tuple[LoadedModel, Sites, Samples]:
    make, shape = MODELS[name]
    inputs = torch.randn(7, *shape, generator=torch.Generator().manual_seed(0))
    loaded = load_model(make(), example=inputs[:2])
    return loaded, find_sites(loaded), samples_of(inputs, torch.arange(7) % 5)


def outputs(runs: Passes) -> Tensor:
    with torch.no_grad():
        return torch.cat([run() for _, run in runs])


@pytest.mark.parametrize("name", MODELS)
def test_a_second_pass_gives_what_the_changed_model_gives(name: str) -> None:
    loaded, sites, samples = world(name)
    for site in (sites.readers[-1], sites.readers[len(sites.readers) // 2], sites.readers[0]):
        runs = Passes(loaded, loaded.model, samples, 3, [site.module])
        assert torch.equal(outputs(runs), outputs(Passes(loaded, loaded.model, samples, 3)))
        layer = loaded.model.get_submodule(site.module)
        write_weight(layer, 1.5 * weight_matrix(layer))
        changed = outputs(Passes(loaded, loaded.model, samples, 3))
        assert torch.equal(outputs(runs), changed)
        assert torch.equal(outputs(runs), changed)
    assert "forward" not in vars(loaded.model.get_submodule(sites.readers[0].module))


@pytest.mark.parametrize("name", MODELS)
def test_calls_keep_their_numbers(name: str) -> None:
    loaded, sites, samples = world(name)
    for writer in sites.writers:
        runs = Passes(loaded, loaded.model, samples, 7, [writer.site.module])
        seen: list[Tensor] = []
        keep = seen.append
        for _ in range(3):
            for _, run in runs:
                with torch.no_grad(), Calls({writer.call: keep}) as calls:
                    run(calls)
        assert len(seen) == 3 and torch.equal(seen[0], seen[1]) and torch.equal(seen[0], seen[2])


def test_a_pass_that_ends_early_is_remembered() -> None:
    loaded, sites, samples = world("resnet")
    writer = sites.writers[-1]
    runs = Passes(loaded, loaded.model, samples, 3, [writer.site.module])
    seen: list[Tensor] = []

    def stop(stream: Tensor) -> None:
        seen.append(stream)
        raise Reached

    for _ in range(2):
        for _, run in runs:
            with torch.no_grad(), suppress(Reached), Calls({writer.call: stop}) as calls:
                run(calls)
    half = len(seen) // 2
    assert len(runs.outputs) == half and all(torch.equal(a, b) for a, b in zip(seen, seen[half:], strict=False))
    assert torch.equal(outputs(runs), outputs(Passes(loaded, loaded.model, samples, 3)))


@pytest.mark.parametrize("most_bytes, skipped", [(2**30, True), (10, False)])
def test_what_comes_before_is_left_out_unless_it_takes_too_much_memory(most_bytes: int, skipped: bool) -> None:
    loaded, sites, samples = world("resnet")
    runs = Passes(loaded, loaded.model, samples, 3, [sites.writers[-1].site.module], most_bytes)
    outputs(runs)
    before: set[str] = set() if runs.before is None else set(runs.before.calls)
    assert ({"conv1", "layer1", "layer2", "layer3"} <= before) == skipped
    if runs.before is not None:
        # The blocks before the last are read by nothing but blocks.
        assert runs.before.read.isdisjoint({"conv1", "layer1", "layer2"})
        stored = sum(t.untyped_storage().nbytes() for o in runs.outputs.values() for t in o.values())
        assert stored < 7 * 2 * 20 * 4 * 4 * 4
