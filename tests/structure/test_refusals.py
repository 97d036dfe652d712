"""What is said of groups that stay, and of layers that the example does not run."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import modhifi
from modhifi.models.load import load_model
from modhifi.runs.check import check_model


class Branched(nn.Module):
    """Two heads, of which large inputs take the second one, and one that only training runs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head, self.other = nn.Linear(8, 32), nn.Linear(32, 4), nn.Linear(32, 4)
        self.trained, self.wide = nn.Linear(32, 2), nn.Linear(64, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x).relu()
        return self.head(hidden) if x.sum() < 1e4 else self.other(hidden)


def test_layers_that_do_not_run_and_are_as_wide_as_what_was_cut_are_told():
    result = modhifi.prune(Branched(), torch.randn(64, 8), ratio=0.5)
    (told,) = (w for w in result.report["warnings"] if "does not run" in w)
    assert "does not run other, trained:" in told


def test_a_group_that_is_refused_alone_keeps_its_name():
    net = nn.Sequential(nn.Linear(8, 8), nn.Softmax(-1), nn.Linear(8, 4), nn.Softmax(-1), nn.Linear(4, 2))
    names = {row["reason"]: row["names"] for row in check_model(load_model(net, example=torch.randn(2, 8)))["folded"]}
    assert names == {"a softmax runs across these channels": ["*"], "these channels are the model's output": ["4"]}
