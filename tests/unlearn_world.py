"""A tiny classifier of coloured noise, trained in a second, with its images on disk."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from timm.models import save_for_hf

NAMES = ("red", "green", "blue", "yellow", "violet")
COLOURS = np.array([[200, 60, 60], [60, 200, 60], [60, 60, 200], [200, 200, 60], [180, 60, 200]])
ARGUMENTS = dict(stem_width=8, channels=(8, 12, 16, 16))
SIZE, PER_CLASS = 32, 96


def pictures(seed: int, per_class: int) -> tuple[np.ndarray, torch.Tensor]:
    """uint8 ``(n, SIZE, SIZE, 3)`` and labels: a blot of the class's colour, tinted at random, on grey noise."""
    random = np.random.default_rng(seed)
    labels = np.repeat(np.arange(len(NAMES)), per_class)
    images = random.normal(128, 30, (len(labels), SIZE, SIZE, 3))
    for image, label in zip(images, labels, strict=True):
        y, x = random.integers(0, SIZE - 16, 2)
        image[y : y + 16, x : x + 16] += COLOURS[label] - 128 + random.normal(0, 45, 3)
    return images.clip(0, 255).astype(np.uint8), torch.from_numpy(labels)


def build(directory: Path) -> None:
    """Write ``model`` (timm's format), ``train/CLASS/*.png`` and ``test/CLASS/*.png``."""
    torch.manual_seed(0)
    images, labels = pictures(0, PER_CLASS)
    model = timm.create_model("resnet10t", num_classes=len(NAMES), **ARGUMENTS)
    x = (torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.25
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    for _ in range(4):
        for index in torch.randperm(len(x)).split(48):
            loss = F.cross_entropy(model(x[index]), labels[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    model.eval().pretrained_cfg.update(
        input_size=(3, SIZE, SIZE),
        mean=(0.5,) * 3,
        std=(0.25,) * 3,
        crop_pct=1.0,
        fixed_input_size=True,
        label_names=list(NAMES),
        num_classes=len(NAMES),
        license="apache-2.0",
    )
    save_for_hf(model, directory / "model", model_args=ARGUMENTS, safe_serialization=True)
    for split, (pixels, truth) in {"train": (images, labels), "test": pictures(1, PER_CLASS)}.items():
        for number, (image, label) in enumerate(zip(pixels, truth.tolist(), strict=True)):
            folder = directory / split / NAMES[label]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(folder / f"{number}.png")


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory that :func:`build` has filled."""
    directory = tmp_path_factory.mktemp("unlearn")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    build(directory)
    torch.set_num_threads(threads)
    return directory
