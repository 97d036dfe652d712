"""Models of images that are no pictures, of four channels for instance: every verb on a program's own tensors."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from timm.models import save_for_hf
from torch import Tensor

import modhifi
from modhifi.errors import ModhifiError

AMOUNTS = {"samples": 24, "evaluation_samples": 12, "checks": {"walked": 0}}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    arguments = {"in_chans": 4, "num_classes": 3, "channels": (8, 8, 16, 16), "stem_width": 8}
    out = tmp_path_factory.mktemp("four") / "model"
    save_for_hf(timm.create_model("resnet10t", **arguments), out, model_args=arguments)
    return out


@pytest.fixture(scope="module")
def images() -> list[tuple[Tensor, int]]:
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(4, 32, 32, generator=generator), i % 3) for i in range(300)]


def test_it_is_pruned_verified_and_healed(model: Path, images: list[tuple[Tensor, int]], tmp_path: Path) -> None:
    small = modhifi.prune(model, images, ratio=0.4, out=tmp_path / "small", **AMOUNTS)
    assert "contact_sheet" not in small.report
    bounds = modhifi.verify(tmp_path / "small", images, samples=12, walked=2, allow_overlap=True)
    assert any(rung.value is not None for rung in bounds.rungs)
    healed = modhifi.heal(tmp_path / "small", images, steps=2, batch_size=8, out=tmp_path / "healed", **AMOUNTS)
    assert healed.report["healing"]["steps"] == 2 and not any("drawn" in text for text in healed.report["warnings"])
    assert modhifi.load(tmp_path / "healed")(images[0][0][None]).shape == (1, 3)


@pytest.mark.parametrize("channels", [3, 4])
def test_a_class_is_forgotten_from_images_of_another_size_than_the_models(channels: int) -> None:
    # Of random weights, whose last BatchNorm of every branch is zero, and as many as 224 pixels by its own account.
    model = timm.create_model("resnet10t", in_chans=channels, num_classes=3, channels=(8, 8, 16, 16), stem_width=8)
    generator = torch.Generator().manual_seed(0)
    images = [(torch.randn(channels, 32, 32, generator=generator), i % 3) for i in range(300)]
    forgot = modhifi.unlearn(model, images, forget="0", **AMOUNTS | {"samples": 160, "evaluation_samples": 120})
    assert forgot.report["audit"]["rows"] and ("contact_sheet" in forgot.report) == (channels == 3)


@pytest.mark.parametrize("source", ["synthetic", "images"])
def test_files_and_drawn_images_are_refused_with_the_reason(model: Path, image_dir: Path, source: str) -> None:
    spec = source if source == "synthetic" else f"images:{image_dir}"
    with pytest.raises(ModhifiError, match="reads 4 channels, .* give tensors that it reads, from Python"):
        modhifi.prune(model, spec, ratio=0.4, **AMOUNTS)


def test_a_size_that_the_model_does_not_take_is_refused_with_the_reason() -> None:
    model = timm.create_model("vit_tiny_patch16_224", num_classes=3, depth=1, img_size=32).eval()
    images = [torch.randn(3, 64, 64) for _ in range(40)]
    with pytest.raises(ModhifiError, match=r"fails on a batch of \(2, 3, 64, 64\) .* images of the size that it takes"):
        modhifi.prune(model, images, ratio=0.4, **AMOUNTS)


def test_modules_are_healed_on_images_of_another_size() -> None:
    model = timm.create_model("resnet10t", num_classes=3, channels=(8, 8, 16, 16), stem_width=8).eval()
    images = [torch.randn(3, 48, 48) for _ in range(40)]
    small = modhifi.prune(model, images, ratio=0.4, **AMOUNTS)
    given = {"against": model, "steps": 1, "batch_size": 8, "only_this_data": True, **AMOUNTS}
    rows = {row["name"]: row for row in modhifi.heal(small.model, images, **given).report["before_after"]}
    # Both count at the size of the images.
    assert rows["FLOPs per sample"]["before"] == small.report["size"]["flops"][0]
