"""Options, recipes and JSON files that nobody should write: one line each, exit code 2."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from modhifi.cli.main import app
from modhifi.errors import ModhifiError
from modhifi.models.load import load_model
from modhifi.models.manifest import read_manifest

DEEP = "[" * 100_000
NESTED = "[" * 300 + "]" * 300
BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{y}: &{y} [{', '.join(['*' + x] * 9)}]\n" for x, y in zip("abcdefgh", "bcdefghi", strict=True)
)
MERGES = "a: &a {x: 1, y: 2}\n" + "".join(
    f"{y}: &{y} {{<<: [{', '.join(['*' + x] * 9)}]}}\n" for x, y in zip("abcdefgh", "bcdefghi", strict=True)
)


def refused(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("modhifi: error:") and result.stderr.count("\n") == 1, result.stderr
    return result.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model-arg", "a={"], "--model-arg a={ is not YAML"),
        (["--model-arg", f"a={DEEP}"], "nested too deeply"),
        (["--model-arg", "a=!!int x"], "is not YAML"),
        (["--model-arg", "a=!!timestamp x"], "is not YAML"),
        (["--set", "plan={}"], "plan: dictionary should have at least 1 item"),
        (["--set", "plan={"], "--set plan={ is not YAML"),
        (["--set", "method=[&a [*a]]"], "is not YAML"),
        (["--set", "task=[]"], "--set"),
        (["--set", "seed=2001-99-99"], "is not YAML"),
        (["--ridge", "inf"], "--ridge: input should be a finite number"),
        (["--ridge", "nan"], "--ridge: input should be a finite number"),
        (["--max-error", "inf"], "--max-error: input should be a finite number"),
        (["--ratio", "nan"], "--ratio: input should be a finite number"),
        (["--flops", "1.5x"], "--flops: the share of the model kept, above 0x and below 1x, not '1.5x'"),
        (["--params", "half"], "--params: the share of the model kept"),
        (["--kv-cache", "0x"], "--kv-cache: the share of the model kept"),
        (["--out", "~nouser/x"], "no home directory for ~nouser/x"),
        (["--data", "images:~nouser/x"], "no home directory for ~nouser/x"),
        (["--recipe", "~nouser/x"], "no home directory for ~nouser/x"),
        (["--plan", "~nouser/x"], "no home directory for ~nouser/x"),
    ],
)
def test_options(options: list[str], message: str, tmp_path: Path, model_dir: Path) -> None:
    out = [] if "--out" in options else ["--out", tmp_path / "out"]
    budget = [] if {"--ratio", "--flops", "--params", "--kv-cache", "--plan"} & set(options) else ["--ratio", "0.5"]
    budget = [] if any("plan" in option for option in options) else budget
    if "task=[]" in options:
        message = "task"
    assert message in refused("prune", model_dir, *budget, *options, *out)
    assert not (tmp_path / "out").exists()


def test_models_of_nobody() -> None:
    assert "no home directory" in refused("check", "~nouser/x")
    assert "no home directory" in refused("verify", "~nouser/x", "--data", "synthetic")


@pytest.mark.parametrize(
    "text",
    [BOMB, MERGES, "a: &a [*a]", "model: " + DEEP, "model: " + NESTED, "? [1]\n: 2", "a: !!bool x", "\x00", "task: []"],
    ids=["bomb", "merges", "itself", "deep", "nested", "key", "tag", "nul", "task"],
)
def test_recipes(text: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    assert str(path) in refused("recipe", "validate", path)


def test_aliases_are_fine(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "data: {source: synthetic}\nmodel: {name: demo:resnet}\nbudget: {ratio: 0.5}\n"
        "method: {only: &names [a, b], exclude: *names}\n"
    )
    result = CliRunner().invoke(app, ["recipe", "validate", str(path)])
    assert result.exit_code == 0, result.output


def test_a_bad_budget_in_a_recipe_names_its_line(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("model: {name: demo:resnet}\nbudget:\n  flops: 1.5x\n")
    assert f"{path}:3: budget.flops: the share of the model kept" in refused("recipe", "validate", path)


BUDGETS: list[tuple[list[str], str]] = [
    (["--flops", "1.5x"], "--flops: the share of the model kept, above 0x and below 1x, not '1.5x'"),
    (["--kv-cache=0x"], "--kv-cache: the share of the model kept"),
    (["--ratio", "2"], "--ratio: the share of components removed, above 0 and below 1, not 2"),
    (["--set", "budget.params=3x"], "--params: the share of the model kept"),
    (["--recipe", "one.yaml"], "one.yaml:3: budget.flops: the share of the model kept"),
    (["--recipe", "one.yaml", "--flops", "7x"], "--flops: the share of the model kept"),
    (["--recipe", "good.yaml", "--set", "budget.flops=2x"], "budget.flops: the share of the model kept"),
    (["recipe", "run", "one.yaml"], "one.yaml:3: budget.flops: the share of the model kept"),
    (["recipe", "validate", "steps.yaml"], "budget.ratio: the share of components removed"),
]


def test_a_budget_that_no_model_can_meet_is_refused_before_torch_is_imported(tmp_path: Path) -> None:
    (tmp_path / "one.yaml").write_text("model: {name: demo:resnet}\nbudget:\n  flops: 1.5x\n")
    (tmp_path / "good.yaml").write_text("model: {name: demo:resnet}\nbudget:\n  flops: 0.5x\n")
    (tmp_path / "steps.yaml").write_text("out: x\nsteps: {a: {task: prune, budget: {ratio: 2}}}\n")
    prune = ["prune", "demo:resnet", "--out", "x"]
    commands = [arguments if arguments[0] == "recipe" else [*prune, *arguments] for arguments, _ in BUDGETS]
    code = (
        "import json, sys; from typer.testing import CliRunner; from modhifi.cli.main import app\n"
        "done = [CliRunner().invoke(app, c) for c in json.loads(sys.argv[1])]\n"
        "print(json.dumps(['torch' in sys.modules, [[d.exit_code, d.stderr] for d in done]]))"
    )
    command = [sys.executable, "-c", code, json.dumps(commands)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    torch_imported, results = json.loads(done.stdout)
    assert not torch_imported
    for (_, message), (exit_code, errors) in zip(BUDGETS, results, strict=True):
        assert exit_code == 2 and message in errors and errors.count("\n") == 1, errors


BROKEN = ["{", DEEP, NESTED, '{"a": ' * 300 + "1" + "}" * 300, "[]", "3", '"x"', "", "\ud800", "NaN", '{"x": 1e999']
BROKEN += ["9" * 9999]


def write(path: Path, text: str) -> None:
    path.write_bytes(text.encode("utf-8", "surrogatepass"))


@pytest.mark.parametrize("text", [*BROKEN, '{"text_config": 5}', '{"quantization_config": 5}', '{"model_type": 3}'])
def test_configurations(text: str, model_dir: Path, tmp_path: Path) -> None:
    broken = tmp_path / "model"
    shutil.copytree(model_dir, broken)
    write(broken / "config.json", text)
    refused("check", broken)


@pytest.fixture(scope="module")
def artefact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("artefacts") / "small"
    command = ["prune", "demo:resnet", "--data", "demo:calibration", "--samples", 16, "--evaluation-samples", 4]
    command += ["--ratio", 0.2, "--only", "conv1*", "--walked", 0, "--no-cache", "--quiet", "--out", out]
    result = CliRunner().invoke(app, [str(word) for word in command])
    assert result.exit_code == 0, result.output
    return out


MAPS = ['{"weight_map": 5}', '{"weight_map": {"a": 5}}', '{"weight_map": {"a": null}}', '{"weight_map": {"a": ["b"]}}']


@pytest.mark.parametrize("name", ["modhifi.json", "model.safetensors.index.json", "report.json"])
@pytest.mark.parametrize("text", [*BROKEN, *MAPS, '{"weight_map": {"a": "nothing"}}'])
def test_files_of_an_artefact(name: str, text: str, artefact: Path, tmp_path: Path) -> None:
    broken = tmp_path / "small"
    shutil.copytree(artefact, broken)
    write(broken / name, text)
    if name == "report.json":
        refused("diff", broken, artefact)
        return
    with pytest.raises(ModhifiError) as caught:
        load_model(broken)
    assert "\n" not in str(caught.value)
    refused("check", broken)


def test_a_manifest_is_read_whole(artefact: Path) -> None:
    assert read_manifest(artefact).task == "prune"
