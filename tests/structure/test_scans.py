"""Code that hands out the weights of its layers, and tables that it looks up for every item."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modhifi.structure.expand import expand
from modhifi.structure.plan import Plan
from modhifi.structure.sizes import sizes_of
from modhifi.structure.surgery import mask_readers, shrink
from modhifi.structure.tracing.tracer import trace
from modhifi.structure.trial_cut import confirm


class OfItems(nn.Module):
    """Attention with a column of a table for each head, looked up for every pair of positions of every item."""

    at: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out, self.heads = nn.Linear(6, 36), nn.Linear(12, 3), 3
        self.table = nn.Parameter(torch.randn(5, 3))
        self.register_buffer("at", torch.arange(5)[:, None].sub(torch.arange(5)).abs())

    def places(self, x: Tensor) -> Tensor:
        return F.embedding(self.at.expand(len(x), -1, -1), self.table).permute(0, 3, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        return self.out(((q @ k.mT + self.places(x)).softmax(-1) @ v).transpose(1, 2).flatten(2))


class Scan(nn.Module):
    """A state of three numbers for each channel that the input drives, as Mamba's: its code hands out bare weights."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.conv = nn.Linear(6, 16), nn.Conv1d(8, 8, 3, groups=8, padding=2)
        self.rates, self.step, self.out = nn.Linear(8, 8, bias=False), nn.Linear(2, 8), nn.Linear(8, 3)
        self.decay = nn.Parameter(torch.rand(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        x, gate = self.into(x).mT.chunk(2, 1)
        weight = self.conv.weight.squeeze(1).unsqueeze(1)
        x = F.conv1d(x, weight, self.conv.bias, padding=2, groups=x.shape[1])[..., : x.shape[2]].relu()
        step, push, read = self.rates(x.mT).split([2, 3, 3], -1)
        step = F.softplus(self.step.weight @ step.mT + self.step.bias[:, None])[..., None]
        decay, push = torch.exp(-self.decay[None, :, None] * step), step * push[:, None] * x[..., None]
        state, states = torch.zeros_like(push[:, :, 0]), []
        for at in range(x.shape[2]):
            state = decay[:, :, at] * state + push[:, :, at]
            states.append((state @ read[:, at, :, None])[..., 0])
        return self.out((torch.stack(states, -1) * F.silu(gate)).mT)


@pytest.mark.parametrize(("kind", "name"), [(OfItems, "qkv"), (Scan, "into")])
@torch.no_grad()
def test_weights_and_tables_that_code_reads_by_itself_pass_the_mask_oracle(kind: type[nn.Module], name: str):
    torch.manual_seed(1)
    model, x = kind().eval().double(), torch.randn(2, 5, 6, dtype=torch.float64)
    structure = confirm(model, trace(model, lambda m: m(x)), lambda m: m(x))
    assert [g.name for g in structure.prunable] == [name]
    plan = Plan({name: (0, 2)})
    small = shrink(copy.deepcopy(model), structure, plan)
    torch.testing.assert_close(small(x), mask_readers(model, structure, plan)(x), rtol=1e-9, atol=1e-12)
    assert float((small(x) - model(x)).abs().max()) > 1e-4
    assert sizes_of(model, structure).parameters({name: 2}) == sum(p.numel() for p in small.parameters())
    torch.testing.assert_close(expand(small, model, structure, plan)(x), small(x), rtol=1e-9, atol=1e-12)


def test_channels_of_a_sequence_that_a_convolution_mixes_are_no_neurons():
    torch.manual_seed(1)
    model, x = Scan().eval(), torch.randn(2, 5, 6)
    assert {g.name: g.kind for g in trace(model, lambda m: m(x)).prunable} == {"into": "channels"}
