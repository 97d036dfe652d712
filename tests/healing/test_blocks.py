"""Which blocks of two models are matched."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import timm
import tiny_text
import tiny_timm
import torch
from deep import known, of_kind
from torch import nn

from modhifi.healing.blocks import Cut, Watch, matched_blocks
from modhifi.models.load import load_model
from modhifi.pruning.stages import find_structure
from modhifi.structure.clone import clone
from modhifi.structure.depth import drop, removed_parts
from modhifi.structure.plan import Plan
from modhifi.structure.surgery import mask_readers, shrink


def test_blocks_of_residual_networks_and_transformers() -> None:
    resnet = load_model(tiny_timm.resnet())
    assert tuple(matched_blocks(resnet, resnet.model, Cut())) == ("layer1.0", "layer2.0", "layer3.0", "layer4.0")
    vit = load_model(tiny_timm.vit())
    assert tuple(matched_blocks(vit, vit.model, Cut())) == ("blocks.0", "blocks.1")


def test_blocks_of_a_language_model() -> None:
    llama = load_model(tiny_text.llama())
    assert tuple(matched_blocks(llama, llama.model, Cut())) == ("model.layers.0", "model.layers.1")


def test_a_block_of_another_width_is_left_out() -> None:
    first, second = (
        nn.Sequential(nn.Sequential(nn.Linear(3, w), nn.ReLU()), nn.Sequential(nn.Linear(w, 4))) for w in (5, 2)
    )
    loaded = load_model(first, example=torch.randn(2, 3))
    assert tuple(matched_blocks(loaded, second, Cut())) == ("1",)


def test_blocks_behind_a_removed_one_are_matched_with_what_they_were() -> None:
    loaded, structure = known("llama")
    (group,) = of_kind(structure, "blocks").prunable
    removed = removed_parts(of_kind(structure, "blocks"), Plan({group.name: (0, 2)}))
    small = drop(clone(loaded.model), removed)
    names = [f"model.layers.{n}" for n in range(4)]
    assert list(removed) == [names[2]]
    expected = {names[0]: names[0], names[1]: names[1], names[3]: names[2]}
    matched = matched_blocks(loaded, small, Cut(removed))
    assert {name: match.student for name, match in matched.items()} == expected
    assert matched_blocks(loaded, small, Cut()) == {}  # which of them are gone is not known


@pytest.mark.parametrize("make", [tiny_timm.resnet, partial(timm.create_model, "test_efficientnet")])
def test_narrower_blocks_are_matched_channel_by_channel(make: Callable[[], nn.Module]) -> None:
    """A student whose every channel stays what it was: nothing reads what is gone."""
    loaded = load_model(make())
    structure = find_structure(loaded)
    plan = Plan({g.name: tuple(range(1, g.n, 2)) if g.n > 1 else (0,) for g in structure.prunable})
    original = mask_readers(loaded.model, structure, plan)
    masked, small = load_model(original, example=loaded.example), shrink(clone(original), structure, plan)
    cut = Cut.of(original, structure, plan)
    matched = matched_blocks(masked, small, cut)
    assert any(match.stays is not None for match in matched.values())
    with Watch(original, tuple(matched)) as dense, Watch(small, tuple(m.student for m in matched.values())) as narrow:
        original(loaded.example)
        small(loaded.example)
    for match, wanted, got in zip(matched.values(), dense.take(), narrow.take(), strict=True):
        torch.testing.assert_close(match.part_of(wanted), got)


def test_what_is_overwritten_later_is_left_out() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(3, 4)), nn.ReLU(inplace=True), nn.Sequential(nn.Linear(4, 4)))
    loaded = load_model(model, example=torch.randn(2, 3))
    assert tuple(matched_blocks(loaded, clone(loaded.model), Cut())) == ("2",)


def test_outputs_come_in_the_order_of_the_names_and_are_taken_once() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 4))
    with Watch(model, ("1", "0")) as watch:
        model(torch.randn(1, 2))
        assert [tuple(x.shape) for x in watch.take()] == [(1, 4), (1, 3)]
        assert not watch.outputs
    model(torch.randn(1, 2))
    assert not watch.outputs


def test_a_narrower_block_that_turns_its_channels_round_is_left_out() -> None:
    class Turned(nn.Module):
        def __init__(self, inputs: int) -> None:
            super().__init__()
            self.inner, self.outer = nn.Conv2d(inputs, 8, 3, padding=1), nn.Conv2d(8, 8, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.outer(self.inner(x).relu()).flip(1).relu()

    net = nn.Sequential(Turned(3), Turned(8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    loaded = load_model(net, example=torch.randn(2, 3, 6, 6))
    structure = find_structure(loaded)
    plan = Plan({g.name: tuple(range(1, g.n, 2)) for g in structure.prunable})
    cut, small = Cut.of(loaded.model, structure, plan), shrink(clone(loaded.model), structure, plan)
    assert "0.outer" in cut.outputs and matched_blocks(loaded, small, cut) == {}
