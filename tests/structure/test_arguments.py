"""Heads of which a module is given something for each, as ALiBi's slopes: BLOOM, MPT, Falcon, and by hand."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import pytest
import tiny_transformers
import torch
import transformers
from torch import Tensor, nn

from modhifi.artifacts.save import save_artifact
from modhifi.models.load import load_model
from modhifi.models.loaded import LoadedModel
from modhifi.models.manifest import read_manifest
from modhifi.models.stock import can_say
from modhifi.pruning.stages import find_structure
from modhifi.structure.arguments import TAKES, take_fewer
from modhifi.structure.expand import expand
from modhifi.structure.groups import Structure
from modhifi.structure.outputs import difference
from modhifi.structure.plan import Plan
from modhifi.structure.sizes import sizes_of
from modhifi.structure.surgery import mask_readers, shrink
from modhifi.structure.tracing.tracer import trace
from modhifi.structure.trial_cut import confirm

FALCON: dict[str, Any] = dict(hidden_size=48, num_attention_heads=6, num_hidden_layers=2, vocab_size=50, alibi=True)
ALIBI: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "bloom": ("BloomForCausalLM", "BloomConfig", dict(hidden_size=48, n_layer=2, n_head=6, vocab_size=50), "alibi"),
    "mpt": (
        "MptForCausalLM",
        "MptConfig",
        dict(d_model=48, n_heads=6, n_layers=2, vocab_size=50, max_seq_len=40),
        "position_bias",
    ),
    "falcon": ("FalconForCausalLM", "FalconConfig", FALCON | dict(multi_query=False), "attention_mask"),
    "falcon, eager": (
        "FalconForCausalLM",
        "FalconConfig",
        FALCON | dict(multi_query=False, attn_implementation="eager"),
        "alibi",
    ),
    "falcon, grouped": (
        "FalconForCausalLM",
        "FalconConfig",
        FALCON | dict(num_kv_heads=3, new_decoder_architecture=True),
        "attention_mask",
    ),
}


def built(name: str) -> tuple[LoadedModel, Structure]:
    torch.manual_seed(0)
    kind, config, fields, _ = ALIBI[name]
    model = getattr(transformers, kind)(getattr(transformers, config)(**fields))
    loaded = load_model(tiny_transformers.livelier(model.eval().requires_grad_(False)))
    return loaded, find_structure(loaded)


def unequal(structure: Structure) -> Plan:
    """All heads of the first block but the first, of the second block two that are no neighbours."""
    first, second = (group for group in structure.prunable if group.kind == "heads")
    return Plan({first.name: tuple(range(1, first.n)), second.name: (0, second.n - 1)})


@pytest.mark.parametrize("name", ALIBI)
@torch.no_grad()
def test_alibis_slopes_go_with_their_heads(name: str) -> None:
    loaded, structure = built(name)
    plan = unequal(structure)
    arguments = {slice_.module.rpartition(".")[2] for g in structure.prunable for slice_ in g.of("argument")}
    assert ALIBI[name][3] in arguments
    assert not can_say(loaded, structure, "heads")
    narrow = shrink(copy.deepcopy(loaded.model), structure, plan)
    rows = torch.randint(3, 50, (3, 7))
    options: dict[str, Any] = dict(max_new_tokens=6, min_new_tokens=6, do_sample=False)
    padded = torch.ones_like(rows).index_put((torch.tensor(0), torch.arange(3)), torch.tensor(0))
    cached, plain = (narrow.generate(rows, attention_mask=padded, use_cache=use, **options) for use in (True, False))
    assert torch.equal(cached, plain)

    def outputs(model: nn.Module) -> Mapping[str, Tensor]:
        return loaded.outputs(loaded.example, model)

    # A cut model is cut again.
    again = load_model(narrow)
    structure_again = find_structure(again)
    group = next(group for group in structure_again.prunable if group.kind == "heads")
    second = Plan({group.name: tuple(range(group.n - 1))})
    expected = outputs(mask_readers(again.model, structure_again, second))["logits"]
    assert difference(outputs(shrink(again.model, structure_again, second))["logits"], expected) < 1e-6

    dense = loaded.model.double()
    small = shrink(copy.deepcopy(dense), structure, plan)
    masked = outputs(mask_readers(dense, structure, plan))["logits"]
    assert difference(masked, outputs(dense)["logits"]) > 1e-3
    assert difference(outputs(small)["logits"], masked) < 1e-9
    assert difference(outputs(expand(small, dense, structure, plan))["logits"], masked) < 1e-9


@pytest.mark.parametrize("name", ["bloom", pytest.param("mpt", marks=pytest.mark.slow)])
def test_what_a_block_takes_is_loaded_again_in_a_fresh_process(name: str, tmp_path: Any) -> None:
    loaded, structure = built(name)
    small = shrink(copy.deepcopy(loaded.model), structure, plan := unequal(structure))
    save_artifact(tmp_path, small, loaded, structure, plan, manifest={}, recipe={}, report={})
    entry = read_manifest(tmp_path).model
    assert (entry.stock, entry.remote) == (None, "AutoModelForCausalLM")
    values = [value for counts in entry.differences["attributes"].values() for value in counts.values()]
    assert [0, 6, 1, 2, 3, 4, 5] in values and [0, 6, 0, 5] in values


@torch.no_grad()
def test_tables_with_heads_between_rows_and_their_width_are_cut_along() -> None:
    """Funnel's relative positions, ``(width, heads, size)``, and its token types, ``(2, heads, size)``."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = dict(vocab_size=50, block_sizes=[1, 1], num_decoder_layers=1, d_model=32)
    config = transformers.FunnelConfig(**sizes, n_head=4, d_head=4, d_inner=40)
    model = transformers.FunnelForMaskedLM(config).eval().requires_grad_(False)
    loaded = load_model(tiny_transformers.livelier(model).double())
    structure = find_structure(loaded)
    heads = [group for group in structure.prunable if group.kind == "heads"]
    assert len(heads) == 3
    plan = Plan({group.name: (0, 2, 3)[number:] for number, group in enumerate(heads)})
    small = shrink(copy.deepcopy(loaded.model), structure, plan)
    attention = small.get_submodule("funnel.encoder.blocks.1.0.attention")
    shapes = {leaf: tuple(attention.get_parameter(leaf).shape) for leaf in ("r_kernel", "seg_embed")}
    assert shapes == {"r_kernel": (32, 2, 4), "seg_embed": (2, 2, 4)}
    widths = {name: len(kept) for name, kept in plan.kept.items()}
    assert sizes_of(loaded.model, structure).parameters(widths) == sum(p.numel() for p in small.parameters())

    def outputs(model: nn.Module) -> Tensor:
        return loaded.outputs(loaded.example, model)["logits"]

    masked = outputs(mask_readers(loaded.model, structure, plan))
    assert difference(masked, outputs(loaded.model)) > 1e-3
    assert difference(outputs(small), masked) < 1e-9
    assert difference(outputs(expand(small, loaded.model, structure, plan)), masked) < 1e-9


