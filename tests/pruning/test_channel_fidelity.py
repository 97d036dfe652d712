"""The closer look at one group, against its definition channel by channel."""

from __future__ import annotations

import pytest
import torch
from random_readers import READERS

from modhifi.pruning.channel_fidelity import channel_fidelities, cosine_similarity, hifi_sizes
from modhifi.pruning.fidelity import hifi_size, similarity, singleton_fidelity

ETAS = (0.5, 0.8, 0.9)


@pytest.mark.parametrize("kind", READERS)
def test_every_channel_has_its_singletons_and_its_smallest_naive_sets(kind: str) -> None:
    readers = READERS[kind](3)
    names = [f"layer{number}" for number in range(len(readers))]
    found = channel_fidelities(names, readers, ETAS)
    parts = [(name, part) for name, reader in zip(names, readers, strict=True) for part in reader.parts]
    assert [channel.reader for channel in found] == [name for name, _ in parts]
    for channel, (_, part) in zip(found, parts, strict=True):
        arguments = part.weight, part.second, part.columns
        assert torch.equal(channel.components, part.components)
        torch.testing.assert_close(channel.singleton, singleton_fidelity(*arguments))
        for eta in ETAS:
            assert torch.equal(channel.hifi[eta], hifi_size(*arguments, eta))


@pytest.mark.parametrize("kind", READERS)
def test_the_cosine_is_that_of_all_contributions(kind: str) -> None:
    readers = READERS[kind](5)
    n = len(readers[0].owner)
    total = torch.zeros(n, n, dtype=torch.float64)
    for part in (part for reader in readers for part in reader.parts):
        columns = part.columns.reshape(-1)
        for row in part.weight:
            q = similarity(row[columns], part.second[columns][:, columns], len(part.columns))
            total[part.components[:, None], part.components] += q
    scale = total.diagonal().sqrt()
    torch.testing.assert_close(cosine_similarity(readers), total / scale / scale[:, None])


def test_a_hifi_set_is_the_first_to_reach_its_fidelity() -> None:
    curves = torch.tensor([[0.0, 0.5, 0.8, 1.0], [0.0, float("nan"), 0.4, 0.6], [1.0, 1.0, 1.0, 1.0]])
    sizes = hifi_sizes(curves, [0.5, 0.8])
    assert {eta: size.tolist() for eta, size in sizes.items()} == {0.5: [1, 3, 0], 0.8: [2, 3, 0]}
