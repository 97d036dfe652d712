"""Operations cost their launch on an accelerator: how many there are depends on the batches alone."""

from __future__ import annotations

import pytest
import torch
from counting import Dispatched
from torch import nn

from modhifi.calibration.collect import collect
from modhifi.calibration.sampling import Sampling

CONVS = {
    "conv": lambda: nn.Conv2d(3, 5, 3, padding=1),
    "grouped": lambda: nn.Conv2d(3, 6, 3, stride=2, padding=1, groups=3),
    "tokens": lambda: nn.Linear(40, 4),
}


def launches(name: str, batches: int, size: int, side: int) -> int:
    """The operations of collecting from a reader, once what is made for its first batch of a shape is there."""
    reader = CONVS[name]()
    shape = (side * side, 40) if name == "tokens" else (3, side, side)
    data = [torch.randn(size, *shape) for _ in range(batches)]
    for _ in range(2):
        with Dispatched() as dispatched:
            collect(reader, reader, data, {"it": reader}, Sampling(batch_size=size), samples=batches * size)
    return dispatched.count


@pytest.mark.parametrize("name", CONVS)
def test_operations_depend_on_the_number_of_batches_alone(name: str) -> None:
    few = launches(name, batches=8, size=2, side=48)
    assert few == launches(name, batches=8, size=8, side=48) == launches(name, batches=8, size=2, side=64)
    many = launches(name, batches=16, size=2, side=48)
    # the reader's own operations among them
    assert few < many <= few + 8 * {"conv": 8, "grouped": 8, "tokens": 7}[name]
