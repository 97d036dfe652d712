"""Models that draw random numbers in eval mode: the same ones for the same batch, whoever runs them."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import ViTMAEConfig, ViTMAEModel

import modhifi
from modhifi.models import loaded as loaded_module
from modhifi.models.load import load_model
from modhifi.models.loaded import LoadedModel


class Guessing(nn.Module):
    """Dropout that stays on in eval mode, as Monte Carlo dropout does."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(nn.functional.dropout(x, 0.5, training=True))


def wrapped(model: nn.Module) -> LoadedModel:
    return replace(load_model(model.eval(), example=torch.randn(2, 8)))


@torch.no_grad()
def test_a_batch_draws_its_own_numbers_and_leaves_those_outside_alone() -> None:
    loaded, (one, other) = wrapped(Guessing()), torch.randn(2, 500, 8)
    state = torch.get_rng_state()
    first = loaded.logits(one)
    torch.rand(3)
    outside = torch.get_rng_state()
    assert torch.equal(loaded.logits(one), first)
    assert torch.equal(loaded.logits(one, copy.deepcopy(loaded.model)), first)  # a model to be compared with
    assert torch.equal(torch.get_rng_state(), outside) and not torch.equal(state, outside)
    moved = loaded.logits(one + torch.rand(1)) - first
    assert float(moved.norm() / first.norm()) > 0.1  # another batch, other numbers
    assert loaded.logits(other).shape == (500, 4)


def test_a_model_that_draws_nothing_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = wrapped(nn.Linear(8, 4))
    loaded.logits(loaded.example)
    monkeypatch.setattr(loaded_module, "drawing_by", None)
    loaded.logits(loaded.example)


def test_a_model_in_training_draws_as_it_likes() -> None:
    loaded = wrapped(Guessing())
    loaded.logits(loaded.example)
    student = copy.deepcopy(loaded.model).train()
    batch = torch.randn(50, 8)
    assert not torch.equal(loaded.logits(batch, student), loaded.logits(batch, student))


def test_monte_carlo_dropout_is_pruned_as_what_it_is() -> None:
    items = torch.randn(200, 8)
    small = modhifi.prune(Guessing().eval(), items, ratio=0.5)
    assert small.model.layers[0].out_features == 16
    assert small.bounds.statistical.error_quantile.measured < 1


def test_a_masked_autoencoder_is_pruned_and_reloaded(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = ViTMAEModel(
        ViTMAEConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            image_size=32,
            patch_size=8,
            decoder_hidden_size=16,
            decoder_num_attention_heads=2,
        )
    )
    model.save_pretrained(tmp_path / "mae")
    modhifi.prune(str(tmp_path / "mae"), ratio=0.5, samples=16, out=tmp_path / "small")
    again = ViTMAEModel.from_pretrained(tmp_path / "small")
    assert again.config.intermediate_size == 32
