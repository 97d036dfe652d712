"""Hybrids against brute force: every one of them run in full."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from modhifi.bounds.telescoping import hybrid_changes


class Net(nn.Module):
    """Convolutions with a norm, writing in place, a residual, and a layer that is run twice."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.two = nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu_(self.norm(self.one(x))).sub_(0.1)
        y = torch.relu_(self.two(x))
        y += x
        return self.head(torch.relu_(self.two(y)).mean((2, 3))) + x.mean((1, 2, 3))[:, None]


def pair(names: tuple[str, ...]) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    dense = Net().eval().requires_grad_(False).double()
    dense.norm.running_mean.normal_()
    edited = copy.deepcopy(dense)
    for name, tensor in [*edited.named_parameters(), *edited.named_buffers()]:
        if name in names:
            tensor.add_(0.1 * torch.rand_like(tensor))
    return dense, edited


def run(batch: Tensor, model: nn.Module) -> Tensor:
    return model(batch)


LAYERS = [("one.weight", "norm.running_var"), ("two.weight", "two.bias"), ("head.weight",)]


@pytest.mark.parametrize("sizes", [(5,), (2, 3)])
def test_hybrids_equal_those_run_in_full(sizes: tuple[int, ...]) -> None:
    dense, edited = pair(tuple(n for names in LAYERS for n in names))
    before, x = copy.deepcopy(edited.state_dict()), torch.randn(5, 3, 6, 6).double()
    changes, undone, whole = hybrid_changes(dense, edited, LAYERS, run, x.split(sizes))
    outputs, hybrid = [edited(x)], copy.deepcopy(edited)
    for names in LAYERS:
        hybrid.load_state_dict({k: v for k, v in dense.state_dict().items() if k in names}, strict=False)
        outputs.append(hybrid(x))
    torch.testing.assert_close(whole, outputs[0])
    torch.testing.assert_close(undone, dense(x))
    for change, first, second in zip(changes, outputs, outputs[1:], strict=False):
        torch.testing.assert_close(change, second - first)
        assert float(change.abs().max()) > 1e-4
    assert all(torch.equal(value, before[name]) for name, value in edited.state_dict().items())


class Convolutions(TorchDispatchMode):
    """Counts the convolutions that are computed."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += "convolution" in func.name()
        return func(*args, **(kwargs or {}))


def test_a_hybrid_computes_from_its_first_modified_layer_on() -> None:
    dense, edited = pair(tuple(n for names in LAYERS for n in names))
    with Convolutions() as convolutions:
        hybrid_changes(dense, edited, LAYERS, run, [torch.randn(2, 3, 6, 6).double()])
    # The original runs all three; so do the modified network and the last hybrid, the others the last two and none.
    assert convolutions.count == 3 + (3 + 2 + 0 + 3)


def test_what_is_read_out_of_sight_takes_no_remembered_result() -> None:
    """A layer in compiled code hides its parameters: nothing then tells where the hybrid begins to differ."""
    dense, edited = pair(("one.weight", "two.weight"))
    for model in (dense, edited):
        model.two = torch.jit.trace(model.two, torch.zeros(1, 4, 6, 6).double())
    x = torch.randn(3, 3, 6, 6).double()
    changes, _, _ = hybrid_changes(dense, edited, [("one.weight",), ("two.weight",)], run, [x])
    half = copy.deepcopy(edited)
    half.one.weight.data.copy_(dense.one.weight)
    torch.testing.assert_close(changes[0], half(x) - edited(x))
    torch.testing.assert_close(changes[1], dense(x) - half(x))
