"""Weights in main memory or on disk: the same result as with all of them on the device."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pytest
import tiny_text
import torch
from torch import nn

import modhifi
from modhifi.calibration.block_stream import Stream
from modhifi.calibration.timeline import Timeline
from modhifi.errors import ModhifiError
from modhifi.models import offload
from modhifi.models.load import load_model
from modhifi.models.offload import let_visit, own_copy
from modhifi.runs.prune import PruneResult

BLOCKS = ("model.layers.0", "model.layers.1", "model.layers.2")
SPLIT = {
    "model.embed_tokens": "cpu",
    "model.rotary_emb": "cpu",
    "model.layers.0": "cpu",
    "model.layers.1": "disk",
    "model.layers.2": "disk",
    "model.norm": "disk",
    "lm_head": "cpu",
}

DISPATCH: dict[str, Callable[[nn.Module, Path], nn.Module]] = {
    "cpu": lambda m, at: accelerate.cpu_offload(m, "cpu"),
    "disk": lambda m, at: accelerate.disk_offload(m, str(at), "cpu"),
    "a map": lambda m, at: accelerate.dispatch_model(m, SPLIT, "cpu", offload_dir=str(at), force_hooks=True),
}


def prune(model: nn.Module, layout: str, **more: Any) -> PruneResult:
    chance = torch.Generator().manual_seed(0)
    windows = [torch.randint(3, tiny_text.VOCABULARY, (12,), generator=chance) for _ in range(20)]
    return modhifi.prune(
        model,
        windows,
        ratio=0.3,
        samples=16,
        evaluation_samples=4,
        method={"layout": layout},
        checks={"walked": 0},
        **more,
    )


@pytest.mark.parametrize("way", DISPATCH)
def test_models_that_accelerate_has_dispatched(way: str, tmp_path: Path) -> None:
    model, batch = tiny_text.llama(num_hidden_layers=3, tie_word_embeddings=True), torch.tensor([[3, 4, 5]])
    theirs = DISPATCH[way](copy.deepcopy(model), tmp_path)
    assert any(p.is_meta for p in theirs.parameters())
    ours = load_model(theirs).model
    assert not any(p.is_meta for p in ours.parameters()) and not any(hasattr(m, "_hf_hook") for m in ours.modules())
    assert ours.lm_head.weight is ours.model.embed_tokens.weight
    torch.testing.assert_close(ours(batch).logits, model(batch).logits, rtol=0, atol=0)
    ours.to(torch.float64)  # accelerate refuses to move its own
    assert any(p.is_meta for p in theirs.parameters())
    torch.testing.assert_close(theirs(batch).logits, model(batch).logits, rtol=0, atol=0)


class Elsewhere:
    """Stands for a device: what is carried there is a copy, marked by its address."""

    def __init__(self, model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
        self.homes = {t.data_ptr() for t in model.model.layers.state_dict().values()}
        self.carried = 0
        monkeypatch.setattr(offload, "_carried", self.carry)

    def carry(self, tensor: torch.Tensor, device: object) -> torch.Tensor | None:
        if tensor.data_ptr() not in self.homes:
            return None
        self.carried += 1
        return tensor.data.clone()

    def away(self, model: nn.Module) -> list[bool]:
        return [model.get_submodule(b).mlp.down_proj.weight.data_ptr() not in self.homes for b in BLOCKS]


def test_blocks_follow_their_input_and_go_home(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = tiny_text.llama(num_hidden_layers=3), torch.randint(3, 20, (2, 8))
    expected = model(batch).logits
    let_visit(model, BLOCKS, "cpu")
    place, seen = Elsewhere(model, monkeypatch), list[list[bool]]()
    for layer in model.model.layers:
        layer.mlp.register_forward_hook(lambda *_: seen.append(place.away(model)))
    assert torch.equal(model(batch).logits, expected)
    assert seen == [[i == j for j in range(3)] for i in range(3)]  # one at a time
    assert place.away(model) == [False] * 3


def test_a_stream_carries_every_block_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batches = tiny_text.llama(num_hidden_layers=3), [torch.randint(3, 20, (2, 8)) for _ in range(4)]
    timeline = Timeline(model, lambda: model(batches[0], use_cache=False))
    let_visit(model, BLOCKS, "cpu")
    place = Elsewhere(model, monkeypatch)
    stream = Stream(model, BLOCKS, lambda x: model(x, use_cache=False), timeline)
    for _ in BLOCKS:
        stream.advance(batches)
    assert place.carried == len(place.homes) and place.away(model) == [False] * 3


def test_what_is_written_elsewhere_comes_home(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_text.llama(num_hidden_layers=3)
    place, weight = Elsewhere(model, monkeypatch), model.model.layers[0].mlp.down_proj.weight
    for written in (False, True):
        before = weight.clone()
        with offload.staying([model.model.layers[0]], torch.device("cpu"), written=written):
            weight.data.fill_(3)
        assert bool((weight == 3).all()) is written and (written or torch.equal(weight, before))
        assert place.away(model) == [False] * 3


@pytest.mark.parametrize("layout", ["uniform", "global"])
def test_offloaded_blocks_prune_to_the_same_model(layout: str) -> None:
    model = tiny_text.llama(num_hidden_layers=3)
    plain = prune(model, layout)
    found = prune(accelerate.cpu_offload(copy.deepcopy(model), "cpu"), layout, offload=True)
    assert found.plan == plain.plan and found.plan.kept
    for (name, ours), usual in zip(found.model.state_dict().items(), plain.model.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, usual, msg=name)


def test_models_without_blocks_cannot_offload() -> None:
    with pytest.raises(ModhifiError, match="--offload needs a model made of blocks"):
        modhifi.prune("demo:resnet", "demo:calibration", ratio=0.3, samples=8, offload=True)


def test_other_modules_are_copied_as_they_are() -> None:
    layer = nn.Linear(2, 2)
    copied = own_copy(layer)
    assert copied is not layer and torch.equal(copied.weight, layer.weight)
