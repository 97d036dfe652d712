"""Samples that are read again and again are loaded once, as far as there is room."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from modhifi.data.samples import Samples, remembered, synthetic_items


def test_remembered_samples_are_the_same_and_loaded_once_within_the_room() -> None:
    loads: list[int] = []

    def load(index: int) -> Tensor:
        loads.append(index)
        return torch.full((4,), float(index))

    samples: Samples = replace(synthetic_items(load, 3, "counted"), hashes=("a", "b", "c"))
    loads.clear()
    twice = remembered(samples, 2 * 4 * 4)  # room for two of the three
    for _ in range(2):
        assert torch.equal(next(twice.batches(3)), next(samples.batches(3)))
    assert [loads.count(i) - 2 for i in range(3)] == [1, 1, 2]  # two were those of the samples themselves
    assert torch.equal(twice.subset([2, 0]).load(0), samples.load(2)) and twice.hashes == samples.hashes
