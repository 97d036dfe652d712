from __future__ import annotations

import copy

import pytest
import tiny_transformers
import torch
from torch import Tensor, nn

from modhifi.structure.expand import expand
from modhifi.structure.groups import Group
from modhifi.structure.plan import Plan
from modhifi.structure.sizes import sizes_of
from modhifi.structure.stacked import Stacked
from modhifi.structure.surgery import mask_readers, shrink
from modhifi.structure.tracing.tracer import trace
from modhifi.structure.trial_cut import confirm


def of_experts(groups: tuple[Group, ...]) -> list[Group]:
    return [g for g in groups if g.experts > 1]


def half(group: Group) -> tuple[int, ...]:
    """Another half of every expert's neurons."""
    assert group.partition is not None
    generator, kept = torch.Generator().manual_seed(0), []
    for part in group.partition.unique():
        members = (group.partition == part).nonzero().flatten()
        kept += members[torch.randperm(len(members), generator=generator)[: len(members) // 2]].tolist()
    return tuple(sorted(kept))


@pytest.mark.parametrize("name", tiny_transformers.MIXTURES)
def test_neurons_of_every_expert_pass_the_mask_oracle(name: str):
    model, _, run = tiny_transformers.family(name)
    structure = confirm(model, trace(model, run), run)
    groups = of_experts(structure.prunable)
    assert len(groups) == (1 if name in ("llama4", "deepseek_v3") else 2) and {g.experts for g in groups} == {4}
    plan = Plan({g.name: half(g) for g in groups})
    with torch.no_grad():
        masked = run(mask_readers(model, structure, plan))
        small = shrink(copy.deepcopy(model), structure, plan)
        torch.testing.assert_close(run(small), masked, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(run(expand(small, model, structure, plan)), masked, rtol=1e-9, atol=1e-9)
        assert float((masked - run(model)).abs().max()) > 1e-6
    widths = {g.name: len(plan.kept[g.name]) for g in groups}
    assert sizes_of(model, structure).parameters(widths) == sum(p.numel() for p in small.parameters())


class Grouped(nn.Module):
    """Experts in one grouped product, rows sorted by expert, as transformers runs them by default."""

    def __init__(self, experts: int = 3, width: int = 8, hidden: int = 16) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(experts, hidden, width))
        self.down = nn.Parameter(torch.randn(experts, hidden, width))
        self.last = nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        ends = torch.arange(1, len(self.up) + 1, dtype=torch.int32) * (len(x) // len(self.up))
        hidden = nn.functional.grouped_mm(x, self.up.transpose(-2, -1), offs=ends).relu()
        return self.last(nn.functional.grouped_mm(hidden, self.down, offs=ends))


@pytest.mark.skipif(not hasattr(nn.functional, "grouped_mm"), reason="a newer PyTorch has it")
def test_a_grouped_product_is_followed_and_keeps_widths_that_it_can_take():
    torch.manual_seed(0)
    model, x = Grouped().eval().requires_grad_(False), torch.randn(6, 8)
    structure = confirm(model, trace(model, lambda m: m(x)), lambda m: m(x))
    (group,) = of_experts(structure.prunable)
    assert [(s.module, s.role) for s in group.slices] == [("up", "producer"), ("down.T", "reader")]
    assert (group.n, group.multiple, group.step) == (48, 4, 12)  # rows of 16 bytes
    plan = Plan({group.name: half(group)})
    torch.testing.assert_close(
        shrink(copy.deepcopy(model), structure, plan)(x), mask_readers(model, structure, plan)(x)
    )


class Listed(nn.Module):
    """Matrices of experts in a module of their own, which calls them its weight."""

    def __init__(self, shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(shape))

    def forward(self, rows: list[Tensor]) -> list[Tensor]:
        return [nn.functional.linear(x, self.weight[number]) for number, x in enumerate(rows)]


def test_matrices_that_are_called_a_weight_are_those_of_experts():
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down, self.last = Listed((2, 6, 4)), Listed((2, 4, 6)), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            hidden = [rows.relu() for rows in self.up(list(x.chunk(2)))]
            return self.last(torch.cat(self.down(hidden)))

    torch.manual_seed(0)
    model, x = Experts().eval().requires_grad_(False), torch.randn(4, 4)
    (group,) = confirm(model, trace(model, lambda m: m(x)), lambda m: m(x)).prunable
    assert (group.name, group.n, group.experts) == ("up.weight", 12, 2)


def test_matrices_that_nothing_known_multiplies_are_refused():
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.matrices = nn.Parameter(torch.randn(3, 4, 5))
            self.last = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(torch.einsum("bi,eoi->bo", x, self.matrices))

    structure = trace(Odd().eval(), lambda m: m(torch.randn(2, 5)))
    assert "no operation that modhifi knows" in str({g.name: g.refused for g in structure.refused}["matrices"])


def test_a_stack_is_its_own_transpose_turned():
    owner = nn.Module()
    owner.weight = nn.Parameter(torch.randn(3, 4, 5))
    assert torch.equal(Stacked(owner, "weight", True).matrices, owner.weight.mT)
    assert (Stacked(owner, "weight", True).out_features, Stacked(owner, "weight", False).out_features) == (15, 12)


def test_heads_that_read_one_latent_take_nothing_out_of_the_cache():
    model, _, run = tiny_transformers.family("deepseek_v3")
    latent = sizes_of(model, trace(model, run))
    assert not latent.cached and latent.cache({}) == 0
    model, _, run = tiny_transformers.family("mixtral")
    assert sizes_of(model, trace(model, run)).cache({}) > 0
