"""Artefacts of other versions: they load, or say what to do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import modhifi
from modhifi.cli.main import app
from modhifi.errors import ModhifiError

# Written by the release of that name; its README says how.
OLD = Path(__file__).parents[1] / "assets" / "artefact-0.1.0"


def test_an_artefact_of_the_first_release_gives_the_outputs_it_gave() -> None:
    recorded = load_file(OLD / "outputs.safetensors")
    model = modhifi.load(OLD / "pruned")
    torch.testing.assert_close(model(recorded["input"]), recorded["logits"], rtol=1e-5, atol=1e-6)
    assert sum(p.numel() for p in model.parameters()) == 2072


def test_an_artefact_of_the_first_release_verifies(image_dir: Path) -> None:
    options = ["--data", f"images:{image_dir}", "--samples", "40", "--walked", "2", "--max-flip", "0.9", "--json"]
    done = CliRunner().invoke(app, ["verify", str(OLD / "pruned"), "--against", str(OLD / "original"), *options])
    assert done.exit_code == 0, done.stderr
    verdicts = {row["name"]: row["verdict"] for row in json.loads(done.stdout)["verdicts"]}
    assert verdicts["self-test"] == "HOLDS" and verdicts["max flip 0.9"] == "PASS-STATISTICAL"
    # Bounds need the model in the original's shapes, which the manifest's groups give.
    assert "not available" not in {v for name, v in verdicts.items() if name.startswith(("R1", "R2", "R4"))}


def changed(to: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    shutil.copytree(OLD / "pruned", to)
    manifest = json.loads((to / "modhifi.json").read_text())
    change(manifest)
    (to / "modhifi.json").write_text(json.dumps(manifest))
    return to


def test_what_later_versions_added_is_not_needed(tmp_path: Path) -> None:
    def forget(manifest: dict[str, Any]) -> None:
        for key in set(manifest) - {"schema_version", "base", "model", "weights"}:
            del manifest[key]
        del manifest["model"]["stock"]

    older = changed(tmp_path / "older", forget)
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(modhifi.load(older)(x), modhifi.load(OLD / "pruned")(x))


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
    tmp_path: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    with pytest.raises(ModhifiError, match=message) as caught:
        modhifi.load(changed(tmp_path / "other", change))
    assert "\n" not in str(caught.value)
