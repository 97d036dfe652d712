from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import tiny_transformers
import torch
from tiny_values import HEADS, SHARED, SIZE, WIDTH, grouped
from torch import Tensor, nn

from modhifi.errors import ModhifiError
from modhifi.models.load import load_model
from modhifi.pruning.settings import PruneSettings
from modhifi.pruning.stages import choose_groups, find_structure
from modhifi.runs.check import check_model
from modhifi.structure.expand import expand
from modhifi.structure.groups import Structure
from modhifi.structure.plan import Plan
from modhifi.structure.ranks import BETWEEN, FORM, confirm_ranks, ends_of, turn
from modhifi.structure.surgery import mask_readers, shrink
from modhifi.structure.tracing.tracer import trace_ranks
from modhifi.structure.trial_cut import FIXED

Run = Callable[[nn.Module], Tensor]


def family(name: str) -> tuple[nn.Module, Run]:
    if name == "own":
        model, x = grouped()
        return model, lambda m: m(x[:2])
    model, _, run = tiny_transformers.family(name)
    return model, run


def ranks_of(model: nn.Module, run: Run) -> Structure:
    return confirm_ranks(model, Structure(()), trace_ranks(model, run), run)


def first_half(structure: Structure) -> Plan:
    return Plan({g.name: tuple(range(0, g.n, 2)) for g in structure.prunable})


def turned_at_random(model: nn.Module, structure: Structure) -> nn.Module:
    """The model with the values of every head in another basis, which is far from orthogonal."""
    model, generator = copy.deepcopy(model), torch.Generator().manual_seed(2)
    for group in structure.prunable:
        ends = ends_of(model, group)
        turns = torch.randn(len(ends.rows), group.n, group.n, dtype=torch.float64, generator=generator)
        turn(ends, turns, torch.linalg.inv(turns))
    return model


# What has a width of its own for values: stock DeepSeek by `v_head_dim`; code that reads it off the tensors.
WITH_RANKS = {"own": 1, "deepseek_v3": 2, "deberta_v2": 2}


@pytest.mark.parametrize("name", WITH_RANKS)
@torch.no_grad()
def test_ranks_pass_the_mask_oracle_in_any_basis(name: str):
    model, run = family(name)
    structure = ranks_of(model, run)
    assert len(structure.prunable) == WITH_RANKS[name] and {g.kind for g in structure.prunable} == {"ranks"}
    model = turned_at_random(dense := model, structure)
    torch.testing.assert_close(run(model), run(dense), rtol=1e-8, atol=1e-8)
    plan = first_half(structure)
    masked = run(mask_readers(model, structure, plan))
    torch.testing.assert_close(run(shrink(copy.deepcopy(model), structure, plan)), masked, rtol=1e-8, atol=1e-8)
    assert float((masked - run(dense)).abs().max()) > 1e-3


def test_a_rank_is_one_channel_of_every_head():
    model, run = family("own")
    (group,) = ranks_of(model, run).prunable
    assert (group.name, group.n, group.label) == ("v#ranks", SIZE, "ranks")
    (made,), (read,) = group.producers, group.readers
    assert made.index.T.tolist() == torch.arange(SHARED * SIZE).view(SHARED, SIZE).tolist()
    assert read.index.T.tolist() == torch.arange(HEADS * SIZE).view(HEADS, SIZE).tolist()


def test_the_width_of_values_is_counted():
    model, run = family("deepseek_v3")
    structure = ranks_of(model, run)
    attention = "model.layers.0.self_attn"
    assert (attention, "v_head_dim", 1) in structure.prunable[0].attributes
    small = shrink(copy.deepcopy(model), structure, Plan({f"{attention}.kv_b_proj#ranks": (1, 4, 5)}))
    first, second = small.model.layers[0].self_attn, small.model.layers[1].self_attn
    assert (first.v_head_dim, first.kv_b_proj.out_features, first.o_proj.in_features) == (3, 4 * (8 + 3), 4 * 3)
    assert (second.v_head_dim, second.o_proj.in_features) == (8, 32)


REFUSED = {"llama": FIXED, "gpt2": FIXED, "bert": FIXED, "vit_tiny_patch16_224": "sums over these channels"}


@pytest.mark.parametrize("name", REFUSED)
def test_values_as_wide_as_keys_say_why_they_stay(name: str):
    groups = ranks_of(*family(name)).groups
    assert len(groups) == 2 and all(REFUSED[name] in str(group.refused) for group in groups)


def test_values_that_cannot_be_turned_stay():
    for between, reason in ((nn.ReLU(), BETWEEN), (Scaled(), FORM)):
        model, x = grouped(between)
        (group,) = ranks_of(model, lambda m: m(x[:2])).groups  # noqa: B023
        assert group.refused == reason


class Scaled(nn.Module):
    """A factor for each channel."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.rand(HEADS * SIZE))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


@pytest.mark.parametrize("name", WITH_RANKS)
@torch.no_grad()
def test_in_the_shapes_of_the_original_only_what_reads_the_values_differs(name: str):
    model, run = family(name)
    structure = ranks_of(model, run)
    plan = first_half(structure)
    small = shrink(turned_at_random(model, structure), structure, plan)
    wide = expand(small, model, structure, plan)
    torch.testing.assert_close(run(wide), run(small), rtol=1e-8, atol=1e-8)
    after = dict(wide.named_parameters())
    changed = {key for key, value in model.named_parameters() if not torch.equal(value, after[key])}
    assert changed == {f"{piece.module}.weight" for group in structure.prunable for piece in group.readers}


@torch.no_grad()
def test_values_that_were_trained_since_stay_their_own():
    model, run = family("own")
    structure = ranks_of(model, run)
    plan = first_half(structure)
    small = shrink(turned_at_random(model, structure), structure, plan)
    small.v.weight.add_(torch.randn_like(small.v.weight))
    assert WIDTH + 1 > SIZE  # other values are no linear map of the original's
    torch.testing.assert_close(run(expand(small, model, structure, plan)), run(small), rtol=1e-9, atol=1e-9)


def test_ranks_go_on_request_and_not_with_heads():
    model, _, _ = tiny_transformers.family("deepseek_v3")
    loaded = load_model(model.float())
    assert not any(g.kind == "ranks" for g in find_structure(loaded).groups)
    structure = find_structure(loaded, on_request=True)

    def chosen(*only: str) -> set[str]:
        return {g.kind for g in choose_groups(structure, PruneSettings(only=only)).prunable}

    assert "ranks" not in chosen() and chosen("ranks", "neurons") == {"ranks", "neurons"}
    with pytest.raises(ModhifiError, match="ranks and heads are made of the same channels"):
        chosen("ranks", "heads")


def test_who_asks_for_ranks_that_stay_is_told_why_and_nobody_else():
    llama = load_model(tiny_transformers.family("llama")[0].float())
    with pytest.raises(ModhifiError, match="with these settings; .*#ranks: the model's code counts on this width"):
        choose_groups(find_structure(llama, on_request=True), PruneSettings(only=("ranks",)))
    report = check_model(llama)
    assert not any("ranks" in row["name"] for row in (*report["refused"], *report["groups"]))
