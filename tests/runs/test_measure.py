from __future__ import annotations

import math
import mmap
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from modhifi.errors import ModhifiError
from modhifi.runs import measure

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))]


@dataclass(frozen=True)
class Inputs:
    """The part of Samples that measuring uses."""

    items: Tensor
    labels: Tensor | None = None
    description: str = "inputs"

    def batches(self, size: int) -> Iterator[Tensor]:
        return iter(self.items.split(size))


def linear(seed: int, inputs: int = 6, outputs: int = 4) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(inputs, outputs).eval().requires_grad_(False)


def test_shared_parameters_count_once() -> None:
    first, second = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
    second.weight = first.weight
    assert measure.count_parameters(nn.Sequential(first, second, nn.Linear(3, 2))) == 9 + 8


def test_flops_of_a_convolution_count_a_multiply_add_twice_and_one_item() -> None:
    model = nn.Sequential(nn.Conv2d(4, 8, 3, stride=2, padding=1, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(128, 5))
    expected = 2 * (8 * 4 * 4) * (2 * 9) + 2 * 128 * 5
    assert measure.count_flops(model, torch.zeros(7, 4, 8, 8)) == expected


def test_flops_include_attention() -> None:
    class Attention(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)

    # (heads, tokens, width) = (2, 5, 3): scores and values, each 2·T·T·width a head.
    assert measure.count_flops(Attention(), torch.randn(4, 2, 5, 3)) == 2 * (2 * 2 * 5 * 5 * 3)


def test_flops_leave_the_model_as_it_was() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    measure.count_flops(model, torch.randn(2, 3, 8, 8))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("device", DEVICES)
def test_latency_is_measured_in_turns(device: str) -> None:
    calls: list[str] = []

    class Noting(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            calls.append(self.name)
            return super().forward(x)

    models = {name: Noting(4, 4).to(device) for name in ("dense", "edited")}
    for name, model in models.items():
        model.name = name
    result = measure.compare_latency(models, torch.randn(3, 4), rounds=4, min_run_time=1e-4)
    dense, edited = result["dense"], result["edited"]
    assert dense.ratio == 1 and dense.ratio_iqr == 0
    assert dense.median > 0 and edited.median > 0 and edited.iqr >= 0 and edited.ratio > 0
    assert (edited.rounds, edited.batch, edited.threads) == (4, 3, torch.get_num_threads())
    assert edited.device.startswith(device)
    assert set(asdict(edited)) >= {"median", "iqr", "ratio"}
    # Every round ends where the next begins: dense edited | edited dense | dense edited | edited dense.
    turns = [name for name, following in zip(calls, [*calls[1:], ""], strict=True) if name != following]
    assert turns[-5:] == ["dense", "edited", "dense", "edited", "dense"]


def test_latency_takes_the_ratio_within_a_round(monkeypatch: pytest.MonkeyPatch) -> None:
    # The machine slows down from round to round; the edited model takes half the dense model's time throughout.
    slowness = {"dense": iter([1.0, 2, 3, 4, 5]), "edited": iter([0.5, 1, 1.5, 2, 2.5])}

    class Scripted:
        def __init__(self, _: str, globals: dict[str, nn.Linear], num_threads: int) -> None:
            self.name = "dense" if globals["model"].out_features == 4 else "edited"

        def blocked_autorange(self, min_run_time: float) -> SimpleNamespace:
            return SimpleNamespace(number_per_run=10)

        def timeit(self, number: int) -> SimpleNamespace:
            return SimpleNamespace(mean=next(slowness[self.name]))

    monkeypatch.setattr(measure, "_timer", lambda: Scripted)
    result = measure.compare_latency({"dense": linear(0), "edited": linear(0, outputs=2)}, torch.zeros(1, 6), rounds=5)
    assert (result["dense"].median, result["dense"].iqr) == (3, 2)
    assert (result["edited"].median, result["edited"].iqr) == (1.5, 1)
    assert (result["edited"].ratio, result["edited"].ratio_iqr, result["edited"].passes) == (0.5, 0, 10)


def test_latency_refuses_models_on_two_devices() -> None:
    with pytest.raises(ModhifiError, match="same"):
        measure.compare_latency({"a": linear(0), "b": linear(0).to("meta")}, torch.randn(1, 6))


def occupy(size: int, device: str) -> int:
    """Hold ``size`` bytes for a moment; on the CPU in a mapping of its own, as C may reuse what it holds."""
    if device != "cpu":
        return torch.ones(size // 4, device=device).numel() * 4
    with mmap.mmap(-1, size) as memory:
        for page in range(0, size, mmap.PAGESIZE):
            memory[page] = 1
        return len(memory)


@pytest.mark.parametrize("device", DEVICES)
def test_peak_memory_sees_an_allocation(device: str) -> None:
    size = 2**25
    _, before = measure.with_peak_memory(lambda: None, device)
    result, peak = measure.with_peak_memory(lambda: occupy(size, device), device)
    assert result == size
    assert peak >= before + size // 2


def test_peak_memory_forgets_what_was_freed_before() -> None:
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("only Linux can reset the peak")
    size = 2**26
    _, high = measure.with_peak_memory(lambda: occupy(size, "cpu"))
    _, low = measure.with_peak_memory(lambda: None)
    assert low < high - size // 2


@pytest.mark.parametrize("device", DEVICES)
def test_accuracy_counts_labels(device: str) -> None:
    model, items = linear(0), torch.randn(20, 6, generator=torch.Generator().manual_seed(0))
    labels = model(items).argmax(-1)
    labels[:5] = (labels[:5] + 1) % 4
    assert measure.accuracy(model.to(device), Inputs(items, labels), batch_size=7, device=device) == pytest.approx(0.75)


def test_accuracy_needs_labels_and_finite_logits() -> None:
    with pytest.raises(ModhifiError, match="labels"):
        measure.accuracy(linear(0), Inputs(torch.zeros(2, 6)))
    with pytest.raises(ModhifiError, match="finite"):
        measure.accuracy(linear(0), Inputs(torch.full((2, 6), math.nan), torch.zeros(2)))


@pytest.mark.parametrize("device", DEVICES)
def test_comparison_equals_the_definitions(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    items = torch.randn(9, 6, generator=torch.Generator().manual_seed(1))
    dense, edited = linear(0), linear(1)
    first, second = dense(items).double(), edited(items).double()
    p, q = first.softmax(-1), second.softmax(-1)
    monkeypatch.setattr(measure, "CHUNK_ELEMENTS", 8)
    result = measure.compare(dense.to(device), edited.to(device), Inputs(items), batch_size=4, device=device)
    close = {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(result.agreement, (first.argmax(-1) == second.argmax(-1)).double())
    torch.testing.assert_close(result.squared_error, (first - second).square().sum(-1), **close)
    torch.testing.assert_close(result.kl, (p * (p / q).log()).sum(-1), **close)
    torch.testing.assert_close(result.total_variation, (p - q).abs().sum(-1) / 2, **close)
    expected = ((first - second).square().sum() / first.square().sum()).item()
    assert result.relative_error == pytest.approx(expected, rel=1e-5)
    summary = result.summary()
    assert summary["n"] == 9
    assert summary["total_variation"] == pytest.approx(result.total_variation.mean().item())


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), scale=st.floats(0, 1e4), classes=st.integers(1, 12))
def test_divergences_stay_in_their_ranges(seed: int, scale: float, classes: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    first, second = (scale * torch.randn(5, classes, generator=generator) for _ in range(2))
    outputs = iter([first, second])
    result = measure.compare(lambda _: next(outputs), lambda _: next(outputs), Inputs(first))
    assert (result.total_variation >= 0).all() and (result.total_variation <= 1 + 1e-12).all()
    # Pinsker: the total variation is at most √(KL / 2).
    assert (result.total_variation <= (result.kl / 2).sqrt() + 1e-9).all()


def test_a_model_agrees_with_itself() -> None:
    result = measure.compare(linear(0), linear(0), Inputs(torch.randn(5, 6)))
    assert result.agreement.eq(1).all() and result.squared_error.eq(0).all()
    assert result.kl.eq(0).all() and result.total_variation.eq(0).all()
    assert math.isnan(replace(result, energy=torch.zeros(5)).relative_error)


def test_comparison_needs_samples_and_finite_outputs() -> None:
    with pytest.raises(ModhifiError, match="at least one"):
        measure.compare(linear(0), linear(0), Inputs(torch.zeros(0, 6)))
    with pytest.raises(ModhifiError, match="finite"):
        measure.compare(linear(0), lambda x: linear(0)(x) * math.inf, Inputs(torch.ones(2, 6)))


def bigram(seed: int, vocabulary: int = 7) -> nn.Embedding:
    """A language model whose next token depends on the last one alone."""
    torch.manual_seed(seed)
    return nn.Embedding(vocabulary, vocabulary).eval().requires_grad_(False)


@pytest.mark.parametrize("device", DEVICES)
def test_perplexity_equals_the_definition(device: str) -> None:
    model = bigram(0)
    tokens = torch.randint(0, 7, (5, 8), generator=torch.Generator().manual_seed(0))
    log_p = model.weight.double().log_softmax(-1)
    loss = -log_p[tokens[:, :-1], tokens[:, 1:]].mean().item()
    value = measure.perplexity(model.to(device), tokens, batch_size=2, device=device)
    assert value == pytest.approx(math.exp(loss), rel=1e-6)


def test_perplexity_of_a_uniform_model_is_the_size_of_the_vocabulary() -> None:
    value = measure.perplexity(lambda tokens: torch.zeros(*tokens.shape, 11), torch.zeros(2, 4, dtype=torch.long))
    assert value == pytest.approx(11)


def test_perplexity_needs_two_tokens() -> None:
    with pytest.raises(ModhifiError, match="two tokens"):
        measure.perplexity(bigram(0), torch.zeros(3, 1, dtype=torch.long))
