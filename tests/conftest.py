"""Fixtures shared by the tests of whole runs: a tiny timm model on disk and a folder of small images."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.models import save_for_hf

from modhifi.artifacts.reload_check import FreshProcess
from modhifi.progress import silent

# Errors would be said twice.
os.environ.pop("GITHUB_ACTIONS", None)
ARGS = dict(stem_type="deep", stem_width=4, channels=(8, 16, 16, 16), zero_init_last=False)


@pytest.fixture(autouse=True)
def error_lines_only(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keeps the lines a stage out of stderr, so that a test sees errors alone; ``stage_lines`` keeps them."""
    if "stage_lines" not in request.keywords:
        monkeypatch.setattr("modhifi.cli.common.Lines", lambda: silent)


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ResNet with random weights and lively BatchNorm statistics, 4 classes, 32 px, in timm's own format."""
    torch.manual_seed(0)
    model = timm.create_model("resnet18", num_classes=4, **ARGS)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    model.pretrained_cfg.update(
        input_size=(3, 32, 32), fixed_input_size=True, crop_pct=1.0, label_names=["a", "b", "c", "d"]
    )
    directory = tmp_path_factory.mktemp("models") / "tiny-resnet"
    save_for_hf(model, str(directory), model_args=ARGS, safe_serialization=True)
    return directory


@pytest.fixture(scope="session")
def image_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four class folders of twelve 32 px images each."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for name in "abcd":
        (root / name).mkdir()
        for i in range(12):
            coarse = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
            Image.fromarray(coarse).resize((32, 32)).save(root / name / f"{i}.png")
    return root


@pytest.fixture(scope="session", autouse=True)
def one_fresh_process() -> Iterator[None]:
    """One process loads again whatever tests save: each takes seconds to start. test_packaging starts others."""
    processes: list[FreshProcess] = []

    def started(library: str = "torch") -> FreshProcess:
        if not processes:
            processes.append(FreshProcess("transformers"))
        return processes[0]

    with pytest.MonkeyPatch.context() as patch:
        for module in ("artifacts.reload_check", "artifacts.save", "runs.prune", "runs.unlearn", "runs.heal"):
            patch.setattr(f"modhifi.{module}.FreshProcess", started)
        yield


@pytest.fixture(scope="session", autouse=True)
def one_pass_a_round() -> Iterator[None]:
    """Times are taken of one pass a round: no test looks at how exact they are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("modhifi.runs.timing.turns.ROUND_SECONDS", 1e-6)
        yield


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tests leave the user's cache alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MODHIFI_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
