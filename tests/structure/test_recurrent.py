"""Hidden units of recurrent layers: what is found, the mask oracle, the way back to dense shapes, the work."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tiny_recurrent import CASES, recurrent
from torch import Tensor, nn

from modhifi.structure.expand import expand
from modhifi.structure.plan import Plan
from modhifi.structure.recurrent import Gates
from modhifi.structure.sizes import sizes_of
from modhifi.structure.surgery import mask_readers, shrink
from modhifi.structure.tracing.recurrent_rules import CELL
from modhifi.structure.tracing.tracer import trace
from modhifi.structure.trial_cut import confirm


@pytest.mark.parametrize("name", [*CASES, "copier"])
@torch.no_grad()
def test_oracle_of_recurrent_layers(name: str) -> None:
    net, x = recurrent(name)
    structure = trace(net, lambda net: net(x))
    assert confirm(net, structure, lambda net: net(x)) is structure
    assert [g.name for g in structure.refused] == ["head"]
    layer = "encoder" if name == "copier" else "rnn"
    assert f"{layer}.weight_ih_l0" in {g.name for g in structure.prunable}
    assert {"inputs"} <= {g.name for g in structure.prunable} or name == "copier"
    everything = Plan({g.name: tuple(range(0, g.n, 2)) for g in structure.prunable})
    for plan in (everything, *(Plan({key: kept}) for key, kept in everything.kept.items())):
        masked, small = mask_readers(net, structure, plan), shrink(copy.deepcopy(net), structure, plan)
        expected = masked(x)
        assert (expected - net(x)).norm() > 1e-3 * expected.norm()
        assert (small(x) - expected).norm() <= 1e-9 * expected.norm()
        assert (expand(small, net, structure, plan)(x) - expected).norm() <= 1e-9 * expected.norm()
        sizes, widths = sizes_of(net, structure), {key: len(kept) for key, kept in plan.kept.items()}
        assert sizes.parameters(widths) == sum(p.numel() for p in small.parameters())
        assert sizes.macs(widths) == trace(small, lambda net: net(x)).macs


def test_work_is_that_of_every_matrix_at_every_step() -> None:
    net, x = recurrent("lstm, deep, both ways")
    operators = trace(net, lambda net: net(x)).operators
    matrices = {name: p.numel() for name, p in net.named_parameters() if p.ndim == 2 and name.startswith("rnn")}
    assert {name: operators[name].macs for name in matrices} == {name: 6 * n for name, n in matrices.items()}


def test_units_of_equal_rank_go_together() -> None:
    net, x = recurrent("lstm, deep, both ways")
    structure = trace(net, lambda net: net(x))
    (group,) = (g for g in structure.prunable if g.name == "rnn.weight_ih_l0")
    columns = {s.module: s.index for s in group.readers}
    read = {}
    for part, name in enumerate(("rnn.weight_hh_l0", "rnn.weight_hh_l0_reverse")):
        above = [getattr(net.rnn, f"weight_ih_l1{end}")[:, 10 * part : 10 * part + 10] for end in ("", "_reverse")]
        own = net.get_parameter(name)
        energy = sum(w.square().sum(0) for w in (own, *above))
        read[name] = energy[columns[name][:, 0]].argsort(descending=True)
    assert torch.equal(read["rnn.weight_hh_l0"], read["rnn.weight_hh_l0_reverse"])


class Begun(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.GRU(5, 8, batch_first=True), nn.Linear(8, 4)
        self.start = nn.Parameter(torch.randn(1, 1, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x, self.start.expand(1, len(x), 8).contiguous())[0])


def test_a_state_that_is_learned_is_cut_along() -> None:
    torch.manual_seed(0)
    net, x = Begun().double().eval(), torch.randn(3, 6, 5, dtype=torch.float64)
    structure = trace(net, lambda net: net(x))
    (group,) = structure.prunable
    assert "start" in {s.module for s in group.of("along")}


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inputs, self.rnn, self.head = nn.Linear(5, 7), nn.LSTM(7, 8, batch_first=True), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        lengths = torch.full((len(x),), x.shape[1])
        packed = nn.utils.rnn.pack_padded_sequence(self.inputs(x).relu(), lengths, batch_first=True)
        return self.head(nn.utils.rnn.pad_packed_sequence(self.rnn(packed)[0], batch_first=True)[0])


def test_packed_sequences_are_refused() -> None:
    net, x = Packed().eval(), torch.randn(3, 6, 5)
    assert trace(net, lambda net: net(x)).prunable == ()


def test_a_matrix_of_gates_is_cut_without_values() -> None:
    layer = nn.LSTM(3, 4, device="meta")
    Gates(layer, "weight_ih_l0").cut(torch.tensor([True, False, True]), torch.arange(16) % 4 < 3)
    assert layer.weight_ih_l0.shape == (12, 2)


@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_cells_are_refused_and_the_reason_says_what_goes(kind: type[nn.RNNCellBase]) -> None:
    class Steps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inputs, self.cell, self.head = nn.Linear(5, 6), kind(6, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            state: Any = None
            for step in self.inputs(x).unbind(1):
                state = self.cell(step, state)
            return self.head(state[0] if isinstance(state, tuple) else state)

    structure = trace(Steps().eval(), lambda net: net(torch.randn(2, 4, 5)))
    refused = {g.name: (g.n, g.refused) for g in structure.refused}
    assert refused["cell"] == (8, CELL) and CELL in str(refused["inputs"][1]) and not structure.prunable