class Attention(nn.Module):
    """Attention whose scores get a bias from outside, and whose first two heads may be of another projection."""

    def __init__(self, halves: bool = False) -> None:
        super().__init__()
        self.halves, self.heads = halves, 4
        self.qkv = nn.Linear(5, 36)
        self.others = nn.ModuleList(nn.Linear(5, 18) for _ in range(2))
        self.out = nn.Linear(12, 6)

    def forward(self, x: Tensor, bias: Tensor, scale: float = 0.5) -> Tensor:
        if self.halves:
            rows = torch.cat([layer(x).view(*x.shape[:2], -1, 9) for layer in self.others], 2)
        else:
            rows = self.qkv(x).view(*x.shape[:2], -1, 9)
        q, k, v = rows.transpose(1, 2).chunk(3, -1)
        mixed = (scale * q @ k.mT + bias.exp()).softmax(-1) @ v
        return self.out(mixed.transpose(1, 2).flatten(2))


class Biased(nn.Module):
    def __init__(self, halves: bool = False, own: bool = False) -> None:
        super().__init__()
        self.attention, self.last, self.own = Attention(halves), nn.Linear(6, 2), own
        self.register_buffer("slopes", torch.linspace(0, 1, 4)[:, None, None])

    def forward(self, x: Tensor) -> Tensor:
        places = torch.arange(x.shape[1], dtype=x.dtype)
        return self.last(self.attention(x, self.slopes * places if not self.own else self.slopes[:1] * places).relu())


def traced(model: nn.Module, x: Tensor) -> Structure:
    def run(model: nn.Module) -> Tensor:
        return model(x)

    return confirm(model, trace(model, run), run)


@torch.no_grad()
def test_a_bias_given_to_attention_by_its_place() -> None:
    torch.manual_seed(0)
    model, x = Biased().double().eval().requires_grad_(False), torch.randn(2, 4, 5).double()
    structure = traced(model, x)
    (heads,) = (group for group in structure.prunable if group.kind == "heads")
    assert {(s.module, s.role, s.dim): tuple(s.index.shape) for s in heads.slices} == {
        ("attention.bias", "argument", 0): (4, 1),
        ("attention.qkv", "producer", 0): (4, 9),
        ("attention.out", "reader", 0): (4, 3),
    }
    plan = Plan({"attention.qkv": (1, 3)})
    small = shrink(copy.deepcopy(model), structure, plan)
    torch.testing.assert_close(small(x), mask_readers(model, structure, plan)(x), rtol=1e-9, atol=1e-12)
    assert getattr(small.attention, f"{TAKES}bias") == (0, 4, 1, 3)


def test_a_bias_that_is_the_same_for_all_heads_stays() -> None:
    model, x = Biased(own=True).eval().requires_grad_(False), torch.randn(2, 4, 5)
    (heads,) = (group for group in traced(model, x).prunable if group.kind == "heads")
    assert not heads.of("argument")
    take_fewer(model.attention, "bias", 0, torch.tensor([True, False, True, False]))
    model(x)  # nothing is taken of one row for all


def test_one_bias_for_heads_of_two_layers_stays_and_says_why() -> None:
    model, x = Biased(halves=True).eval().requires_grad_(False), torch.randn(2, 4, 5)
    reasons = {group.name: group.refused for group in trace(model, lambda m: m(x)).refused}
    assert "attention.bias holds something for other heads as well" in str(reasons["attention.others.0"])
