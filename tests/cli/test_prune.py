"""`modhifi prune`, `check`, `score` through the runner, on a real (tiny) model, and with bad input."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import modhifi
from modhifi.cli.main import app
from modhifi.runs.recipes.files import read_yaml

runner = CliRunner()


def run(*arguments: object) -> tuple[int, str, str]:
    result = runner.invoke(app, [str(a) for a in arguments])
    return result.exit_code, result.stdout, result.stderr


def common(model_dir: Path, image_dir: Path) -> list[object]:
    sizes = ["--samples", 32, "--evaluation-samples", 16, "--walked", 0]
    return ["prune", model_dir, "--data", f"images:{image_dir}", *sizes, "--quiet"]


def test_prune_writes_a_model_that_loads(model_dir: Path, image_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "small"
    code, stdout, stderr = run(
        *common(model_dir, image_dir), "--flops", "0.5x", "--out", out, "--json", "--export", "pt2"
    )
    assert code == 0, stderr
    report = json.loads(stdout)
    assert abs(report["size"]["flops"][1] / report["size"]["flops"][0] / 0.5 - 1) <= 0.02
    assert report["errors"]["n"] == 16 and 0 <= report["errors"]["agreement"] <= 1
    names = {p.name for p in out.iterdir()}
    assert names >= {
        "model.safetensors",
        "modhifi.json",
        "recipe.yaml",
        "README.md",
        "report.json",
        "report.html",
        "model.pt2",
    }
    assert read_yaml(out / "recipe.yaml")["export"] == ["pt2"]
    model = modhifi.load(out)
    assert type(model).__module__.startswith("timm.") and not model.training
    assert sum(p.numel() for p in model.parameters()) == report["size"]["parameters"][1]


@pytest.mark.slow
def test_the_recipe_of_an_artefact_repeats_it(model_dir: Path, image_dir: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    assert run(*common(model_dir, image_dir), "--ratio", "0.4", "--out", first)[0] == 0
    assert run("prune", "--recipe", first / "recipe.yaml", "--out", second, "--quiet")[0] == 0
    ours, theirs = load_file(first / "model.safetensors"), load_file(second / "model.safetensors")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


@pytest.mark.slow
def test_a_pruned_artefact_is_pruned_again(model_dir: Path, image_dir: Path, tmp_path: Path) -> None:
    assert run(*common(model_dir, image_dir), "--params", "0.7x", "--out", tmp_path / "one")[0] == 0
    code, _, stderr = run(*common(tmp_path / "one", image_dir), "--params", "0.7x", "--out", tmp_path / "two")
    assert code == 0, stderr
    sizes = [sum(p.numel() for p in modhifi.load(tmp_path / name).parameters()) for name in ("one", "two")]
    assert sizes[1] / sizes[0] == pytest.approx(0.7, rel=0.02)


def test_dry_run_writes_nothing_and_its_plan_can_be_replayed(model_dir: Path, image_dir: Path, tmp_path: Path) -> None:
    code, stdout, _ = run(*common(model_dir, image_dir), "--ratio", "0.5", "--dry-run", "--json")
    assert code == 0 and not list(tmp_path.iterdir())
    (tmp_path / "plan.json").write_text(stdout)
    plan = json.loads(stdout)["plan"]["kept"]
    code, stdout, stderr = run(
        *common(model_dir, image_dir), "--plan", tmp_path / "plan.json", "--out", tmp_path / "out", "--json"
    )
    assert code == 0, stderr
    assert json.loads(stdout)["plan"]["kept"] == plan


@pytest.mark.slow
def test_synthetic_data_needs_nothing(model_dir: Path, tmp_path: Path) -> None:
    code, stdout, stderr = run(
        "prune",
        model_dir,
        "--ratio",
        "0.3",
        "--samples",
        32,
        "--evaluation-samples",
        16,
        "--out",
        tmp_path / "out",
        "--json",
    )
    assert code == 0, stderr
    assert "synthetic" in json.loads(stdout)["data"]["calibration"]


def test_check_prints_groups_and_refusals(model_dir: Path) -> None:
    code, stdout, _ = run("check", model_dir, "--json")
    found = json.loads(stdout)
    assert code == 0 and found["prunable"]
    assert {g["kind"] for g in found["groups"]} == {"channels", "coupled channels", "blocks"}
    assert [r["name"] for r in found["refused"]] == ["fc"]
    code, stdout, _ = run("check", model_dir, "-v")
    assert "layer1.0.conv1" in stdout and "output" in stdout


def test_check_begins_with_a_summary(model_dir: Path) -> None:
    _, stdout, _ = run("check", model_dir)
    assert "layer1.0.conv1" not in stdout and "layer*.*.conv*" in stdout
    assert stdout.startswith("loaded as resnet18\n100% of its ")
    assert "a prune with default settings takes about 1 minute, " in stdout
    assert "loads afterwards with modhifi.load alone with fewer channels\n" in stdout
    assert "  1 group: these channels are the model's output (fc)\n" in stdout


@pytest.mark.parametrize("ending", ["json", "csv", "safetensors"])
def test_score_writes_a_file(model_dir: Path, image_dir: Path, tmp_path: Path, ending: str) -> None:
    out = tmp_path / f"scores.{ending}"
    code, stdout, stderr = run(
        "score", model_dir, "--data", f"images:{image_dir}", "--samples", 24, "--out", out, "--quiet"
    )
    assert code == 0, stderr
    assert "layer1.0.conv1" in stdout
    if ending == "safetensors":
        assert load_file(out)["layer1.0.conv1.singleton"].shape == (8,)
    else:
        assert "layer1.0.conv1" in out.read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--ratio", "0"], "below 1, not 0"),
        (["--ratio", "1"], "below 1, not 1"),
        (["--ratio", "-1"], "below 1, not -1"),
        (["--ratio", "abc"], "number"),
        (["--flops", "2x"], "below 1x, not '2x'"),
        (["--flops", "0.5x", "--ratio", "0.5"], "exactly one"),
        ([], "exactly one"),
        (["--eta", "0.9", "--ratio", "0.5"], "--eta keeps HiFi sets"),
        (["--eta", "0.9", "--params", "0.5x"], "--eta keeps HiFi sets"),
        (["--eta", "0.9", "--flops", "0.5x"], "--eta keeps HiFi sets"),
        (["--eta", "0.9", "--kv-cache", "0.5x"], "--eta keeps HiFi sets"),
        (["--flops", "0.01x"], "no allocation"),
        (["--ratio", "0.5", "--only", "nothing"], "matches no group"),
        (["--ratio", "0.5", "--device", "cuda"], "not available"),
        (["--ratio", "0.5", "--data", "images:/nowhere"], "/nowhere"),
        (["--ratio", "0.5", "--data", "nonsense"], "unknown data source"),
        (["--ratio", "0.5", "--export", "gif"], "unknown kind of export"),
        (["--ratio", "0.5", "--set", "method.selektor=obs"], "did you mean"),
    ],
)
def test_bad_options_are_one_line_and_exit_2(
    model_dir: Path, image_dir: Path, tmp_path: Path, options: list[str], message: str
) -> None:
    if "cuda" in options and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    code, stdout, stderr = run(*common(model_dir, image_dir), "--out", tmp_path / "out", *options)
    assert code == 2
    assert message in stderr and stderr.strip().count("\n") == 0 and not stdout
    assert not list(tmp_path.iterdir())


def test_bad_models(image_dir: Path, model_dir: Path, tmp_path: Path) -> None:
    for name in ("timm:resnet18x", str(tmp_path / "nothing")):
        code, _, stderr = run("prune", name, "--ratio", "0.5", "--dry-run", "--data", f"images:{image_dir}")
        assert code == 2 and stderr.strip().count("\n") == 0
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text((model_dir / "config.json").read_text())
    state = load_file(model_dir / "model.safetensors")
    state["fc.weight"][0, 0] = float("nan")
    save_file(state, broken / "model.safetensors")
    code, _, stderr = run("prune", broken, "--ratio", "0.5", "--dry-run")
    assert code == 2 and "NaN" in stderr and "fc.weight" in stderr


def test_bad_images(model_dir: Path, image_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mixed, only, held = (tmp_path / name for name in ("mixed", "only", "held"))
    mixed.mkdir(), only.mkdir(), held.mkdir()
    for i, path in enumerate(sorted(image_dir.rglob("*.png"))):
        Image.open(path).save((mixed if i < 40 else held) / f"{i}.png")
    for i in range(3):
        (mixed / f"corrupt{i}.png").write_bytes(b"\x89PNG nothing")
        (only / f"corrupt{i}.png").write_bytes(b"\x89PNG nothing")
    (held / "corrupt.png").write_bytes(b"\x89PNG nothing")
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    arguments = ["--ratio", "0.3", "--samples", 30, "--evaluation-samples", 20, "--walked", 0, "--json"]
    code, stdout, stderr = run("prune", model_dir, "--data", f"images:{mixed}", "--out", tmp_path / "out", *arguments)
    assert code == 0, stderr
    assert any("3 unreadable" in w and "corrupt1.png" in w for w in json.loads(stdout)["warnings"])
    assert "\n::warning title=modhifi::3 unreadable items were skipped: " in f"\n{stderr}"
    few = ["--samples", 8, "--walked", 0, "--quiet"]
    code, _, stderr = run("verify", tmp_path / "out", "--against", model_dir, "--data", f"images:{held}", *few)
    assert code == 0 and stderr.startswith("::warning title=modhifi::1 unreadable item was skipped: corrupt.png")
    code, _, stderr = run("prune", model_dir, "--data", f"images:{only}", "--out", tmp_path / "out2", *arguments)
    assert code == 2 and not (tmp_path / "out2").exists()


def test_flat_colour_and_single_images(model_dir: Path, tmp_path: Path) -> None:
    flat, single = tmp_path / "flat", tmp_path / "single"
    flat.mkdir(), single.mkdir()
    for i in range(12):
        Image.new("RGB", (32, 32), (i, 0, 0)).save(flat / f"{i}.png")
    Image.new("RGB", (32, 32)).save(single / "one.png")
    code, stdout, stderr = run("prune", model_dir, "--ratio", "0.3", "--data", f"images:{flat}", "--dry-run", "--json")
    assert code == 0, stderr
    assert json.loads(stdout)["warnings"]
    code, _, stderr = run("prune", model_dir, "--ratio", "0.3", "--data", f"images:{single}", "--dry-run")
    assert code == 2 and "too few" in stderr


def test_a_full_output_directory_is_refused(model_dir: Path, image_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious.txt").write_text("mine")
    code, _, stderr = run(*common(model_dir, image_dir), "--ratio", "0.3", "--out", tmp_path / "out")
    assert code == 2 and "--force" in stderr
    assert (tmp_path / "out" / "precious.txt").read_text() == "mine"


@pytest.mark.slow
def test_interrupt_leaves_nothing(model_dir: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "modhifi", "prune", str(model_dir), "--ratio", "0.3", "--samples", "200000"]
    process = subprocess.Popen(
        [*command, "--out", str(tmp_path / "out")],
        stderr=subprocess.PIPE,
        text=True,
        # A shell starts background jobs, these tests too, with interrupts ignored, which children inherit.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text():
        time.sleep(0.2)
    time.sleep(1.0)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert "Traceback" not in stderr
    assert not list(tmp_path.iterdir())
