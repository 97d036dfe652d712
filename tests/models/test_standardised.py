"""Convolutions that standardise their weight become plain ones, which compute the same and can be cut."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from timm.layers.std_conv import ScaledStdConv2d, ScaledStdConv2dSame, StdConv2d, StdConv2dSame
from torch import nn
from transformers.models.bit.modeling_bit import WeightStandardizedConv2d

import modhifi
from modhifi.models.load import load_model
from modhifi.models.standardised import with_plain_weights

LAYERS: list[type[nn.Conv2d]] = [
    StdConv2d,
    StdConv2dSame,
    ScaledStdConv2d,
    ScaledStdConv2dSame,
    WeightStandardizedConv2d,
]


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("options", [{"stride": 2}, {"groups": 2}, {"dilation": 2}])
def test_a_plain_layer_computes_the_same(kind: type[nn.Conv2d], options: dict[str, int]) -> None:
    torch.manual_seed(0)
    layer: Any = kind(4, 6, 3, **options)
    if hasattr(layer, "gain"):
        layer.gain.data.uniform_(0.5, 2)
    images = torch.randn(2, 4, 13, 10)
    expected = layer(images)
    plain = with_plain_weights(nn.Sequential(layer))
    assert "standard" not in type(plain[0]).__name__.lower() and "std" not in type(plain[0]).__name__.lower()  # type: ignore[index]
    torch.testing.assert_close(plain(images), expected)


@pytest.mark.slow
def test_such_a_model_is_pruned_and_loaded_again(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes: dict[str, Any] = dict(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_groups=2, image_size=32)
    model = transformers.BitForImageClassification(transformers.BitConfig(**sizes)).eval()
    images = torch.randn(2, 3, 32, 32)
    assert torch.allclose(load_model(model).model(images).logits, model(images).logits, atol=1e-5)
    settings: dict[str, Any] = dict(samples=8, evaluation_samples=4, batch_size=4, checks={"walked": 0})
    small = modhifi.prune(model, "synthetic", ratio=2 / 7, out=tmp_path / "small", **settings)
    again = load_model(tmp_path / "small")
    assert torch.equal(again.model(images).logits, small.model(images).logits)
    # The library's own class would standardise the new weights once more.
    assert not (again.artifact and (again.artifact.manifest.model.stock or again.artifact.manifest.model.remote))
