"""Targets in KV-cache bytes: whole KV groups go, and the report says which step was taken."""

from __future__ import annotations

import pytest
import tiny_text
import tiny_transformers
import torch
import transformers

import modhifi
from modhifi.errors import ModhifiError
from modhifi.models.load import load_model
from modhifi.models.loaded import LoadedModel
from modhifi.pruning.allocation import allocate
from modhifi.pruning.budget import Budget
from modhifi.pruning.elimination import Curve
from modhifi.pruning.stages import find_structure
from modhifi.runs.inputs import Given
from modhifi.runs.prune import run_prune
from modhifi.runs.recipes.prune import PruneRecipe
from modhifi.structure.sizes import sizes_of

SHAPE = dict(hidden_size=24, num_attention_heads=6, num_key_value_heads=3, head_dim=4)


def cached_bytes(model: torch.nn.Module) -> int:
    """What one token leaves in the model's own cache."""
    cache = model(torch.zeros(1, 1, dtype=torch.int64), use_cache=True).past_key_values
    return sum(t.nbytes for layer in cache.layers for t in (layer.keys, layer.values))


@pytest.fixture(scope="module")
def llama() -> LoadedModel:
    return load_model(tiny_text.llama(**SHAPE))


def test_predicted_cache_is_the_models_own(llama: LoadedModel):
    assert 4 * sizes_of(llama.model, find_structure(llama)).cache({}) == cached_bytes(llama.model)
    model, _, _ = tiny_transformers.family("gpt2")  # q, k and v in one projection, no shared heads
    assert 8 * sizes_of(model, find_structure(load_model(model))).cache({}) == cached_bytes(model)


@pytest.mark.parametrize("layout", ["uniform", "global"])
@pytest.mark.parametrize("asked, kept", [(0.67, 2), (0.6, 2), (0.34, 1)])
def test_only_heads_give_and_the_nearest_step_is_taken(llama: LoadedModel, layout: str, asked: float, kept: int):
    structure = find_structure(llama)
    curves = {g.name: Curve(torch.arange(g.n), torch.arange(g.n + 1).double(), 1.0) for g in structure.prunable}
    budget = Budget("cache", asked)
    plan = allocate(structure.prunable, curves, sizes_of(llama.model, structure), budget, layout=layout)
    widths = {g.name: len(plan.kept.get(g.name, range(g.n))) for g in structure.prunable if g.kind == "heads"}
    assert set(plan.kept) <= set(widths) and len(widths) == 2
    if layout == "uniform":
        assert set(widths.values()) == {kept}
    assert abs(sum(widths.values()) / 6 - asked) <= 1 / 6


def test_a_run_says_which_step_it_took(llama: LoadedModel):
    tokens = list(torch.randint(3, 50, (12, 16), generator=torch.Generator().manual_seed(0)))
    given = dict(samples=8, evaluation_samples=4, window=16, checks={"walked": 0})
    found = modhifi.prune(llama, tokens, kv_cache="0.6x", **given)
    assert cached_bytes(found.model) / cached_bytes(llama.model) == pytest.approx(2 / 3)
    assert found.report["budget"]["reached"]["cache"] == pytest.approx(2 / 3)
    assert [w for w in found.report["warnings"] if "0.667x of the KV cache stays" in w and "0.6x is between" in w]
    assert {g["kept"] for g in found.report["groups"]} == {2}
    content = {"model": {"name": "here"}, "budget": {"kv_cache": "0.667x"}, "data": {"samples": 8, "window": 16}}
    exact = run_prune(PruneRecipe.model_validate(content), given=Given(llama, tokens), dry_run=True)
    assert exact.report["budget"]["reached"]["cache"] == pytest.approx(2 / 3)
    assert not [w for w in exact.report["warnings"] if "KV cache" in w]


def test_what_has_no_cache_is_refused(llama: LoadedModel):
    bert = load_model(transformers.BertModel(transformers.BertConfig(**tiny_transformers.TEXT)))
    for model, data in ((bert, "text:nothing"), ("demo:resnet", "demo:calibration")):
        with pytest.raises(ModhifiError, match="only a causal language model keeps a KV cache"):
            modhifi.prune(model, data, kv_cache="0.5x")
    structure = find_structure(llama)
    sizes = sizes_of(llama.model, structure)
    neurons = tuple(g for g in structure.prunable if g.kind == "neurons")
    with pytest.raises(ModhifiError, match="no attention head that has keys and values of its own"):
        allocate(neurons, {}, sizes, Budget("cache", 0.5))
    with pytest.raises(ModhifiError, match=r"keeps only 0\.2x of the KV cache: .* 0\.333x remains"):
        modhifi.prune(llama, list(torch.randint(3, 50, (12, 16))), kv_cache="0.2x", window=16)
