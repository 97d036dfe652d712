"""measured <= R2 <= R1 on many small networks and architectures, and rules against sampled truth."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny import ARCHITECTURES, PATTERNS, architecture, pattern
from torch import Tensor, nn

from modhifi.bounds.certified import Certified, certify
from modhifi.bounds.propagation.interval import (
    Bound,
    add_rule,
    cat_rule,
    mean_rule,
    moved_rule,
    mul_rule,
    slice_norm,
    total,
)
from modhifi.models.load import load_model
from modhifi.models.loaded import LoadedModel, frozen


def noisy(model: nn.Module, seed: int, size: float = 1e-3) -> nn.Module:
    """A copy with noise on every parameter and running mean."""
    torch.manual_seed(seed)
    other = copy.deepcopy(model)
    for name, tensor in [*other.named_parameters(), *other.named_buffers()]:
        if tensor.is_floating_point() and "running_var" not in name:
            tensor.data.add_(torch.randn_like(tensor) * size)
    return other


def walked(loaded: LoadedModel, twin: nn.Module, batch: Tensor) -> Certified:
    batch = batch.double() if batch.is_floating_point() else batch
    return certify(loaded, copy.deepcopy(loaded.model).double(), twin.double(), batch)


def check(found: Certified) -> None:
    assert found.violations() == ()
    assert bool((found.local >= found.measured * (1 - 1e-9)).all()) and bool((found.measured > 0).all())
    # An infinite bound is sound, and has to say why.
    assert bool(found.local.isfinite().all()) or "R2" in found.missing
    assert bool(found.theorem.isfinite().all()) or "R1" in found.missing


@pytest.mark.parametrize("name", sorted(PATTERNS))
def test_patterns(name: str) -> None:
    model, example = pattern(name)
    check(walked(load_model(model.eval(), example=example), noisy(model, 1), torch.randn(4, *example.shape[1:])))


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_architectures(name: str) -> None:
    model, example = architecture(name)
    check(walked(load_model(model.eval(), example=example), noisy(model, 1), example))


def causal(name: str) -> LoadedModel:
    import transformers

    torch.manual_seed(0)
    sizes = dict(hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4)
    if name == "GPT2":
        config = transformers.GPT2Config(vocab_size=50, n_embd=24, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0)
        model: nn.Module = transformers.GPT2LMHeadModel(config)
    else:
        config = getattr(transformers, f"{name}Config")(vocab_size=50, num_key_value_heads=2, **sizes)
        model = getattr(transformers, f"{name}ForCausalLM")(config)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(0, 0.2)
    example = torch.randint(0, 50, (2, 12))
    return LoadedModel(frozen(model), name, "transformers", "text", example, None, None, None, {})


@pytest.mark.parametrize("name", ["Llama", "Qwen2", "Qwen3", "GPT2"])
def test_language_models_have_the_local_rung(name: str) -> None:
    loaded = causal(name)
    twin = copy.deepcopy(loaded.model)
    torch.manual_seed(1)
    for key, parameter in twin.named_parameters():
        if key.endswith(("down_proj.weight", "o_proj.weight", "c_proj.weight", "v_proj.weight")):
            parameter.data.add_(torch.randn_like(parameter) * 1e-5)
    found = walked(loaded, twin, torch.randint(0, 50, (3, 12)))
    check(found)
    assert bool(found.local.isfinite().all()) and "attention" in found.missing["R1"]
    # Newton's method reaches the modified network, whose RMSNorms would cast to float32 if they were let.
    assert found.local.tolist() == pytest.approx(found.measured.tolist(), rel=1e-6)


def test_a_value_that_leaves_the_network_loses_everything() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.one(x)
            return self.two(x if x.sum() > 0 else -x)

    torch.manual_seed(0)
    model = Branching().eval()
    found = walked(load_model(model, example=torch.randn(2, 4)), noisy(model, 0), torch.randn(4, 4))
    assert bool(found.local.isinf().all()) and "gt at" in found.missing["R2"]


def test_a_write_through_a_view_is_not_missed() -> None:
    class Writing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.one(x)
            half = x[:, :2]
            half.mul_(100.0)
            return x

    torch.manual_seed(0)
    model = Writing().eval()
    found = walked(load_model(model, example=torch.randn(2, 4)), noisy(model, 0), torch.randn(4, 4))
    check(found)
    assert bool(found.local.isinf().all())


# -- the algebra of radii ----------------------------------------------------------------------------------------------
def moved(x: Tensor, radius: Tensor) -> Tensor:
    """A random tensor whose distance from x is exactly the radius in every slice."""
    change = torch.randn_like(x)
    return x + change * radius / slice_norm(change, radius.shape)


def within(before: Tensor, after: Tensor, bound: Bound) -> bool:
    return bool((slice_norm(after - before, bound.radius.shape) <= bound.radius * (1 + 1e-8) + 1e-12).all())


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("shape", [(3, 1, 1), (3, 4, 1)])
def test_rules_hold_on_sampled_changes(seed: int, shape: tuple[int, ...]) -> None:
    torch.manual_seed(seed)
    x, gate, y = torch.randn(3, 4, 6).double(), torch.randn(3, 1, 6).double(), torch.randn(3, 4, 6).double()
    rx, rg = torch.rand(shape).double(), torch.rand(3, 1, 1).double()
    bx, bg, by = Bound(rx), Bound(rg), Bound(torch.rand(shape).double())
    for _ in range(200):
        mx, mg, my = moved(x, rx), moved(gate, rg), moved(y, by.radius)
        assert within(x * gate, mx * mg, mul_rule(x * gate, (x, bx), (gate, bg)))
        assert within(x * y, mx * my, mul_rule(x * y, (x, bx), (y, by)))
        assert within(x + gate, mx + mg, add_rule(x + gate, [(x, bx), (gate, bg)]))
        for dims in ([1], [2], [1, 2]):
            assert within(x.mean(dims), mx.mean(dims), mean_rule(x.mean(dims), x, bx, dims, False, False))
        for dim in (1, 2):
            joined = torch.cat([x, y], dim)
            assert within(joined, torch.cat([mx, my], dim), cat_rule(joined, [(x, bx), (y, by)], dim))
        for move in (
            lambda t: t.reshape(3, 24),
            lambda t: t.reshape(3, 4, 2, 3).permute(0, 2, 1, 3),
            lambda t: t.transpose(1, 2).reshape(3, 2, 12),
            lambda t: t[:, 1:3],
            lambda t: t.flip(2).roll(1, 1),
        ):
            assert within(move(x), move(mx), moved_rule(move, x, bx, False))
        twice = lambda t: t[:, [0, 0, 1, 2]]  # noqa: E731
        assert within(twice(x), twice(mx), moved_rule(twice, x, bx, True))


def test_total_is_the_root_of_the_sum_of_squares() -> None:
    assert total(torch.tensor([[[3.0], [4.0]]]).double()).item() == pytest.approx(5.0)
