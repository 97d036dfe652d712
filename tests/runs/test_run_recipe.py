"""`modhifi recipe`: every recipe of ci/, run offline from the checkout and from the built wheel."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from typer.testing import CliRunner

from modhifi.cli.main import app
from modhifi.runs.recipes.bundled import shipped

runner = CliRunner()


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run(*arguments: object) -> tuple[int, str, str]:
    result = runner.invoke(app, [str(a) for a in arguments])
    return result.exit_code, result.stdout, result.stderr


def hashes(artefact: Path) -> dict[str, str]:
    return json.loads((artefact / "modhifi.json").read_text())["weights"]["files"]


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("recipes")


@pytest.fixture(scope="module")
def pruned(outputs: Path) -> Path:
    code, stdout, stderr = run(
        "recipe", "run", "ci/prune-verify", "--out", outputs / "pruned", "--summary", outputs / "s.xml", "--json"
    )
    assert code == 0, stderr
    assert [r["step"] for r in json.loads(stdout)] == ["prune", "verify"]
    return outputs / "pruned"


def test_prune_then_verify(pruned: Path) -> None:
    report = json.loads((pruned / "verify" / "report.json").read_text())
    assert report["task"] == "verify" and report["schema_version"] == 1
    assert any(v["verdict"] == "PASS-STATISTICAL" for v in report["verdicts"])
    assert (pruned / "verify" / "report.html").is_file() and (pruned / "recipe.yaml").is_file()
    suites = ElementTree.parse(pruned.parent / "s.xml").getroot()
    assert [s.get("name") for s in suites] == ["prune", "verify"]
    assert all(float(str(s.get("time"))) > 0 for s in suites)
    assert not suites.findall(".//failure") and suites.findall(".//testcase")


def test_the_recipe_of_an_artefact_repeats_it(pruned: Path, outputs: Path) -> None:
    code, _, stderr = run("recipe", "run", pruned / "prune", "--out", outputs / "again", "--quiet")
    assert code == 0, stderr
    first, second = (json.loads((p / "modhifi.json").read_text()) for p in (pruned / "prune", outputs / "again"))
    assert first["groups"] == second["groups"] and first["weights"]["files"] == second["weights"]["files"]


def test_a_check_that_fails_is_exit_1_with_everything_written(pruned: Path, outputs: Path) -> None:
    out, summary = outputs / "strict", outputs / "strict.md"
    strict = ["--set", "checks.max_flip=0.0001", "--set", "data.samples=60", "--set", "checks.walked=0"]
    code, _, stderr = run("recipe", "run", pruned / "verify", "--out", out, *strict, "--summary", summary, "--quiet")
    assert code == 1 and "max flip 0.0001" in stderr
    assert (out / "report.json").is_file()
    assert "❌" in summary.read_text() and "max flip 0.0001" in summary.read_text()


@pytest.mark.slow
def test_a_sweep_keeps_the_first_value_that_passes(outputs: Path) -> None:
    out = outputs / "sweep"
    few = ["--set", "steps.prune.data.samples=32", "--set", "steps.prune.data.evaluation_samples=100"]
    code, stdout, stderr = run(
        "recipe", "run", "ci/sweep", "--out", out, *few, "--json", "--summary", outputs / "sweep.md"
    )
    assert code == 0, stderr
    steps = [r["step"] for r in json.loads(stdout)]
    kept = json.loads((out / "prune" / "report.json").read_text())["budget"]["flops"]
    assert steps == [f"prune (prune.budget.flops={kept})"] and kept != "0.3x"


@pytest.mark.slow
def test_unlearn_then_audit(outputs: Path) -> None:
    out = outputs / "forgot"
    code, stdout, stderr = run("recipe", "run", "ci/unlearn-audit", "--out", out, "--json")
    assert code == 0, stderr
    _, audit = json.loads(stdout)
    assert {v["verdict"] for v in audit["verdicts"][1:]} == {"PASS-ON-SAMPLES"} and len(audit["verdicts"]) == 3
    assert audit["audit"]["rows"]["edited"]["forget"] < 0.1 < audit["audit"]["rows"]["original"]["forget"]


@pytest.mark.slow
def test_the_recipe_of_an_unlearned_artefact_repeats_it(outputs: Path) -> None:
    for name in ("one", "two"):
        recipe = "ci/unlearn-audit" if name == "one" else outputs / "one" / "forget"
        code, _, stderr = run("recipe", "run", recipe, "--out", outputs / name, "--quiet")
        assert code == 0, stderr
    assert hashes(outputs / "one" / "forget") == hashes(outputs / "two")


def test_list_show_copy_validate(tmp_path: Path) -> None:
    code, stdout, _ = run("recipe", "ls", "--json")
    assert code == 0 and set(json.loads(stdout)) == set(shipped())
    assert "ci/sweep" in run("recipe", "ls")[1]
    assert run("recipe", "show", "ci/sweep")[1] == shipped()["ci/sweep"].read_text()
    assert run("recipe", "copy", "prune/timm-vit", tmp_path)[0] == 0
    copied = tmp_path / "timm-vit.yaml"
    assert run("recipe", "copy", "prune/timm-vit", tmp_path)[0] == 2
    code, stdout, _ = run("recipe", "validate", copied, "--set", "budget.params=0.6x")
    assert code == 0 and "params: 0.6x" in stdout and "ridge" in stdout
    copied.write_text(copied.read_text().replace("samples", "sample", 1))
    code, _, stderr = run("recipe", "validate", copied)
    assert code == 2 and f"{copied}:" in stderr and "did you mean 'samples'" in stderr
    code, stdout, _ = run("recipe", "schema")
    assert code == 0 and json.loads(stdout)["anyOf"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ci/sweep"], "give --out DIR"),
        (["ci/swep", "--out", "x"], "is ci/sweep meant"),
        (["ci/sweep", "--out", "x", "--summary", "s.txt"], ".md (Markdown) or .xml (JUnit)"),
        (["ci/sweep", "--out", "x", "--summary", "none/s.md"], "there is no directory none"),
        (["ci/sweep", "--out", "x", "--summary", "/proc/s.md"], "/proc/s.md cannot be written"),
        (["ci/sweep", "--out", "x", "--set", "steps.prune.out=y"], "remove its out"),
    ],
)
def test_bad_arguments(arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, stderr = run("recipe", "run", *arguments)
    assert code == 2 and message in stderr and not list(tmp_path.iterdir())
    shutil.rmtree(tmp_path)


def test_several_steps_run_in_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, _, stderr = run("recipe", "run", "ci/prune-verify", "--out", tmp_path / "out")
    assert code == 2 and "runs in one process" in stderr and not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_home_directory_is_the_same_for_every_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    monkeypatch.chdir(tmp_path)
    small = ["--set", "steps.prune.data.samples=32", "--set", "steps.prune.data.evaluation_samples=32"]
    code, _, stderr = run("recipe", "run", "ci/prune-verify", "--set", "out=~/runs", *small, "--quiet")
    assert code in (0, 1), stderr
    assert (tmp_path / "home" / "runs" / "verify" / "report.json").is_file() and not (tmp_path / "~").exists()


@pytest.mark.slow
def test_an_artefact_of_relative_paths_is_repeated_and_verified_from_elsewhere(
    model_dir: Path, image_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, elsewhere = tmp_path / "here", tmp_path / "elsewhere"
    for directory in (here, elsewhere):
        directory.mkdir()
    (here / "net").symlink_to(model_dir)
    (here / "pictures").symlink_to(image_dir)
    monkeypatch.chdir(here)
    few = ["--samples", 16, "--evaluation-samples", 8, "--walked", 0, "--quiet"]
    code, _, stderr = run("prune", "net", "--data", "images:pictures", "--ratio", 0.2, *few, "--out", "small")
    assert code == 0, stderr
    monkeypatch.chdir(elsewhere)
    code, _, stderr = run("recipe", "run", here / "small", "--out", "again", "--quiet")
    assert code == 0, stderr
    assert hashes(elsewhere / "again") == hashes(here / "small")
    held = ["--data", "synthetic", "--samples", 8, "--walked", 0, "--quiet"]
    code, _, stderr = run("verify", here / "small", *held)
    assert code == 0, stderr
