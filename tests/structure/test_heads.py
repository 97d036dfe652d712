from __future__ import annotations

import copy

import pytest
import tiny_transformers
import torch
from torch import Tensor, nn

from modhifi.models.load import load_model
from modhifi.pruning.settings import PruneSettings
from modhifi.pruning.stages import choose_groups
from modhifi.runs.check import check_model
from modhifi.structure.groups import Group
from modhifi.structure.plan import Plan
from modhifi.structure.surgery import mask_readers, shrink
from modhifi.structure.tracing.tracer import trace
from modhifi.structure.trial_cut import confirm

NAMES = [*tiny_transformers.FAMILIES, *tiny_transformers.TIMM]
WITHOUT_HEADS = {"convnext_atto", "beit_base_patch16_224"}
WITHOUT_NEURONS = {"convnext_atto"}


def blocks(groups: tuple[Group, ...], kind: str) -> list[Group]:
    return [g for g in groups if g.kind == kind]


@pytest.mark.parametrize("name", NAMES)
def test_heads_and_neurons_of_every_family_pass_the_mask_oracle(name: str):
    model, _, run = tiny_transformers.family(name)
    structure = confirm(model, trace(model, run), run)
    depth = 4 if "swin" in name else 2
    heads, neurons = blocks(structure.prunable, "heads"), blocks(structure.prunable, "neurons")
    assert len(heads) == (0 if name in WITHOUT_HEADS else depth)
    assert len(neurons) == (0 if name in WITHOUT_NEURONS else depth)
    generator = torch.Generator().manual_seed(1)
    for step in range(2):  # other widths in every layer, then the narrowest
        kept = {}
        for g in structure.prunable:
            most = int(torch.randint(1, g.n, (1,), generator=generator)) if step == 0 else 1
            most = max(1, most // g.step) * g.multiple
            parts = torch.zeros(g.n) if g.partition is None else g.partition
            order = torch.randperm(g.n, generator=generator)
            kept[g.name] = tuple(sorted(int(i) for p in parts.unique() for i in order[parts[order] == p][:most]))
        plan = Plan(kept)
        with torch.no_grad():
            masked = run(mask_readers(model, structure, plan))
            small = run(shrink(copy.deepcopy(model), structure, plan))
        torch.testing.assert_close(small, masked, rtol=1e-8, atol=1e-8 if small.dtype == torch.float64 else 1e-3)
        assert float((masked - run(model)).abs().max()) > 1e-3  # the cut shows in the output at all


def test_a_component_of_grouped_queries_is_a_whole_kv_group():
    model, _, run = tiny_transformers.family("llama")
    found = blocks(trace(model, run).prunable, "heads")[0]
    assert (found.n, found.queries, found.label) == (2, 2, "KV groups of 2 heads")
    shapes = {s.module.rpartition(".")[2]: tuple(s.index.shape) for s in found.slices}
    assert shapes == {"q_proj": (2, 12), "k_proj": (2, 6), "v_proj": (2, 6), "o_proj": (2, 12)}


def test_counts_of_heads_follow_the_cut():
    model, _, run = tiny_transformers.family("vit_tiny_patch16_224")
    structure = trace(model, run)
    small = shrink(copy.deepcopy(model), structure, Plan({"blocks.0.attn.qkv": (1, 2, 3)}))
    first, second = small.blocks[0].attn, small.blocks[1].attn
    assert (first.num_heads, first.attn_dim, first.head_dim) == (3, 24, 8)
    assert (second.num_heads, second.attn_dim, second.head_dim) == (4, 32, 8)


def test_check_says_why_the_heads_of_beit_stay():
    model, _, _ = tiny_transformers.family("beit_base_patch16_224")
    reasons = {r["name"]: r["reason"] for r in check_model(load_model(model.float()))["refused"]}
    assert "used outside that layer" in reasons["blocks.0.attn.qkv"]
    model, _, _ = tiny_transformers.family("vit_tiny_patch16_224")
    assert "blocks.0.attn.qkv" not in {r["name"] for r in check_model(load_model(model.float()))["refused"]}


def test_timms_beit_could_not_run_with_fewer_heads():
    """Why its heads are refused, whoever calls its layers: should this fail one day, the tracer can be taught them."""
    model, _, run = tiny_transformers.family("beit_base_patch16_224")
    attention = model.blocks[0].attn
    size, dim = attention.proj.in_features // attention.num_heads, attention.proj.in_features
    stay = torch.arange(dim) >= size
    attention.num_heads -= 1
    attention.qkv.weight = nn.Parameter(attention.qkv.weight[stay.repeat(3)], requires_grad=False)
    for name in ("q_bias", "v_bias"):
        setattr(attention, name, nn.Parameter(getattr(attention, name)[stay], requires_grad=False))
    attention.k_bias = attention.k_bias[stay]
    attention.proj.weight = nn.Parameter(attention.proj.weight[:, stay], requires_grad=False)
    if attention.relative_position_bias_table is not None:
        table = attention.relative_position_bias_table[:, 1:]
        attention.relative_position_bias_table = nn.Parameter(table, requires_grad=False)
    with pytest.raises(RuntimeError, match="is invalid for input of size"):  # reshape(B, N, C), C the input's width
        run(model)


class Attention(nn.Module):
    """Attention written by hand: an interleaved projection, products of tensors, a table of relative positions."""

    def __init__(self, heads: int = 3, size: int = 4) -> None:
        super().__init__()
        self.heads, self.size = heads, size
        self.qkv, self.out, self.last = nn.Linear(5, 3 * heads * size), nn.Linear(heads * size, 6), nn.Linear(6, 2)
        self.table = nn.Parameter(torch.randn(11, heads))
        self.register_buffer("index", torch.randint(11, (7, 7)))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(*x.shape[:2], -1, 3, self.size).unbind(3)
        weights = q.transpose(1, 2) @ k.permute(0, 2, 3, 1) / 2 + self.table[self.index].permute(2, 0, 1)
        mixed = torch.matmul(weights.softmax(-1), v.transpose(1, 2)).transpose(1, 2)
        return self.last(self.out(mixed.flatten(2)).relu())


def test_attention_written_by_hand():
    torch.manual_seed(0)
    model, x = Attention().eval().requires_grad_(False), torch.randn(2, 7, 5)

    def run(model: nn.Module) -> Tensor:
        return model(x)

    structure = confirm(model, trace(model, run), run)
    heads = blocks(structure.prunable, "heads")
    assert [(g.name, g.n) for g in heads] == [("qkv", 3)]
    assert {s.module: tuple(s.index.shape) for s in heads[0].slices} == {"qkv": (3, 12), "table": (3, 1), "out": (3, 4)}


class Cached(Attention):
    """Biases of every pair of places: rows of a table, chosen by its columns, and kept for the next pass."""

    def __init__(self, linear: bool) -> None:
        super().__init__()
        self.bias_cache: dict[str, Tensor] = {}
        self.layer = nn.Linear(11, self.heads, bias=False) if linear else None
        self.table = None if linear else nn.Parameter(torch.randn(self.heads, 11))

    def forward(self, x: Tensor) -> Tensor:
        if not self.bias_cache:
            table = self.table if self.layer is None else self.layer.weight
            chosen = table[:, self.index[0]].index_select(1, self.index.flatten() % 7)
            self.bias_cache[str(x.device)] = chosen.view(-1, 7, 7)
        q, k, v = self.qkv(x).view(*x.shape[:2], -1, 3, self.size).unbind(3)
        weights = q.transpose(1, 2) @ k.permute(0, 2, 3, 1) / 2 + self.bias_cache[str(x.device)]
        mixed = torch.matmul(weights.softmax(-1), v.transpose(1, 2)).transpose(1, 2)
        return self.last(self.out(mixed.flatten(2)).relu())


@pytest.mark.parametrize("linear, table", [(False, "table"), (True, "layer.weight")])
def test_rows_of_a_table_of_places_go_with_their_heads(linear: bool, table: str):
    torch.manual_seed(0)
    model, x = Cached(linear).eval().requires_grad_(False), torch.randn(2, 7, 5)
    run = lambda m: m(x)  # noqa: E731
    run(model)  # which fills the cache
    (heads,) = blocks(confirm(model, trace(model, run), run).prunable, "heads")
    assert {s.module: s.role for s in heads.slices} == {"qkv": "producer", table: "rows", "out": "reader"}


class Fused(nn.Module):
    """Four query heads and two of keys and values in one matrix, which is split by widths that the module keeps."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.num_key_value_heads, self.head_dim = 4, 2, 3
        self.num_key_value_groups = 2
        self.q_dim, self.kv_dim = 12, 6
        self.qkv, self.out, self.last = nn.Linear(5, 24), nn.Linear(12, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        pieces = self.qkv(x).split([self.q_dim, self.kv_dim, self.kv_dim], -1)
        q, k, v = (piece.view(*x.shape[:2], -1, self.head_dim).transpose(1, 2) for piece in pieces)
        mixed = torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        return self.last(self.out(mixed.transpose(1, 2).flatten(2)).relu())


def test_the_widths_of_queries_and_of_keys_in_one_matrix_are_counted():
    torch.manual_seed(0)
    model, x = Fused().eval().requires_grad_(False), torch.randn(2, 7, 5)
    heads = blocks(trace(model, lambda m: m(x)).prunable, "heads")
    assert [(g.n, g.queries) for g in heads] == [(2, 2)]
    assert {(attribute, amount) for _, attribute, amount in heads[0].attributes} == {
        ("num_heads", 2),
        ("num_key_value_heads", 1),
        ("q_dim", 6),
        ("kv_dim", 3),
    }
    run = lambda m: m(x)  # noqa: E731
    assert len(blocks(confirm(model, trace(model, run), run).prunable, "heads")) == 1


def test_rows_that_are_taken_one_by_one_are_a_gate_and_no_heads():
    class Gate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(5, 16), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            rows = self.up(x).view(*x.shape[:2], 2, -1)
            return self.down(rows[..., 0, :].sigmoid() * rows[..., 1, :])

    torch.manual_seed(0)
    model, x = Gate().eval().requires_grad_(False), torch.randn(2, 7, 5)
    run = lambda m: m(x)  # noqa: E731
    (gate,) = confirm(model, trace(model, run), run).prunable
    assert (gate.kind, gate.n) == ("neurons", 8)
    assert torch.equal(gate.producers[0].index, torch.stack([torch.arange(8), torch.arange(8, 16)], 1))


def test_channels_that_attention_sums_over_must_stay():
    class OneHead(Attention):
        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).chunk(3, -1)
            return self.last(self.out((q @ k.transpose(1, 2)).softmax(-1) @ v).relu())

    torch.manual_seed(0)
    model, x = OneHead().eval().requires_grad_(False), torch.randn(2, 7, 5)
    groups = trace(model, lambda m: m(x)).groups
    assert "sums over these channels" in str(next(g for g in groups if g.name == "qkv").refused)


def test_groups_are_chosen_by_kind():
    model, _, run = tiny_transformers.family("opt")
    structure = trace(model, run)
    for settings in (PruneSettings(only=("heads",)), PruneSettings(exclude=("neurons",))):
        assert {g.kind for g in choose_groups(structure, settings).prunable} == {"heads"}
