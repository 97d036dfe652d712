"""Recipe files: strict parsing with errors that help, and the schema for editors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny_text
import torch
import yaml
from torch import nn

from modhifi.errors import ModhifiError
from modhifi.models.load import load_model
from modhifi.pruning.layouts.base import Rounding
from modhifi.runs.defaults import complete, complete_verify, rounding_for
from modhifi.runs.recipes.bundled import find, shipped, summary
from modhifi.runs.recipes.files import apply_overrides, read_yaml, to_yaml, validate
from modhifi.runs.recipes.prune import PruneRecipe
from modhifi.runs.recipes.tasks import StepsRecipe, VerifyRecipe, parse, schema

CONTENT = {"model": {"name": "timm:resnet18"}, "budget": {"flops": "0.5x"}}
STEPS = """\
# a comment
steps:
  small:
    task: prune
    model:
      name: demo:resnet
    budget:
      ratio: 0.5
  check:
    task: verify
    directory: step:small
    data:
      source: demo:test
"""


def test_a_dumped_recipe_reads_back_equal(tmp_path: Path) -> None:
    recipe = PruneRecipe.model_validate(apply_overrides(CONTENT, ["method.only=['layer1*']", "seed=3"]))
    (tmp_path / "recipe.yaml").write_text(to_yaml(recipe.model_dump(mode="json")))
    assert parse(read_yaml(tmp_path / "recipe.yaml")) == recipe
    settings = complete(recipe, load_model(nn.Flatten(), example=torch.zeros(2, 3, 8, 8)), "cpu")[0].settings()
    assert settings.only == ("layer1*",) and settings.seed == 3
    assert (settings.layout, settings.batch_size, settings.rows_per_column) == ("global", 32, 2)
    steps = parse(yaml.safe_load(STEPS))
    assert isinstance(steps, StepsRecipe) and parse(yaml.safe_load(to_yaml(steps.model_dump(mode="json")))) == steps


def test_rounding_follows_the_device_and_the_dtype() -> None:
    single = load_model(nn.Linear(4, 4), example=torch.zeros(2, 4))
    half = load_model(nn.Linear(4, 4).half(), example=torch.zeros(2, 4))
    assert [rounding_for(model, device).to for model in (single, half) for device in ("cpu", "cuda")] == [8, 32, 16, 64]
    assert rounding_for(single, "cpu").less
    assert rounding_for(single, "cpu", "int4") == Rounding(128)
    for given, expected in (("8", 8), (1, 1), ("auto", "auto")):
        assert parse({**CONTENT, "method": {"round_to": given}}).method.round_to == expected  # type: ignore[union-attr]
    with pytest.raises(ModhifiError, match="method.round_to"):
        parse({**CONTENT, "method": {"round_to": 0}})
    with pytest.raises(ModhifiError, match="serve chooses the widths"):
        parse({**CONTENT, "method": {"serve": "int4", "round_to": 8}})


def test_a_verify_recipe_takes_the_amounts_of_the_kind_of_model(tmp_path: Path) -> None:
    recipe = parse({"task": "verify", "directory": "x", "data": {"source": "synthetic"}})
    assert isinstance(recipe, VerifyRecipe)
    image = complete_verify(recipe, load_model(nn.Flatten(), example=torch.zeros(2, 3, 8, 8)), "cpu")
    assert (image.data.samples, image.data.window, image.batch_size) == (1000, None, 32)
    language_model = load_model(tiny_text.save(tmp_path))
    text = complete_verify(recipe, language_model, "cpu")
    assert (text.data.samples, text.data.window, text.batch_size) == (16, 64, 4)
    assert complete_verify(recipe, language_model, "cuda").data.samples == 32
    own = parse({"task": "verify", "directory": "x", "data": {"source": "synthetic", "samples": 7, "window": 8}})
    assert isinstance(own, VerifyRecipe)
    assert complete_verify(own, language_model, "cpu").data == own.data


def test_overrides_leave_the_original_alone() -> None:
    changed = apply_overrides(CONTENT, ["budget.flops=0.7x", "data.samples=12"])
    assert changed["budget"]["flops"] == "0.7x" and changed["data"]["samples"] == 12
    assert CONTENT["budget"]["flops"] == "0.5x" and "data" not in CONTENT


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["metod.selector=obs"], "did you mean 'method'"),
        (["method.selectr=obs"], "unknown key 'method.selectr'; did you mean 'selector'"),
        (["method.flops=0.5x"], "unknown key 'method.flops'"),
        (
            ["method.selector=best"],
            r"method.selector: unknown selector 'best'; choose one of .*obs, random, wanda, cholesky$",
        ),
        (["method.layout=globel"], "method.layout: unknown layout 'globel'; did you mean 'global'"),
        (["data.samples=0"], "data.samples"),
        (["method.floor=1.5"], "method.floor"),
        (["model.name.x=1"], "'name' is a value"),
        (["nonsense"], "a.b=value"),
        (["seed=[1"], "not YAML"),
        (["model={}"], "'model.name' is missing"),
        (["task=prun"], "no task 'prun'"),
    ],
)
def test_bad_content_names_the_key(changes: list[str], message: str) -> None:
    with pytest.raises(ModhifiError, match=message) as caught:
        parse(apply_overrides(CONTENT, changes))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("old", "new", "line", "message"),
    [
        ("ratio: 0.5", "ration: 0.5", 8, "unknown key 'steps.small.budget.ration'; did you mean 'ratio'"),
        ("directory", "dirctory", 11, "did you mean 'directory'"),
        ("task: verify", "task: verfy", 9, "verfy"),
        ("step:small", "step:big", None, "step:big is no step before it"),
        ("  check:", "  Check it:", None, "no plain word"),
        ("    directory: step:small\n", "", 9, "'steps.check.directory' is missing"),
    ],
)
def test_errors_name_the_file_and_the_line(tmp_path: Path, old: str, new: str, line: int | None, message: str) -> None:
    assert old in STEPS
    path = tmp_path / "r.yaml"
    path.write_text(STEPS.replace(old, new))
    with pytest.raises(ModhifiError) as caught:
        parse(read_yaml(path), path)
    text = str(caught.value)
    assert text.startswith(f"{path}:{line}: " if line else f"{path}: ") and message in text and "\n" not in text


@pytest.mark.parametrize(("text", "message"), [("a: [", "not YAML"), ("- 1", "mapping")])
def test_bad_files(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(ModhifiError, match=message):
        read_yaml(tmp_path / "r.yaml")
    with pytest.raises(ModhifiError, match="no recipe at"):
        read_yaml(tmp_path / "missing.yaml")


def test_shipped_recipes_are_valid_and_say_what_for() -> None:
    names = shipped()
    assert {n.partition("/")[0] for n in names} == {"prune", "unlearn", "heal", "ci"}
    for name, path in names.items():
        recipe = parse(read_yaml(path), path)
        assert summary(path).endswith("."), name
        swept = isinstance(recipe, StepsRecipe) and recipe.sweep
        for step in recipe.steps.values() if isinstance(recipe, StepsRecipe) else [recipe]:
            if isinstance(step, PruneRecipe) and not swept:
                step.budget.parse()
    assert find("prune/timm-resnet") == names["prune/timm-resnet"]
    with pytest.raises(ModhifiError, match="is prune/timm-vit meant"):
        find("timm-vit")


def test_the_schema_knows_every_task_and_refuses_unknown_keys() -> None:
    content = json.loads(json.dumps(schema()))
    parts = content["$defs"]
    assert {"PruneRecipe", "UnlearnRecipe", "VerifyRecipe", "AuditRecipe", "StepsRecipe"} <= parts.keys()
    assert all(part.get("additionalProperties") is False for name, part in parts.items() if name.endswith("Recipe"))
    assert "obs" in parts["Method"]["properties"]["selector"]["enum"]


def test_a_sweep_goes_over_one_key() -> None:
    content = yaml.safe_load(STEPS)
    recipe = validate(StepsRecipe, {**content, "sweep": {"steps.small.budget.ratio": [0.5, 0.3]}}, "here")
    assert recipe.sweep == {"steps.small.budget.ratio": [0.5, 0.3]}
    with pytest.raises(ModhifiError, match="one key"):
        validate(StepsRecipe, {**content, "sweep": {"a": [1], "b": [2]}}, "here")


@pytest.mark.parametrize(
    "norm, method, expected",
    [
        (nn.BatchNorm2d, {}, "dense"),
        (nn.BatchNorm2d, {"compensate": "delta"}, None),
        (nn.BatchNorm2d, {"sequential": "none"}, None),
        (nn.BatchNorm2d, {"sequential": None}, None),
        (nn.InstanceNorm2d, {}, None),
        (nn.InstanceNorm2d, {"sequential": "own"}, "own"),
    ],
)
def test_networks_with_batchnorm_are_compensated_sequentially(
    norm: type[nn.Module], method: dict[str, str | None], expected: str | None
) -> None:
    loaded = load_model(nn.Sequential(nn.Conv2d(3, 4, 3), norm(4)), example=torch.zeros(2, 3, 8, 8))
    recipe = PruneRecipe.model_validate({"model": {"name": "x"}, "budget": {"flops": "0.5x"}, "method": method})
    completed = complete(recipe, loaded, "cpu")[0]
    assert completed.method.sequential == expected == completed.settings().sequential
