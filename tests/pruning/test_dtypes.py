"""A network prunes alike in every type of numbers, up to the rounding of that type."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import modhifi
from modhifi.data.in_memory import samples_from
from modhifi.data.samples import Samples
from modhifi.models.load import load_model
from modhifi.models.loaded import LoadedModel
from modhifi.pruning.budget import Budget
from modhifi.pruning.editing import edit_readers
from modhifi.pruning.prune import prune_model
from modhifi.pruning.settings import PruneSettings
from modhifi.pruning.stages import measure_moments
from modhifi.structure.clone import clone
from modhifi.structure.expand import expand
from modhifi.structure.operators import weight_matrix

SAMPLES = 48


def normed(norm: nn.Module, x: Tensor) -> Tensor:
    """A norm in its own type, as mixed networks run theirs."""
    return norm(x.to(norm.weight.dtype)).to(x.dtype)


class Convs(nn.Module):
    def __init__(self, depthwise: bool = False) -> None:
        super().__init__()
        self.a, self.a_norm = nn.Conv2d(3, 16, 3, bias=False), nn.BatchNorm2d(16)
        self.deep = nn.Conv2d(16, 16, 3, padding=1, groups=16) if depthwise else nn.Identity()
        self.b, self.b_norm = nn.Conv2d(16, 16, 3, bias=False, groups=4 if depthwise else 1), nn.BatchNorm2d(16)
        self.head = nn.Linear(16 * 4, 5)
        for norm in (self.a_norm, self.b_norm):
            norm.running_mean.normal_(0, 0.3)
            norm.running_var.uniform_(0.5, 1.5)
            nn.init.uniform_(norm.weight, 0.5, 1.5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.deep(normed(self.a_norm, self.a(x)).relu()).relu()
        return self.head(normed(self.b_norm, self.b(x)).relu().flatten(1))


class Codes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.a, self.norm = nn.Embedding(20, 8), nn.Linear(40, 24), nn.LayerNorm(24)
        self.b, self.c, self.head = nn.Linear(24, 32), nn.Linear(32, 16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = normed(self.norm, F.gelu(self.a(self.embedding(x).flatten(1))))
        return self.head(self.c(F.gelu(self.b(x))).relu())


class Transformer(nn.Module):
    """One block; each key-value head serves ``shared`` query heads."""

    def __init__(self, shared: int = 1) -> None:
        super().__init__()
        self.shared = shared
        self.stem, self.first, self.second, self.last = nn.Linear(6, 32), *(nn.LayerNorm(32) for _ in range(3))
        self.q, self.k, self.v = nn.Linear(32, 32), *(nn.Linear(32, 32 // shared) for _ in range(2))
        self.o, self.up, self.down, self.head = (
            nn.Linear(32, 32),
            nn.Linear(32, 48),
            nn.Linear(48, 32),
            nn.Linear(32, 5),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = normed(self.first, x)
        q, k, v = (layer(y).unflatten(-1, (-1, 8)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        k, v = (t.repeat_interleave(self.shared, 1) for t in (k, v))
        x = x + self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        x = x + self.down(F.gelu(self.up(normed(self.second, x))))
        return self.head(normed(self.last, x).mean(1))


NETS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "convolutions and BatchNorm": (Convs, lambda: torch.randn(SAMPLES, 3, 6, 6)),
    "depthwise and grouped": (lambda: Convs(depthwise=True), lambda: torch.randn(SAMPLES, 3, 6, 6)),
    "integer codes": (Codes, lambda: torch.randint(20, (SAMPLES, 5))),
    "transformer": (Transformer, lambda: torch.randn(SAMPLES, 7, 6)),
    "grouped queries": (lambda: Transformer(shared=2), lambda: torch.randn(SAMPLES, 7, 6)),
}


def mixed(net: nn.Module) -> nn.Module:
    """bfloat16, but for its norms."""
    for module in net.children():
        if not isinstance(module, nn.BatchNorm2d | nn.LayerNorm):
            module.bfloat16()
    return net


TYPES: dict[str, tuple[Callable[[nn.Module], nn.Module], torch.dtype]] = {
    "float64": (nn.Module.double, torch.float64),
    "bfloat16": (nn.Module.bfloat16, torch.bfloat16),
    "float16": (nn.Module.half, torch.float16),
    "mixed": (mixed, torch.bfloat16),
}


def loaded_pair(name: str, kind: str) -> tuple[tuple[LoadedModel, Samples], tuple[LoadedModel, Samples]]:
    """A network in some type and the float32 network of the very same numbers, each with its samples."""
    torch.manual_seed(0)
    cast, dtype = TYPES[kind]
    net, x = NETS[name][0]().eval(), NETS[name][1]()
    pairs = []
    for convert, to in ((cast, dtype), (nn.Module.float, torch.float32)):
        net, x = convert(net), x.to(to) if x.is_floating_point() else x
        loaded = load_model(net, example=x[:2])
        pairs.append((loaded, samples_from(x, loaded, n=SAMPLES, seed=0)))
    return pairs[0], pairs[1]


@torch.no_grad()
def moved(loaded: LoadedModel, edited: nn.Module, samples: Samples) -> float:
    """The root of the share of the output's energy that an edit moves."""
    batch = next(samples.batches(SAMPLES))
    before, after = (loaded.logits(batch, model).double() for model in (loaded.model, edited))
    return float((after - before).norm() / before.norm())


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("name", NETS)
def test_a_network_prunes_alike_in_every_type(name: str, kind: str) -> None:
    (loaded, samples), (reference, wide_samples) = loaded_pair(name, kind)
    assert len({parameter.dtype for parameter in loaded.model.parameters()}) == (2 if kind == "mixed" else 1)
    budget, settings = Budget("components", 0.5), PruneSettings()
    pruned = prune_model(loaded, samples, budget, settings)
    expected = prune_model(reference, wide_samples, budget, settings)
    assert pruned.plan.kept == expected.plan.kept  # no two components of these are closer than the rounding
    # Rows are multiplied in float32, whatever the type.
    rounding = max(4 * torch.finfo(TYPES[kind][1]).eps, 16 * torch.finfo(torch.float32).eps)
    for error, other in zip(pruned.errors, expected.errors, strict=True):
        assert error.reader == other.reader and other.relative > 1e-3
        assert error.relative == pytest.approx(other.relative, rel=rounding)
    assert moved(loaded, pruned.model, samples) == pytest.approx(
        moved(reference, expected.model, wide_samples), abs=rounding
    )
    # What is reported is what the stored weights do, rounded as they are.
    dense_shape, structure = clone(loaded.model), pruned.structure
    moments = measure_moments(loaded, structure, samples, settings.sampling)
    for error in edit_readers(dense_shape, structure, pruned.plan, moments, settings):
        sink = structure.operators[error.reader].sink
        second = moments[error.reader].gram if sink is None else moments[error.reader].cov
        before, after = (weight_matrix(m.get_submodule(error.reader)) for m in (loaded.model, dense_shape))
        assert error.error == pytest.approx(float((((after - before) @ second) * (after - before)).sum()), rel=1e-9)


