"""Options come from recipes: all of a recipe's keys, its defaults, and what wins where a file says something else."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from typer.testing import CliRunner

import modhifi
from modhifi import api
from modhifi.cli import main
from modhifi.cli.demo import DEMO
from modhifi.cli.options import compose, keys_of
from modhifi.cli.screens import show_briefly
from modhifi.errors import ModhifiError
from modhifi.runs.recipes.files import Strict, read_yaml, set_out
from modhifi.runs.recipes.prune import PruneRecipe
from modhifi.runs.recipes.tasks import TASKS, parse
from modhifi.runs.run_recipe import run_recipe

# Keys without an option, and why.
WITHOUT = {
    ("unlearn", "checks.max_perplexity_ratio"): "a classifier has no perplexity",
}


def run(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(main.app, [str(a) for a in arguments])
    return result.exit_code, result.stdout, result.stderr


def leaves(kind: type[Strict], prefix: str = "") -> dict[str, Any]:
    """Paths and defaults of a recipe, read from its JSON schema and not from the options' own walk."""
    schema = kind.model_json_schema()
    parts = schema.get("$defs", {})

    def walk(properties: dict[str, Any], prefix: str) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, entry in properties.items():
            named = next((e for e in (entry, *entry.get("anyOf", [])) if "$ref" in e), None)
            if named is not None:
                found |= walk(parts[named["$ref"].rpartition("/")[2]]["properties"], f"{prefix}{name}.")
            else:
                found[prefix + name] = entry.get("default")
        return found

    return walk(schema["properties"], prefix)


@pytest.mark.parametrize("task", TASKS)
def test_every_key_is_an_option_with_the_recipes_default_and_a_help(task: str) -> None:
    parameters = {p.name: p for p in main.load(task).params}
    for path, default in leaves(TASKS[task]).items():
        if path == "task" or (task, path) in WITHOUT:  # the verb says it
            assert path.replace(".", "_") not in parameters
            continue
        parameter = parameters[path.replace(".", "_")]
        assert (parameter.default or None) == (default or None), path
        assert parameter.help and not parameter.required, path


def test_the_options_that_scripts_use_keep_their_names() -> None:
    flags = {task: {o for p in main.load(task).params for o in (*p.opts, *p.secondary_opts)} for task in main.VERBS}
    loading = "--model-arg --weights --revision --random-weights --trust-remote-code --gguf-file"
    run_flags = "--seed --batch-size --device --quiet -q --json"
    checks = "--max-flip --max-error --confidence --not-a-sample --walked --summary"
    expected = {
        "prune": f"""{loading} {run_flags} {checks} --max-perplexity-ratio --out --ratio --params --flops --kv-cache
            --latency --phase
            --runtime --latency-batch --threads --data --samples --window --evaluate --evaluation-samples --selector
            --compensate --allocate --layout
            --sequential --eta --floor --round-to --serve --ridge --rows-per-column --only --exclude --coupled
            --inner-only --reestimate-bn --export --recipe --set --plan --dry-run --push-to-hub --cache --no-cache
            --offload --force""",
        "unlearn": f"""{loading} {run_flags} {checks} --forget --data --out --samples --forget-data --evaluate
            --evaluation-samples --method --depth --passes --strength --retain-budget --only --settle --no-settle
            --reference --members --recipe --set --push-to-hub --force""",
        "heal": f"""{loading} {run_flags} {checks} --max-perplexity-ratio --against --out --data --samples --window
            --evaluate --evaluation-samples --steps --minutes --optimizer --learning-rate --temperature --blocks
            --augment --no-augment --batch-statistics --no-batch-statistics --lora --precision --export --recipe --set
            --push-to-hub --force""",
        "verify": f"""{loading} {run_flags} {checks} --max-perplexity-ratio --against --data --samples --window
            --allow-overlap --verbose""",
        "audit": f"{run_flags} --data --forget --original --forget-data --reference --members --samples --out",
        "score": f"{loading} --data --samples --window --out --plot --layer --selector --seed --device --quiet --json",
        "compare": f"""{loading} {run_flags} --selectors --compensate --flops --params --ratio --data --samples --window
            --evaluate --evaluation-samples --layout --allocate --only --exclude --out --cache --no-cache --force""",
        "check": f"{loading} --json --verbose",
        "bench": f"{loading} --runtime --batch --threads --window --device --plot --quiet --json",
        "demo": "--out --device --quiet --json --force",
        "tasks": """--against --task --limit --include --revision --trust-remote-code --gguf-file --batch-size --seed
            --device --json""",
    }
    for task, names in expected.items():
        assert set(names.split()) <= flags[task], task


