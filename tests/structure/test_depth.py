"""Blocks and sublayers: which can go, and what is left of a model without them."""

from __future__ import annotations

import copy

import pytest
import torch
from deep import DEPTH, NAMES, deep, inputs, known, of_kind, plan_without
from tiny_transformers import family
from torch import nn

from modhifi.errors import ModhifiError
from modhifi.models.load import load_model
from modhifi.pruning.stages import find_structure
from modhifi.structure.clone import clone
from modhifi.structure.depth import both_removed, drop, inside, name_after, name_before, removed_parts, spans
from modhifi.structure.expand import expand
from modhifi.structure.plan import Plan
from modhifi.structure.sizes import sizes_of
from modhifi.structure.surgery import mask_readers, shrink
from modhifi.structure.tracing.residual import FIRST, JOINED, NORMED
from modhifi.structure.trial_cut import WHOLE


@pytest.mark.parametrize(
    ("name", "kind"),
    [*((name, "blocks") for name in NAMES), *((name, "sublayers") for name in ("llama", "gpt2", "swin"))],
)
def test_a_model_without_branches_computes_what_one_with_silent_ones_does(name: str, kind: str) -> None:
    loaded, structure = known(name)
    structure = of_kind(structure, kind)
    before = {key: value.clone() for key, value in loaded.model.state_dict().items()}
    plan, x = plan_without(structure), inputs(loaded, 3)
    small = shrink(clone(loaded.model), structure, plan)
    masked = mask_readers(loaded.model, structure, plan, loaded.model.parameters())
    wide = expand(small, loaded.model, structure, plan)
    output = loaded.logits(x, small)
    for other in (masked, wide):
        torch.testing.assert_close(loaded.logits(x, other), output, rtol=1e-5, atol=1e-5)
    assert float((loaded.logits(x) - output).norm() / output.norm()) > 1e-3
    assert all(torch.equal(value, before[key]) for key, value in loaded.model.state_dict().items())
    kept = sum(p.numel() for p in small.parameters())
    widths = {group: len(stay) for group, stay in plan.kept.items()}
    assert sizes_of(loaded.model, structure).of(plan).parameters(widths) == kept


def test_every_block_but_the_first_can_go() -> None:
    loaded, structure = known("llama")
    groups = {g.name: g for g in structure.prunable if g.parts}
    assert {name: (g.kind, g.n) for name, g in groups.items()} == {
        "model.layers": ("blocks", DEPTH - 1),
        "model.layers.mlp": ("sublayers", DEPTH),
        "model.layers.self_attn": ("sublayers", DEPTH - 1),
    }
    assert groups["model.layers"].parts == tuple(f"model.layers.{n}" for n in range(1, DEPTH))
    assert not any(g.parts for g in find_structure(loaded).groups)  # looked for on request


@pytest.mark.parametrize(("name", "reason"), [("bert", NORMED), ("gpt_neox", JOINED), ("convnext_atto", FIRST)])
def test_blocks_that_cannot_go_say_why(name: str, reason: str) -> None:
    structure = find_structure(load_model(family(name)[0].float()), on_request=True)
    groups = [g for g in structure.groups if g.kind == "blocks"]
    assert groups and all(g.refused and reason in g.refused for g in groups)


class Numbered(nn.Module):
    """A net that takes its blocks by number."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = nn.ModuleList(Step() for _ in range(3))
        self.head = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for number in range(3):
            x = self.steps[number](x)
        return self.head(x)  # type: ignore[no-any-return]


class Step(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.inner(x)


def test_code_that_counts_on_its_blocks_is_found() -> None:
    torch.manual_seed(0)
    structure = find_structure(load_model(Numbered(), example=torch.randn(2, 6)), on_request=True)
    assert {g.refused for g in structure.groups if g.kind == "blocks"} == {WHOLE}


def test_layers_are_numbered_anew_and_so_is_what_is_said_of_each() -> None:
    types = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
    loaded = deep("qwen2", layer_types=types, sliding_window=8, use_sliding_window=True)
    structure = of_kind(find_structure(loaded, on_request=True), "blocks")
    small = shrink(clone(loaded.model), structure, Plan({"model.layers": (1, 2)}))
    assert small.config.num_hidden_layers == len(small.model.layers) == DEPTH - 1
    assert small.config.layer_types == [types[0], *types[2:]]
    assert [block.self_attn.layer_idx for block in small.model.layers] == list(range(DEPTH - 1))
    assert loaded.model.config.layer_types == types
    x = inputs(loaded, 1)
    with torch.no_grad():
        cached = small(x[:, :-1], use_cache=True)
        step = small(x[:, -1:], past_key_values=cached.past_key_values).logits[:, -1]
        torch.testing.assert_close(step, small(x).logits[:, -1], rtol=1e-4, atol=1e-4)


def test_the_nearest_branch_that_stays_comes_before_a_span() -> None:
    _, structure = known("llama")
    parts = ["model.layers.1.mlp", "model.layers.2", "model.layers.3.self_attn"]
    (span,) = spans(structure, parts)
    assert span.keeper.writer == "model.layers.1.self_attn.o_proj"
    assert [b.writer for b in span.removed] == [
        "model.layers.1.mlp.down_proj",
        "model.layers.2.self_attn.o_proj",
        "model.layers.2.mlp.down_proj",
        "model.layers.3.self_attn.o_proj",
    ]


def test_names_before_and_after() -> None:
    parts = {"a.1": 0, "a.2": 0, "a.4.b.0": 0, "a.3.c": 2}
    assert name_after("a.5.b.1.weight", parts) == "a.3.b.1.weight"
    assert name_after("a.4.b.1", parts) == "a.2.b.0"
    assert name_after("a.2.b.1", parts) is None
    for name in ("a.0", "a.4.b.1", "a.4.b.2.c", "a.6.x", "other.3"):
        assert name_before(str(name_after(name, parts)), parts) == name
    assert both_removed({"a.1": 0, "a.3.c": 2}, {"a.2": 0, "a.3.c": 1}) == {"a.1": 0, "a.3": 0, "a.4.c": 1}
    assert inside("a.1.weight", parts) and not inside("a.11", parts)


def test_removals_one_after_the_other_are_one() -> None:
    model = nn.Sequential(*(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, n)) for n in range(1, 7)))
    first, second = {"1": 0, "3.0": 1}, {"0": 0, "3.1": 1}
    twice = drop(drop(copy.deepcopy(model), first), second)
    once = drop(copy.deepcopy(model), both_removed(first, second))
    assert str(once) == str(twice)


def test_a_plan_may_remove_every_block_of_a_group_and_no_other() -> None:
    _, structure = known("llama")
    plan = Plan({"model.layers": ()})
    plan.check(structure)
    assert removed_parts(structure, plan) == {f"model.layers.{n}": 0 for n in range(1, DEPTH)}
    with pytest.raises(ModhifiError, match="do not exist"):
        Plan({"model.layers": (DEPTH - 1,)}).check(structure)
