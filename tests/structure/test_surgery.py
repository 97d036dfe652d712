"""The mask oracle: a model whose readers are blind to some components equals the model from which they are cut."""

from __future__ import annotations

import copy

import pytest
import tiny
import torch
from torch import Tensor, nn

from modhifi.errors import ModhifiError
from modhifi.structure.groups import Group, Structure
from modhifi.structure.plan import Plan
from modhifi.structure.surgery import mask_readers, shrink
from modhifi.structure.tracing.tracer import trace


def keep(group: Group, share: float, generator: torch.Generator) -> tuple[int, ...]:
    """A random choice that keeps equally many components per part."""
    labels = torch.zeros(group.n, dtype=torch.int64) if group.partition is None else group.partition
    kept: list[int] = []
    for label in labels.unique():
        mine = torch.nonzero(labels == label).flatten()
        count = min(len(mine) - 1, max(1, round(share * len(mine))))
        kept += mine[torch.randperm(len(mine), generator=generator)[:count]].tolist()
    return tuple(sorted(kept))


def plans(structure: Structure, each: bool) -> dict[str, Plan]:
    generator = torch.Generator().manual_seed(1)
    kept = {g.name: keep(g, 0.6, generator) for g in structure.prunable}
    found = {"all at once": Plan(kept)}
    if each:
        found |= {name: Plan({name: components}) for name, components in kept.items()}
    return found


def others(structure: Structure, plan: Plan) -> Plan:
    """Keeps what ``plan`` removes."""
    sizes = {g.name: g.n for g in structure.prunable}
    return Plan({name: tuple(i for i in range(sizes[name]) if i not in kept) for name, kept in plan.kept.items()})


@torch.no_grad()
def check_oracle(model: nn.Module, x: Tensor, each: bool) -> None:
    structure = trace(model, lambda model: model(x))
    dense = model(x)
    for name, plan in plans(structure, each).items():
        if not plan.kept:
            continue
        masked = mask_readers(model, structure, plan)(x)
        if torch.equal(masked, dense):  # those that went were silent behind their activation: the others are not
            plan = others(structure, plan)
            masked = mask_readers(model, structure, plan)(x)
        small = shrink(copy.deepcopy(model), structure, plan)
        assert (masked - dense).norm() > 1e-6 * dense.norm(), f"{name}: the mask changes nothing"
        assert (small(x) - masked).norm() <= 1e-9 * masked.norm(), name
        removed = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in small.parameters())
        assert removed > 0, name


@pytest.mark.parametrize("name", tiny.PATTERNS)
def test_oracle_of_every_pattern(name: str):
    check_oracle(*tiny.pattern(name), each=True)


SMALL = ("resnet18", "vgg16_bn", "convnext_atto")


@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_oracle_of_every_architecture(name: str):
    check_oracle(*tiny.architecture(name), each=name in SMALL)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(tiny.ARCHITECTURES) - set(SMALL)))
def test_oracle_of_every_group_of_a_large_architecture(name: str):
    check_oracle(*tiny.architecture(name), each=True)


def test_widths_are_those_of_the_plan():
    model, x = tiny.pattern("grouped")
    structure = trace(model, lambda model: model(x))
    small = shrink(model, structure, Plan({"inner.0": (0, 2, 4, 7, 8, 9), "stem.0": (1, 2, 3)}))
    assert (small.inner[0].in_channels, small.inner[0].out_channels) == (3, 6)
    assert (small.grouped[0].in_channels, small.grouped[0].out_channels, small.grouped[0].groups) == (6, 12, 3)
    assert small.grouped[0].weight.shape == (12, 2, 3, 3)
    assert small.inner[1].num_features == 6 and small.inner[1].running_var.shape == (6,)


def test_depthwise_and_parameters_keep_their_attributes_true():
    model, x = tiny.pattern("depthwise x2")
    small = shrink(model, trace(model, lambda model: model(x)), Plan({"stem.0": (0, 3, 5)}))
    depthwise = small.depthwise[0]
    assert (depthwise.in_channels, depthwise.out_channels, depthwise.groups) == (3, 6, 3)
    model, x = tiny.pattern("prelu")
    small = shrink(model, trace(model, lambda model: model(x)), Plan({"stem.0": (0, 3, 5)}))
    assert small.act.num_parameters == 3 and isinstance(small.act.weight, nn.Parameter)


@pytest.mark.parametrize(
    "plan, message",
    [
        (Plan({"absent": (0,)}), "a group 'absent' that this model lacks"),
        (Plan({"stem.0": (0, 8)}), "components of 'stem.0' that do not exist"),
        (Plan({"stem.0": ()}), "components of 'stem.0' that do not exist"),
        (Plan({"stem.0": (1, 1)}), "components of 'stem.0' that do not exist"),
        (Plan({"inner.0": (0, 1, 4, 8)}), "unequal shares of the parts of 'inner.0'"),
        (Plan({"inner.0": (0, 4)}), "unequal shares of the parts of 'inner.0'"),
        (Plan({"head": (0, 1)}), "'head' cannot be pruned: these channels are the model's output"),
    ],
)
def test_plans_that_do_not_fit(plan: Plan, message: str):
    model, x = tiny.pattern("grouped")
    structure = trace(model, lambda model: model(x))
    with pytest.raises(ModhifiError, match=message):
        shrink(copy.deepcopy(model), structure, plan)


def test_a_plan_survives_json():
    plan = Plan({"a": (0, 2)}, {"a": 0.5})
    assert Plan.from_json(plan.to_json()) == plan


def test_a_mask_is_written_into_no_shared_weight():
    model, x = tiny.pattern("plain")
    structure = trace(model, lambda model: model(x))
    plan = plans(structure, False)["all at once"]
    before = copy.deepcopy(model.state_dict())
    masked = mask_readers(model, structure, plan, model.parameters())
    read = {s.module for g in structure.prunable for s in g.readers}
    shared = {name for name, tensor in masked.named_parameters() if tensor is model.get_parameter(name)}
    assert shared == {name for name in dict(model.named_parameters()) if name.removesuffix(".weight") not in read}
    torch.testing.assert_close(masked(x), mask_readers(model, structure, plan)(x), rtol=0, atol=0)
    torch.testing.assert_close(dict(model.state_dict()), dict(before), rtol=0, atol=0)