def test_the_help_of_all_verbs_says_what_each_says() -> None:
    shown = " ".join(run("--help")[1].replace("│", " ").split())
    for verb, text in main.VERBS.items():
        assert (main.load(verb).help or "").partition("\n\n")[0].replace("\n", " ") == text
        assert text.replace("\\", "")[:40] in shown


def test_demo_is_a_recipe() -> None:
    assert parse(DEMO) == PruneRecipe.model_validate(DEMO)
    assert {p.name: p.default for p in main.load("demo").params if p.name in ("out", "device")} == {
        "out": "modhifi-demo",
        "device": "auto",
    }


@pytest.fixture
def recipe(model_dir: Path, image_dir: Path, tmp_path: Path) -> Path:
    content = {
        "model": {"name": str(model_dir)},
        "data": {"source": f"images:{image_dir}", "samples": 16, "evaluation_samples": 8},
        "budget": {"ratio": 0.1},
        "method": {"selector": "obs", "round_to": 2},
        "checks": {"walked": 0},
    }
    file = tmp_path / "r.yaml"
    file.write_text(yaml.safe_dump(content))
    return file


@pytest.mark.slow
def test_options_beside_a_recipe_change_it_and_the_written_recipe_repeats_the_run(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    options = ["--flops", "0.6x", "--selector", "random", "--summary", out / "s.md", "--out", out]
    code, stdout, stderr = run("prune", "--recipe", recipe, *options, "--set", "seed=3", "--json", "--quiet")
    assert code == 0, stderr
    written = read_yaml(out / "recipe.yaml")
    assert written["budget"] == {
        "ratio": None,
        "params": None,
        "flops": "0.6x",
        "kv_cache": None,
        "latency": None,
        "experts": None,
        "memory": None,
    }
    assert written["method"]["selector"] == "random" and written["method"]["round_to"] == 2
    assert (written["seed"], written["summary"]) == (3, str(out / "s.md"))
    assert (out / "s.md").is_file()
    # from another directory, to another one
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    code, again, stderr = run("recipe", "run", out, "--out", "again", "--json", "--quiet")
    assert code == 0, stderr
    assert json.loads(again)["plan"] == json.loads(stdout)["plan"]
    assert Path("again/s.md").is_file()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], {"budget": {"ratio": 0.1}}),
        (["--ratio", "0.2", "--set", "budget.ratio=0.3"], {"budget": {"ratio": 0.3}}),
        (["--params", "0.7x"], {"budget": {"params": "0.7x"}}),
        (["--eta", "0.9"], {"method": {"eta": 0.9}}),
        (["--inner-only", "--only", "a", "--only", "b"], {"method": {"coupled": False, "only": ["a", "b"]}}),
        (["demo:resnet", "--random-weights"], {"model": {"name": "demo:resnet", "pretrained": False}}),
        (["--export", "pt2", "--offload"], {"export": ["pt2"], "offload": True}),
        (["--model-arg", "n=3", "--model-arg", "x=[1]"], {"model": {"args": {"n": 3, "x": [1]}}}),
    ],
)
def test_what_wins(options: list[str], expected: dict[str, Any], recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[PruneRecipe] = []

    def stop(recipe: PruneRecipe, circumstances: object) -> None:
        seen.append(recipe)
        raise typer.Exit()

    monkeypatch.setattr("modhifi.runs.run_recipe.run_recipe", stop)
    code, _, stderr = run("prune", "--recipe", recipe, "--dry-run", *options)
    assert code == 0, stderr
    content = seen[0].model_dump(exclude_none=True)
    for part, values in expected.items():
        assert content[part] == values or {key: content[part].get(key) for key in values} == values
    if "--params" in options or "--eta" in options:
        assert "ratio" not in content["budget"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["prune", "--ratio", "0.5", "--dry-run"], "error: MODEL is missing"),
        (["unlearn", "demo:resnet", "--forget", "1"], "error: --data is missing"),
        (["verify", "--data", "synthetic"], "error: DIR is missing"),
        (["prune", "demo:resnet", "--samples", "0"], "error: --samples: input should be greater than or equal to 1"),
        (["prune", "demo:resnet", "--max-flip", "x"], "error: --max-flip: input should be a valid number"),
        (["prune", "--recipe", "ci/sweep", "--dry-run"], "unknown key"),
        (["prune", "demo:resnet", "--model-arg", "n"], "--model-arg takes KEY=VALUE"),
        (["prune", "demo:resnet", "--plan", "nowhere.json"], "nowhere.json holds no plan"),
        (["audit", "x", "--data", "y", "--out", "none/a.html"], "there is no directory none"),
    ],
)
def test_what_is_missing_or_wrong_is_one_line_that_names_the_option(arguments: list[str], message: str) -> None:
    code, _, stderr = run(*arguments)
    assert code == 2 and message in stderr and stderr.strip().count("\n") == 0


