"""Artefacts of other versions: they load, or say what to do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import modhifi
from modhifi.errors import ModhifiError


@pytest.fixture(scope="module")
def artefact(tmp_path_factory: pytest.TempPathFactory, model_dir: Path, image_dir: Path) -> Path:
    out = tmp_path_factory.mktemp("upgrade") / "small"
    modhifi.prune(
        model_dir, f"images:{image_dir}", ratio=0.3, samples=16, evaluation_samples=8, checks={"walked": 0}, out=out
    )
    return out


def changed(artefact: Path, to: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    shutil.copytree(artefact, to)
    manifest = json.loads((to / "modhifi.json").read_text())
    change(manifest)
    (to / "modhifi.json").write_text(json.dumps(manifest))
    return to


def test_what_later_versions_added_is_not_needed(artefact: Path, tmp_path: Path) -> None:
    def forget(manifest: dict[str, Any]) -> None:
        for key in set(manifest) - {"schema_version", "base", "model", "weights"}:
            del manifest[key]
        del manifest["model"]["stock"]

    older = changed(artefact, tmp_path / "older", forget)
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(modhifi.load(older)(x), modhifi.load(artefact)(x))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(schema_version=2), "upgrade modhifi"),
        (lambda m: m.update(schema_version=0, versions={"modhifi": "0.0.1"}), "modhifi 0.0.1, or make it again"),
        (lambda m: m.pop("weights"), "broken; restore"),
        (
            lambda m: (m["versions"].update(timm="0.9"), m["model"]["info"].update(architecture="resnet0")),
            r"written with timm 0.9 \(.* is installed\): install those",
        ),
    ],
)
def test_what_cannot_be_loaded_says_what_to_do(
    artefact: Path, tmp_path: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    with pytest.raises(ModhifiError, match=message) as caught:
        modhifi.load(changed(artefact, tmp_path / "other", change))
    assert "\n" not in str(caught.value)
