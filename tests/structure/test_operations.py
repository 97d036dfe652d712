"""Operations that torch does not bring: the hook, its kinds and rules, and that a wrong rule harms nobody."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import modhifi
from modhifi.errors import ModhifiError
from modhifi.structure import torch_ops
from modhifi.structure.groups import Structure
from modhifi.structure.tracing import operations
from modhifi.structure.tracing.placements import Axis, Placement, TracedCall
from modhifi.structure.tracing.tracer import trace
from modhifi.structure.tracing.watcher import Watcher
from modhifi.structure.trial_cut import FIXED, confirm


@torch.library.custom_op("modhifi_tests::bend", mutates_args=())
def bend(x: Tensor) -> Tensor:
    return x * x.sigmoid()


@torch.library.custom_op("modhifi_tests::turn", mutates_args=())
def turn(x: Tensor) -> Tensor:
    return x.flip(1).clone()


@torch.library.custom_op("modhifi_tests::gate", mutates_args=())
def gate(x: Tensor) -> Tensor:
    """The first half of the channels, times a bent second one."""
    value, slope = x.chunk(2, 1)
    return value * slope.sigmoid()


class Module(nn.Module):
    """A module around a custom operator of this file, which cannot be copied and is called by its name."""

    def __init__(self, operator: str) -> None:
        super().__init__()
        self.operator = operator

    def forward(self, x: Tensor) -> Tensor:
        return globals()[self.operator](x)  # type: ignore[no-any-return]


class Mix(nn.Module):
    """Elementwise as a whole, by operations that are not understood one by one."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([x, x.cumsum(1)]).select(0, 0) * 2


