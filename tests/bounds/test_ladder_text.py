"""The statistical rung of language models: sequences as units, perplexity, padding, documents."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
from tiny_text import VOCABULARY, llama
from torch import Tensor, nn

from modhifi.bounds.held_out import tabulate
from modhifi.bounds.ladder import BoundReport, verify_model
from modhifi.bounds.statistical import statistical
from modhifi.bounds.verdicts import Tolerances
from modhifi.data.samples import Samples
from modhifi.errors import ModhifiError
from modhifi.models.load import load_model
from modhifi.models.loaded import LoadedModel


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return replace(load_model(llama(), example=torch.ones(2, 12, dtype=torch.long)), kind="text")


def noisy(loaded: LoadedModel, size: float) -> nn.Module:
    torch.manual_seed(1)
    other = copy.deepcopy(loaded.model)
    for block in other.model.layers:
        block.mlp.down_proj.weight.data.add_(size * torch.randn_like(block.mlp.down_proj.weight))
    return other


def sequences(items: list[Tensor], units: tuple[int, ...] | None = None) -> Samples:
    names = tuple(f"{i:016x}" for i in range(len(items)))
    return Samples(lambda i: items[i], names, None, names, "test", False, units=units)


def windows(n: int, length: int = 12) -> Tensor:
    return torch.randint(3, VOCABULARY, (n, length), generator=torch.Generator().manual_seed(0))


def verified(loaded: LoadedModel, edited: nn.Module, n: int, ratio: float) -> BoundReport:
    held = sequences(list(windows(n)))
    return verify_model(loaded, edited, None, held, Tolerances(max_perplexity_ratio=ratio), walked=0, batch_size=32)


def test_a_bound_at_its_cap_says_nothing(loaded: LoadedModel) -> None:
    edited, tokens = noisy(loaded, 0.1), windows(1)
    table = tabulate(loaded, edited, sequences(list(tokens)), 8)
    found = statistical(replace(table, constant=replace(table.constant, nll=50.0)), 0.05).perplexity
    assert found is not None and found.upper == pytest.approx(math.e) and not found.informative


def test_the_ratio_is_that_of_the_perplexities(loaded: LoadedModel) -> None:
    edited, tokens = noisy(loaded, 0.1), windows(60)
    table = tabulate(loaded, edited, sequences(list(tokens)), 8)
    found = statistical(table, 0.05).perplexity
    before, after = table.perplexities()
    assert found is not None and found.measured == pytest.approx(after / before, rel=1e-5)
    assert found.lower < found.measured < found.upper < math.exp(1)
    assert table.positions.eq(12).all() and float(table.flips.max()) <= 1


@pytest.mark.parametrize(
    ("noise", "n", "ratio", "verdict"),
    [(0.0, 300, 1.05, "PASS-STATISTICAL"), (0.0, 10, 1.05, "INCONCLUSIVE"), (1.0, 300, 1.01, "FAIL")],
)
def test_verdicts_on_perplexity(loaded: LoadedModel, noise: float, n: int, ratio: float, verdict: str) -> None:
    found = verified(loaded, noisy(loaded, noise), n, ratio).verdicts[-1]
    assert found.name == f"max perplexity ratio {ratio:g}" and found.verdict == verdict, found
    assert "capped at 1 nats" in found.text
    if verdict == "INCONCLUSIVE":
        assert found.settling_n is not None and found.settling_n > n
        assert (
            verified(loaded, noisy(loaded, noise), found.settling_n, ratio).verdicts[-1].verdict == "PASS-STATISTICAL"
        )


def test_a_cap_never_passes_what_it_cannot_see(loaded: LoadedModel) -> None:
    """A tolerance above the usual cap lifts it."""
    found = verified(loaded, noisy(loaded, 0.0), 300, 100.0).statistical.perplexity
    assert found is not None and f"capped at {2 * math.log(100):g} nats" in found.method


def test_padding_counts_for_nothing(loaded: LoadedModel) -> None:
    edited, tokens = noisy(loaded, 0.1), windows(6)
    short = [t[: 5 + i] for i, t in enumerate(tokens)]

    def columns(size: int) -> Tensor:
        table = tabulate(loaded, edited, sequences(short), size)
        assert table.nll_growth is not None
        return torch.stack([table.flips, table.total_variation, table.error, table.nll_growth])

    assert torch.allclose(columns(6), columns(1), atol=1e-5)


def test_windows_of_one_document_are_said_to_be(loaded: LoadedModel) -> None:
    items = list(windows(6))
    for documents, said in (((0, 0, 1, 1, 2, 2), True), (tuple(range(6)), False), (None, False)):
        found = verify_model(loaded, loaded.model, None, sequences(items, documents), walked=0)
        assert any("3 documents" in w for w in found.warnings) == said


def test_perplexity_needs_a_language_model() -> None:
    linear = load_model(nn.Linear(4, 3).eval(), example=torch.randn(2, 4))
    held = sequences(list(torch.randn(20, 4)))
    with pytest.raises(ModhifiError, match="causal language models"):
        verify_model(linear, linear.model, None, held, Tolerances(max_perplexity_ratio=1.1), walked=0)
    with pytest.raises(ModhifiError, match="allows no loss"):
        Tolerances(max_perplexity_ratio=0.9)