@pytest.mark.parametrize("kind", ["own", "dense"])
def test_sequential_errors_are_those_of_the_stored_weights(kind: str) -> None:
    (loaded, samples), _ = loaded_pair("integer codes", "bfloat16")
    settings = PruneSettings(sequential=kind, only=("c",))
    pruned = prune_model(loaded, samples, Budget("components", 0.5), settings)
    (error,) = pruned.errors
    dense_shape = expand(pruned.model, loaded.model, pruned.structure, pruned.plan)
    # Nothing in front of the one reader is edited: both of its prefixes are the dense one.
    second = measure_moments(loaded, pruned.structure, samples, settings.sampling)[error.reader].cov
    gap = weight_matrix(dense_shape.head) - weight_matrix(loaded.model.head)
    # The target is what the layer puts out, which is rounded as well.
    assert error.error == pytest.approx(float(((gap @ second) * gap).sum()), rel=5e-3)


class NormFirst(nn.Module):
    """Reads bfloat16 through a norm of float32."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.a, self.b = nn.LayerNorm(6), nn.Linear(6, 12), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(normed(self.norm, x)).relu())


def test_inputs_of_a_mixed_network_keep_their_type() -> None:
    torch.manual_seed(0)
    x = torch.randn(SAMPLES, 6).bfloat16()
    model = modhifi.prune(mixed(NormFirst()).eval(), x, ratio=0.5, checks={"walked": 0}).model
    assert model.a.out_features == 6 and model(x).dtype == torch.bfloat16
    assert {name: p.dtype for name, p in model.named_parameters()} == {
        name: torch.float32 if "norm" in name else torch.bfloat16 for name, _ in model.named_parameters()
    }