class Sums(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.cumsum(1)


class Scaled(nn.Module):
    """A scale for each channel that the tracer cannot see through."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(channels) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x + x.cumsum(1) * 0 + bend(x) * 0 + x * self.scale[:, None, None]


class Inline(nn.Module):
    """One function of torch as a module."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Einsum(nn.Module):
    """Attention in Einstein's notation."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (-1, 3)) for layer in (self.q, self.k, self.v))
        shares = torch.einsum("bihd,bjhd->bhij", q, k).softmax(-1)
        out: Tensor = self.out(torch.einsum("bhij,bjhd->bihd", shares, v).flatten(2))
        return out


@pytest.fixture(autouse=True)
def table_as_it_was() -> Iterator[None]:
    kinds, rules = dict(torch_ops.OPERATIONS), dict(operations.OWN_RULES)
    yield
    for table, before in ((torch_ops.OPERATIONS, kinds), (operations.OWN_RULES, rules)):
        table.clear()
        table.update(before)  # type: ignore[arg-type]


def find(middle: nn.Module, width: int = 8) -> Structure:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), middle, nn.Conv2d(width, 6, 3), nn.Flatten(), nn.Linear(6 * 9, 4)).eval()
    x = torch.randn(2, 3, 7, 7)

    def run(model: nn.Module) -> Tensor:
        return model(x)  # type: ignore[no-any-return]

    with torch.no_grad():
        return confirm(net, trace(net, run), run)


def first(structure: Structure) -> str | None:
    """Why the channels in front of the operation are refused, None where they can be pruned."""
    return next(g for g in structure.groups if g.name == "0").refused


def test_an_elementwise_operator() -> None:
    assert "'modhifi_tests::bend' is not understood" in str(first(find(Module("bend"))))
    modhifi.register_operation(bend, "elementwise")
    structure = find(Module("bend"))
    assert first(structure) is None
    assert [s.module for g in structure.prunable if g.name == "0" for s in g.readers] == ["2"]


@pytest.mark.parametrize(
    "name", [bend, "modhifi_tests::bend", torch.ops.modhifi_tests.bend, torch.ops.modhifi_tests.bend.default]
)
def test_the_ways_to_name_an_operator(name: object) -> None:
    modhifi.register_operation(name, "activation")  # type: ignore[arg-type]
    assert first(find(Module("bend"))) is None


def test_a_movement_is_run_on_component_numbers() -> None:
    modhifi.register_operation(turn, "movement")
    (group,) = (g for g in find(Module("turn")).groups if g.name == "0")
    assert group.refused is None
    assert group.readers[0].index.flatten().tolist() == list(reversed(range(8)))


def test_a_module_answers_for_what_runs_inside_it() -> None:
    assert first(find(Mix())) is not None
    modhifi.register_operation(Mix, "elementwise")
    assert first(find(Mix())) is None


def test_a_rule_of_ones_own_couples_components() -> None:
    def halves(watcher: Watcher, call: TracedCall) -> list[Placement | None]:
        axis = call.axis(call.inputs[0])
        if axis is None or axis.dim != 1:
            return watcher.refuse(call, "the halves must be channels")
        value, slope = axis.ids.chunk(2)
        watcher.couplings.unite(value, slope)
        return [Axis(1, value)]

    assert first(find(Module("gate"), 4)) is not None
    modhifi.register_operation(gate, halves)
    (group,) = (g for g in find(Module("gate"), 4).groups if g.name == "0")
    assert group.refused is None and group.n == 4
    assert torch.equal(group.producers[0].index, torch.stack([torch.arange(4), torch.arange(4, 8)], 1))


def test_a_channel_goes_with_its_gate() -> None:
    (group,) = (g for g in find(Inline(lambda x: F.glu(x, 1)), 4).groups if g.name == "0")
    assert group.refused is None and group.n == 4
    assert torch.equal(group.producers[0].index, torch.stack([torch.arange(4), torch.arange(4, 8)], 1))


@pytest.mark.parametrize(
    "function",
    [
        lambda x: F.glu(torch.cat([x, x], 2), 2),
        lambda x: x.cumsum(2),
        lambda x: x.gather(3, torch.tensor([3, 0, 4, 1, 2])[None, None, None].expand_as(x)),
    ],
)
def test_what_happens_along_other_axes_lets_channels_go(function: Callable[[Tensor], Tensor]) -> None:
    assert first(find(Inline(function))) is None


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x: x.cumsum(1), "'cumsum' runs across these channels"),
        (
            lambda x: x.gather(1, torch.arange(7, -1, -1)[None, :, None, None].expand_as(x)),
            "'gather' is not understood",
        ),
        (lambda x: x.gather(2, torch.arange(8)[None, :, None, None].expand_as(x) % 5), "'gather' is not understood"),
    ],
)
def test_what_mixes_channels_lets_them_stay(function: Callable[[Tensor], Tensor], reason: str) -> None:
    assert reason in str(first(find(Inline(function))))


def test_heads_in_einsteins_notation_go() -> None:
    net, x = Einsum().eval(), torch.randn(2, 5, 8)
    structure = confirm(net, trace(net, lambda m: m(x)), lambda m: m(x))
    (group,) = structure.prunable
    assert (group.kind, group.n) == ("heads", 4) and len(group.producers) == 3


@pytest.mark.parametrize(
    ("module", "fn"), [(Sums(), "cumsum"), (Sums(), Sums), (Module("turn"), turn), (Scaled(8), Scaled)]
)
def test_a_wrong_rule_is_caught_by_the_trial_cut(module: nn.Module, fn: object) -> None:
    modhifi.register_operation(fn, "elementwise")  # type: ignore[arg-type]
    assert first(find(module)) == FIXED


def test_a_later_rule_replaces_an_earlier_one() -> None:
    modhifi.register_operation(bend, lambda watcher, call: watcher.refuse(call, "not today"))
    assert "not today" in str(first(find(Module("bend"))))
    modhifi.register_operation(bend, "elementwise")
    assert first(find(Module("bend"))) is None


def test_what_cannot_be_registered() -> None:
    with pytest.raises(ModhifiError, match="no kind of operation 'elementwize'; choose one of activation, elementwise"):
        modhifi.register_operation(bend, "elementwize")  # type: ignore[arg-type]

    def function(x: Tensor) -> Tensor:
        return x

    with pytest.raises(ModhifiError, match="is Python code, which is followed line by line"):
        modhifi.register_operation(function, "elementwise")
    modhifi.register_operation(bend, lambda watcher, call: [])
    with pytest.raises(ModhifiError, match="'modhifi_tests::bend' returned 0 placements for 1 outputs"):
        find(Module("bend"))