@pytest.mark.parametrize("steps", [None, "verify"])
def test_a_quiet_outcome_names_its_step(steps: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    outcome = {"text": "fine", "tone": "good", "advice": []}
    show_briefly({"task": "verify", "outcome": outcome, "verdicts": []}, Path("here"), steps)
    assert capsys.readouterr().out.startswith("verify:\n" if steps else "fine")


@pytest.mark.slow
def test_the_installed_command_takes_options_beside_a_recipe(recipe: Path) -> None:
    command = [sys.executable, "-m", "modhifi", "prune", "--recipe", str(recipe), "--ratio", "0.5", "--dry-run"]
    done = subprocess.run([*command, "--json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["settings"]["budget"]["ratio"] == 0.5


def test_a_summary_follows_its_directory() -> None:
    content = {"out": "a", "summary": "a/s.md"}
    set_out(content, "b")
    assert content == {"out": "b", "summary": "b/s.md"}
    set_out(content, "c")
    content["summary"] = "s.md"
    set_out(content, "d")
    assert content["summary"] == "s.md"


def test_every_description_stands_in_the_schema() -> None:
    for kind in TASKS.values():
        assert all(key.help and key.help[-1] in ".;" for key in keys_of(kind)), kind


def test_python_and_the_command_run_one_function() -> None:
    assert api.run_recipe is run_recipe  # which `test_what_wins` sees the command call
    with pytest.raises(ModhifiError, match="against=MODEL"):
        modhifi.verify(modhifi.load_model("demo:resnet").model, "synthetic")
    with pytest.raises(ModhifiError, match="original=MODEL"):
        modhifi.audit(modhifi.load_model("demo:resnet").model, "synthetic")


@pytest.mark.parametrize("verb", ["prune", "unlearn", "compare", "score", "bench", "audit", "verify", "check"])
def test_help_at_80_columns_says_what_a_value_is_and_breaks_no_choice(verb: str) -> None:
    shown = CliRunner().invoke(main.app, [verb, "--help"], env={"COLUMNS": "80"}).output
    assert max(map(len, shown.splitlines())) <= 80
    values = [
        line.split("<")[1].partition(">")[0] for line in shown.splitlines() if line.startswith("│ --") and "<" in line
    ]
    assert {"str", "list[str]"}.isdisjoint(values)
    assert not any("|" in value for value in values)


@pytest.mark.parametrize("data", ["demo:calibration", ["demo:calibration@0.5", "synthetic@0.5"]])
def test_amounts_are_set_beside_data_that_a_recipe_names_alone(data: Any, tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(yaml.safe_dump({"model": {"name": "demo:resnet"}, "data": data, "budget": {"flops": "0.5x"}}))
    given = [(key, 32) for key in keys_of(PruneRecipe) if key.path == "data.samples"]
    recipe = compose(PruneRecipe, keys_of(PruneRecipe), given, {}, str(file), ["data.evaluation_samples=8"])
    assert (recipe.data.source, recipe.data.samples, recipe.data.evaluation_samples) == (data, 32, 8)
    with pytest.raises(ModhifiError, match=r"^--samples: 'data' is a value"):
        file.write_text(yaml.safe_dump({"model": {"name": "demo:resnet"}, "data": 3, "budget": {"flops": "0.5x"}}))
        compose(PruneRecipe, keys_of(PruneRecipe), given, {}, str(file), [])
