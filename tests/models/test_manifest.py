"""The manifest: parsed once, typed where it is needed, open to later keys."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from modhifi.errors import ModhifiError
from modhifi.models import manifest as module
from modhifi.models.load import load_model
from modhifi.models.manifest import Artifact, Manifest, read_manifest

SMALLEST = {
    "schema_version": 1,
    "base": {"source": "timm:x"},
    "model": {"framework": "timm", "info": {}, "differences": {"shapes": {}}},
    "weights": {"files": {"model.safetensors": "ab"}},
}


def test_the_smallest_manifest_has_defaults_for_the_rest() -> None:
    manifest = Manifest.model_validate(SMALLEST)
    assert manifest.groups == () and manifest.forgotten == () and manifest.calibration.hashes == ()
    assert manifest.plan().kept == {} and manifest.base.sha256 is None


def test_keys_of_a_later_version_are_kept() -> None:
    base = {"source": "timm:x", "licence": None, "found_in": "a drawer"}
    manifest = Manifest.model_validate(SMALLEST | {"base": base, "mood": "good"})
    assert manifest.base.model_dump(exclude_unset=True) == base and manifest.model_extra == {"mood": "good"}


def test_the_plan_is_of_the_groups_that_lost_something() -> None:
    groups = [{"name": "a", "kind": "channels", "n": 3, "kept": [0, 2]}, {"name": "b", "n": 2, "kept": [0, 1]}]
    assert Manifest.model_validate(SMALLEST | {"groups": groups}).plan().kept == {"a": (0, 2)}


@pytest.mark.parametrize(
    ("hashes", "intact"), [({"model.safetensors": "ab"}, True), ({"model.safetensors": "cd"}, False), ({}, False)]
)
def test_an_artefact_is_intact_if_every_file_is(hashes: dict[str, str], intact: bool) -> None:
    assert Artifact(Manifest.model_validate(SMALLEST), hashes).intact == intact


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.pop("schema_version"),
        lambda m: m.update(schema_version="one"),
        lambda m: m.pop("base"),
        lambda m: m.update(weights=[]),
        lambda m: m["model"].pop("differences"),
        lambda m: m.update(groups=[{"name": "a", "n": 3}]),
    ],
)
def test_a_broken_manifest_is_one_line(change: Callable[[dict[str, Any]], object], tmp_path: Path) -> None:
    content = json.loads(json.dumps(SMALLEST))
    change(content)
    (tmp_path / "modhifi.json").write_text(json.dumps(content))
    with pytest.raises(ModhifiError, match=r"modhifi\.json is broken; restore the file$"):
        read_manifest(tmp_path)


@pytest.mark.slow
def test_loading_parses_once_and_hashes_once(
    tmp_path: Path, model_dir: Path, image_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import modhifi
    from modhifi.models import artifact

    out = tmp_path / "small"
    data = {"samples": 16, "evaluation_samples": 8}
    modhifi.prune(model_dir, f"images:{image_dir}", ratio=0.3, checks={"walked": 0}, out=out, **data)
    parsed, hashed = [], []
    plain_parse, plain_hash = module.Manifest.model_validate, artifact.file_hash
    monkeypatch.setattr(module.Manifest, "model_validate", lambda c: (parsed.append(1), plain_parse(c))[1])
    monkeypatch.setattr(artifact, "file_hash", lambda p: (hashed.append(p.name), plain_hash(p))[1])
    loaded = load_model(out)
    assert loaded.artifact is not None and loaded.artifact.intact
    modhifi.verify(out, "synthetic", against=model_dir, samples=8, walked=0)
    assert len(parsed) == 2 and hashed == ["model.safetensors"] * 2
    content = (out / "model.safetensors").read_bytes()
    assert loaded.artifact.hashes == {"model.safetensors": hashlib.sha256(content).hexdigest()}
