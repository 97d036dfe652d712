from __future__ import annotations

import copy

import pytest
import tiny_parts
import tiny_transformers
import torch
import transformers
from torch import nn

from modhifi.models.load import load_model
from modhifi.models.plain_copy import normed_again
from modhifi.models.skeleton import record
from modhifi.models.stock import can_say, on_meta, shapes_of, stating
from modhifi.pruning.stages import find_structure
from modhifi.structure.plan import Plan
from modhifi.structure.surgery import shrink
from modhifi.structure.tracing.tracer import trace

# The kinds that the configuration of each can say.
BOTH, NEURONS = {"heads", "neurons"}, {"neurons"}
SAID = {
    **dict.fromkeys(
        ("llama", "qwen2", "qwen3", "smollm3", "gemma3", "phi3", "vit", "dinov2", "mixtral", "qwen3_moe"), BOTH
    ),
    **dict.fromkeys(("gpt2", "opt", "bert", "distilbert", "gpt_neox", "swin"), NEURONS),
}


def traced(name: str) -> tuple[object, object]:
    model, _, _ = tiny_transformers.family(name)
    loaded = load_model(model.float())
    return loaded, trace(loaded.model, lambda m: loaded.outputs(loaded.example, m))


@pytest.mark.parametrize("name", SAID)
def test_what_a_configuration_can_say_is_found_by_trying(name: str):
    loaded, structure = traced(name)
    kinds = {g.kind for g in structure.prunable} - {"channels"}
    assert {kind for kind in kinds if can_say(loaded, structure, kind)} == SAID[name]


def test_fewer_ranks_are_a_narrower_head_of_values():
    model, _, _ = tiny_transformers.family("deepseek_v3")
    loaded = load_model(model.float())
    structure = find_structure(loaded, on_request=True)
    assert can_say(loaded, structure, "ranks")
    plan = Plan({g.name: (0, 2, 5) for g in structure.prunable if g.kind == "ranks"})
    small = stating(shrink(copy.deepcopy(loaded.model), structure, plan), loaded)
    config = small.config
    assert (config.v_head_dim, config.qk_nope_head_dim, config.num_attention_heads) == (3, 8, 4)
    stock = transformers.DeepseekV3ForCausalLM(config).eval()
    stock.load_state_dict(small.state_dict())
    with torch.no_grad():
        assert torch.equal(loaded.logits(loaded.example, stock), loaded.logits(loaded.example, small))


@pytest.mark.parametrize("name", ["llama", "gpt2", "dinov2"])
def test_a_stated_configuration_builds_the_cut_model(name: str):
    loaded, structure = traced(name)
    plan = Plan({g.name: tuple(range(g.n // 2)) for g in structure.prunable if g.kind in SAID[name]})
    small = stating(shrink(copy.deepcopy(loaded.model), structure, plan), loaded)
    stock = getattr(transformers, type(small).__name__)(small.config).eval()
    stock.load_state_dict(small.state_dict())
    with torch.no_grad():
        assert torch.equal(loaded.logits(loaded.example, stock), loaded.logits(loaded.example, small))


def test_fewer_heads_are_not_taken_for_narrower_ones():
    """Half of the heads and half of their size have the same shapes."""
    loaded, structure = traced("llama")
    plan = Plan({g.name: (0,) for g in structure.prunable if g.kind == "heads"})
    small = stating(shrink(copy.deepcopy(loaded.model), structure, plan), loaded)
    assert (small.config.num_attention_heads, small.config.num_key_value_heads, small.config.head_dim) == (2, 1, 6)


def test_layers_of_unequal_width_are_nothing_a_configuration_says():
    loaded, structure = traced("llama")
    first = next(g for g in structure.prunable if g.kind == "neurons")
    small = shrink(copy.deepcopy(loaded.model), structure, Plan({first.name: tuple(range(3))}))
    before = small.config
    assert stating(small, loaded).config is before


def test_a_copy_without_values_has_the_same_shapes():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    empty = on_meta(model)
    assert shapes_of(empty) == shapes_of(model) and all(p.is_meta for p in empty.parameters())
    assert not any(p.is_meta for p in model.parameters())


def test_weight_norms_that_a_copy_lost_come_back_when_it_is_saved():
    dense = tiny_parts.model("wav2vec2")
    loaded = load_model(dense)
    assert "wav2vec2.encoder.pos_conv_embed.conv" in loaded.info["weight_norms"]
    assert record(loaded, copy.deepcopy(loaded.model))[0] == "torch"  # plain weights are not what its library builds
    again = normed_again(copy.deepcopy(loaded.model), loaded.info["weight_norms"])
    assert record(loaded, again)[0] == "transformers" and again.state_dict().keys() == dense.state_dict().keys()
    with torch.no_grad():
        torch.testing.assert_close(loaded.logits(loaded.example, again), loaded.logits(loaded.example, dense))
    structure = trace(loaded.model, lambda m: loaded.outputs(loaded.example, m))
    assert can_say(loaded, structure, "neurons")


def test_weight_norms_of_a_model_that_was_changed_by_hand_stay_folded():
    dense = tiny_parts.model("wav2vec2")
    dense.dropout = nn.Identity()
    assert load_model(dense).info["weight_norms"] == {}
