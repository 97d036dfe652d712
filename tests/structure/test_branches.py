"""Where a stream is read: behind the activation that follows it, whatever its name."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modhifi.structure.torch_ops import names_of
from modhifi.structure.tracing.branches import BranchWatcher, Calls


class Branch(nn.Module):
    """A residual branch, and an activation that bends what it and its skip add up to."""

    def __init__(self, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.one, self.two, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(x)
        return self.head(self.activation(x + self.two(x)))  # type: ignore[no-any-return]


def watched(model: nn.Module, x: Tensor) -> BranchWatcher:
    watcher = BranchWatcher(model)
    watcher.depth[id(x)] = 0
    with torch.no_grad(), watcher:
        model(x)
    return watcher


@pytest.mark.parametrize(
    "activation",
    [
        torch.relu,
        torch.relu_,
        torch.sigmoid_,
        torch.tanh_,
        torch.celu_,
        torch.selu_,
        F.softsign,
        F.hardsigmoid,
        F.logsigmoid,
        F.hardshrink,
        lambda x: F.prelu(x, torch.tensor(0.2)),
    ],
)
def test_an_activation_bends_the_stream(activation: Callable[[Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    model, x = Branch(activation), torch.randn(2, 6)
    watcher = watched(model, x)
    (addition,) = watcher.additions
    assert addition.time in watcher.bent
    streams: list[Tensor] = []
    with torch.no_grad(), Calls({watcher.read[addition.time]: lambda out: streams.append(out.clone())}):
        model(x)
    # What is read there is what the classifier reads.
    inner = model.one(x)
    assert torch.equal(streams[0], activation((inner + model.two(inner)).detach()))


def test_a_movement_without_a_rule_of_its_own_is_followed() -> None:
    torch.manual_seed(0)
    order = torch.tensor([3, 1, 0, 2, 5, 4])
    model, x = Branch(lambda x: torch.index_select(x, 1, order)), torch.randn(2, 6)
    trail = watched(model, x).operators["head"][3]
    assert trail is not None and trail.index.tolist() == [order.tolist(), (order + 6).tolist()]


def test_differences_are_no_additions() -> None:
    assert {"sub", "__isub__", "rsub"} <= names_of("difference") and not names_of("difference") & names_of("sum")
