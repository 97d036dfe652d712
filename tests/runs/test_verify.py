"""`modhifi verify` on an artefact: what it refuses and says, its exit codes; cut models back in their old shapes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import timm
import tiny_transformers
import torch
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf
from tiny import PATTERNS, pattern
from typer.testing import CliRunner

import modhifi
from modhifi.cli.main import app
from modhifi.errors import ModhifiError
from modhifi.models.load import load_model
from modhifi.models.manifest import Manifest
from modhifi.pruning.stages import find_structure
from modhifi.runs.inputs import original_of
from modhifi.structure.expand import expand
from modhifi.structure.plan import Plan
from modhifi.structure.surgery import mask_readers, shrink

runner = CliRunner()


def run(*arguments: object) -> tuple[int, str, str]:
    result = runner.invoke(app, [str(a) for a in arguments])
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture(scope="module")
def artefact(model_dir: Path, image_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("artefacts") / "small"
    code, _, stderr = run(
        "prune",
        model_dir,
        "--data",
        f"images:{image_dir}",
        "--samples",
        16,
        "--evaluation-samples",
        8,
        "--ratio",
        0.2,
        "--out",
        out,
        "--quiet",
    )
    assert code == 0, stderr
    return out


def verify(artefact: Path, against: object, *more: object, walked: int = 0) -> tuple[int, str, str]:
    return run("verify", artefact, "--against", against, "--samples", 24, "--walked", walked, "--quiet", *more)


def test_every_rung_of_an_artefact(artefact: Path, model_dir: Path) -> None:
    code, stdout, stderr = verify(artefact, model_dir, "--data", "synthetic", "--json", walked=2)
    assert code == 0, stderr
    found = json.loads(stdout)
    verdicts = {v["name"]: v["verdict"] for v in found["verdicts"]}
    assert verdicts["self-test"] == "HOLDS"
    assert {"R1 every input", "R1 theorem form", "R2 certified-local", "R4 measured"} <= verdicts.keys()
    # 24 units are too few for an upper bound of a quantile, and say so.
    assert [n for n, v in verdicts.items() if v == "not available"] == ["R3 95% quantile of the change"]
    assert found["bounds"]["layers"] and found["bounds"]["telescoping_gap"] < 1e-9
    assert any("synthetic" in w for w in found["bounds"]["warnings"])


def test_the_ladder_is_shown_on_request(artefact: Path, model_dir: Path) -> None:
    code, plain, stderr = verify(artefact, model_dir, "--data", "synthetic", walked=1)
    assert code == 0, stderr
    assert "change their top-1" in plain and "R2" not in plain
    _, verbose, _ = verify(artefact, model_dir, "--data", "synthetic", "-v", walked=1)
    assert plain.strip() in verbose and "R2 certified-local" in verbose and "amplification" in verbose


@pytest.mark.parametrize(
    ("options", "code", "word"),
    [
        (["--max-flip", 1.0], 0, "PASS-STATISTICAL"),
        (["--max-flip", 0.0001], 1, ""),
        (["--max-error", 1e-6], 1, "FAIL"),
        (["--max-flip", 1.0, "--not-a-sample"], 0, "PASS-ON-SAMPLES"),
    ],
)
def test_exit_codes(artefact: Path, model_dir: Path, options: list[object], code: int, word: str) -> None:
    found, stdout, stderr = verify(artefact, model_dir, "--data", "synthetic", *options)
    assert found == code, stderr
    assert word in stdout
    assert (len(stderr.strip().splitlines()) == 1) == (code == 1)


def test_without_whole_blocks_a_network_is_verified_and_healed(tmp_path: Path) -> None:
    few: dict[str, Any] = {"samples": 16, "evaluation_samples": 16, "checks": {"walked": 0}}
    small = tmp_path / "small"
    modhifi.prune("demo:resnet", "demo:calibration", flops="0.7x", method={"only": ["blocks"]}, out=small, **few)
    assert modhifi.verify(small, "demo:test", samples=16, walked=0).statistical is not None
    healed = modhifi.heal(small, "demo:test", steps=1, out=tmp_path / "healed", **few).report["healing"]
    groups = json.loads((small / "modhifi.json").read_text())["groups"]
    gone = {f"{group['name']}.1" for group in groups if not group["kept"]}
    assert gone and healed["matched blocks"] and not gone & set(healed["matched blocks"])


def test_pruning_ends_with_the_bounds(model_dir: Path, image_dir: Path, tmp_path: Path) -> None:
    """A tolerance that is not met: exit code 1, and the artefact is there, marked."""
    out = tmp_path / "out"
    code, stdout, stderr = run(
        "prune",
        model_dir,
        "--data",
        f"images:{image_dir}",
        "--samples",
        24,
        "--evaluation-samples",
        10,
        "--ratio",
        0.2,
        "--max-error",
        1e-6,
        "--max-flip",
        0.01,
        "--walked",
        2,
        "--out",
        out,
        "--quiet",
        "--json",
    )
    assert code == 1 and "error: max flip 0.01: INCONCLUSIVE" in stderr and "368 units" in stderr, stderr
    report = json.loads(stdout)
    verdicts = {v["name"]: v["verdict"] for v in report["verdicts"]}
    assert verdicts["self-test"] == "HOLDS" and verdicts["max error 1e-06"] == "FAIL"
    assert json.loads((out / "modhifi.json").read_text())["verdicts"] == report["verdicts"]
    assert json.loads((out / "report.json").read_text())["settings"]["checks"]["max_flip"] == 0.01
    cut = [g for g in report["groups"] if g["kept"] < g["n"]]
    assert cut and all(g["amplification"] > 0 for g in cut)
    # Every modified layer here is the reader of a group, some of two.
    assert sum(g["share"] for g in cut) >= 1 - 1e-9
    assert "Which layers spend the error" in (out / "report.html").read_text()


def test_calibration_data_is_refused(artefact: Path, model_dir: Path, image_dir: Path) -> None:
    data = ["--data", f"images:{image_dir}", "--samples", 48]
    code, _, stderr = verify(artefact, model_dir, *data)
    assert code == 2 and "calibrated this model" in stderr and "16 of 48" in stderr
    assert verify(artefact, model_dir, *data, "--allow-overlap")[0] == 0


def test_edited_weights_are_found(artefact: Path, model_dir: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(artefact, copy)
    state = load_file(copy / "model.safetensors")
    state["fc.bias"] = state["fc.bias"] + 1
    save_file(state, copy / "model.safetensors")
    code, _, stderr = verify(copy, model_dir, "--data", "synthetic")
    assert code == 2 and "hash" in stderr


def test_another_original_is_refused(artefact: Path, model_dir: Path, tmp_path: Path) -> None:
    code, _, stderr = verify(artefact, "timm:resnet34", "--random-weights", "--data", "synthetic")
    assert code == 2 and "another architecture" in stderr
    torch.manual_seed(1)
    other = timm.create_model("resnet18", num_classes=4, stem_type="deep", stem_width=4, channels=(8, 16, 16, 16))
    save_for_hf(other, str(tmp_path / "other"), model_args={}, safe_serialization=True)
    config = (model_dir / "config.json").read_text()
    (tmp_path / "other" / "config.json").write_text(config)
    code, _, stderr = verify(artefact, tmp_path / "other", "--data", "synthetic")
    assert code == 2 and "other weights" in stderr
    assert verify(tmp_path, model_dir, "--data", "synthetic")[0] == 2


@pytest.mark.parametrize("name", sorted(PATTERNS))
def test_expanding_undoes_shrinking(name: str) -> None:
    model, example = pattern(name)
    model.eval()
    loaded = load_model(model, example=example)
    structure = find_structure(loaded)
    kept = {}
    for group in structure.prunable:
        mask = torch.ones(group.n, dtype=torch.bool)
        first = group.partition if group.partition is not None else torch.zeros(group.n)
        for label in first.unique():
            mask[int((first == label).nonzero()[0])] = False
        if mask.any():
            kept[group.name] = tuple(mask.nonzero().flatten().tolist())
    plan = Plan(kept)
    masked = mask_readers(model, structure, plan).double()
    small = shrink(mask_readers(model, structure, plan), structure, plan).double()
    big = expand(small, model.double(), structure, plan)
    torch.testing.assert_close(big(example.double()), masked(example.double()))
    if kept:
        torch.testing.assert_close(big(example.double()), small(example.double()))
        with pytest.raises(ModhifiError):
            expand(small, model, structure, Plan({}))


def test_expanding_undoes_shrinking_where_heads_share_a_table_of_positions() -> None:
    model, example, run = tiny_transformers.family("swin_tiny_patch4_window7_224")
    structure = find_structure(load_model(model, example=example))
    heads = [g for g in structure.prunable if g.kind == "heads"]
    plan = Plan({g.name: tuple(range(1, g.n)) for g in heads})
    small = shrink(mask_readers(model, structure, plan), structure, plan)
    assert heads
    with torch.no_grad():
        torch.testing.assert_close(run(expand(small, model, structure, plan)), run(small), rtol=1e-4, atol=1e-4)


def test_an_artefact_pruned_twice_is_verified_against_the_first_model(
    artefact: Path, model_dir: Path, image_dir: Path, tmp_path: Path
) -> None:
    out = tmp_path / "again"
    common = ["--data", f"images:{image_dir}", "--samples", 16, "--evaluation-samples", 8, "--walked", 1, "--quiet"]
    code, _, stderr = run("prune", artefact, *common, "--ratio", 0.2, "--only", "*layer4*", "--out", out)
    assert code == 0, stderr
    code, stdout, stderr = verify(out, model_dir, "--data", "synthetic", "--json")
    assert code == 0, stderr
    verdicts = {v["name"]: v["verdict"] for v in json.loads(stdout)["verdicts"]}
    assert verdicts["R4 measured"] == "not available" and verdicts["R3 share of flips"] != "not available"


@pytest.mark.parametrize("named", ["timm:x", "an artefact"])
def test_the_original_has_its_own_arguments(named: str) -> None:
    manifest = {
        "schema_version": 1,
        "weights": {"files": {}},
        "base": {"source": "timm:x", "args": {"img_size": 64}, "revision": None},
        "recipe": {"model": {"name": named}},
        "model": {"framework": "timm", "info": {"model_args": {"mlp_ratio": 2.5}}, "differences": {}},
    }
    source = original_of(Manifest.model_validate(manifest))
    assert (source.name, source.args) == ("timm:x", {"img_size": 64})
