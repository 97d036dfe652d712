"""Passes that begin at the first changed operator."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import suppress

import pytest
import timm
import tiny_text
import torch
import transformers
from counting import counted
from tiny_timm import convnext, resnet, samples_of, swin, vit
from torch import Tensor, nn

from modhifi.calibration.prefix_cache import Passes, PrefixCache
from modhifi.calibration.timeline import Timeline
from modhifi.data.samples import Samples
from modhifi.models.hooks import StopForward
from modhifi.models.load import load_model
from modhifi.models.loaded import LoadedModel
from modhifi.structure.operators import weight_matrix, write_weight
from modhifi.structure.torch_ops import tensors_in
from modhifi.structure.tracing.branches import Calls
from modhifi.unlearning.sites import Sites, find_sites


def densenet() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("densenet121", num_classes=5, growth_rate=8, block_config=(2, 2))


def bert() -> nn.Module:
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=24)
    return transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=20, **sizes)).eval()


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
        raise StopForward

    for _ in range(2):
        for _, run in runs:
            with torch.no_grad(), suppress(StopForward), Calls({writer.call: stop}) as calls:
                run(calls)
    half = len(seen) // 2
    assert (
        runs.cache is not None
        and len(runs.cache.remembered) == half
        and all(torch.equal(a, b) for a, b in zip(seen, seen[half:], strict=False))
    )
    assert torch.equal(outputs(runs), outputs(Passes(loaded, loaded.model, samples, 3)))


def stored_bytes(cache: PrefixCache) -> int:
    tensors = [t for r in cache.remembered.values() for output in r.outputs.values() for t in tensors_in(output)]
    return sum(t.untyped_storage().nbytes() for t in tensors)


def test_only_what_is_read_is_remembered() -> None:
    loaded, sites, samples = world("resnet")
    runs = Passes(loaded, loaded.model, samples, 3, [sites.writers[-1].site.module])
    outputs(runs)
    assert runs.cache is not None
    # The blocks before the last are read by nothing but blocks.
    assert {"conv1", "layer1", "layer2", "layer3"} <= runs.cache.prefix.calls.keys()
    assert runs.cache.prefix.read.isdisjoint({"conv1", "layer1", "layer2"})
    assert stored_bytes(runs.cache) < 7 * 2 * 20 * 4 * 4 * 4


def test_as_many_batches_are_remembered_as_fit() -> None:
    loaded, sites, samples = world("resnet")
    changed = [sites.writers[-1].site.module]
    runs = Passes(loaded, loaded.model, samples, 3, changed)
    expected = outputs(runs)
    assert runs.cache is not None and len(runs.cache.remembered) == 3
    one_batch = runs.cache.remembered[0].nbytes
    for most_bytes, batches in ((0, 0), (one_batch, 1), (2 * one_batch, 2)):
        small = Passes(loaded, loaded.model, samples, 3, changed, most_bytes)
        assert torch.equal(outputs(small), expected) and torch.equal(outputs(small), expected)
        assert small.cache is not None and len(small.cache.remembered) == batches
        assert sum(r.nbytes for r in small.cache.remembered.values()) <= most_bytes


def operators(model: nn.Module) -> list[str]:
    return [n for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))]


def moving(model: nn.Module, x: Tensor) -> PrefixCache:
    return PrefixCache(model, model, Timeline(model, lambda: model(x)))


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_a_prefix_moves_on_and_computes_nothing_twice(name: str) -> None:
    """As sequential pruning does: every operator is edited once it has been come to."""
    loaded, _, _ = world(name)
    model, x = loaded.model, loaded.example
    cache = moving(model, x)
    ordered = sorted(operators(model), key=lambda operator: cache.timeline.spans[operator].begin)
    with counted(nn.Linear) as linear, counted(nn.Conv2d) as conv:
        for number, operator in enumerate(ordered):
            cache.advance(ordered[number:])
            cache.fill(0, x)
            model.get_submodule(operator).weight.mul_(1.25)
    once = [model.get_submodule(n) for n in ordered if cache.timeline.spans[n].times == 1]
    assert [linear[m] + conv[m] for m in once] == [1] * (len(once) - 1) + [0]
    assert torch.equal(cache.run(0, x), model(x))


@pytest.mark.parametrize("build", [lambda: tiny_text.llama(num_hidden_layers=3), bert])
@torch.no_grad()
def test_groups_are_changed_one_at_a_time(build: Callable[[], nn.Module]) -> None:
    """As probing does: what comes before each change is filled in first, by the unchanged model."""
    model, x = build(), torch.randint(3, 20, (2, 7))
    cache = PrefixCache(model, lambda batch: model(batch).logits, Timeline(model, lambda: model(x)))
    dense = model(x).logits
    for place in operators(model):
        cache.advance([place])
        cache.fill(0, x)
        weight = model.get_submodule(place).weight
        before = weight.detach().clone()
        weight.mul_(1.5)
        assert torch.equal(cache.run(0, x), copy.deepcopy(model)(x).logits)
        assert not torch.equal(cache.run(0, x), dense)
        weight.copy_(before)
    assert torch.equal(model(x).logits, dense) and not any("forward" in vars(m) for m in model.modules())


class Twice(nn.Module):
    """The first layer runs again behind the second one, with another input."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(3, 3), nn.ReLU()) for _ in range(2)])
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        for layer in (*self.layers, self.layers[0]):
            x = layer(x)
        return self.head(x)


class Tied(nn.Module):
    """The last layer's weight is the first one's; the second is never called, as its parent reads its weight."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.middle, self.last = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)
        self.last.weight = self.first.weight
        self.behind = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.linear(self.first(x), self.middle.weight)
        return self.last(self.behind(x))


class ChangedInPlace(nn.Module):
    """Modules change in place what the skips around them read afterwards, a view of the input among it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.last = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)
        self.act = nn.ReLU(inplace=True)
        self.block = nn.Sequential(nn.Dropout(), nn.Tanh(), nn.Hardtanh(-0.5, 0.5, inplace=True), nn.Linear(3, 3))
        self.flat = nn.Sequential(nn.Flatten(0), nn.Hardsigmoid(inplace=True), nn.Unflatten(0, (-1, 3)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        y = self.second(self.act(x)) + x
        z = self.block(y)
        return self.last(self.flat(z) + y) + z


@pytest.mark.parametrize(
    "build, changed",
    [
        *((ChangedInPlace, changed) for changed in ("second", "block.3", "last")),
        (Twice, "layers.1.0"),
        (Twice, "layers.0.0"),
        (Tied, "last"),
        (Tied, "middle"),
        (Tied, "behind"),
    ],
)
@torch.no_grad()
def test_what_cannot_be_given_is_computed_again(build: type[nn.Module], changed: str) -> None:
    model, x = build().eval(), torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    cache = moving(model, x)
    cache.advance([changed])
    cache.fill(0, x)
    model.get_submodule(changed).weight.mul_(2)
    assert torch.equal(cache.run(0, x), model(x))
