from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from modhifi.defaults import complete
from modhifi.errors import ModhifiError
from modhifi.load import load_model
from modhifi.recipe import PruneRecipe, apply_overrides, dump_recipe, load_recipe, parse_recipe

CONTENT = {"model": {"name": "timm:resnet18"}, "budget": {"flops": "0.5x"}}


def test_a_dumped_recipe_reads_back_equal(tmp_path: Path) -> None:
    recipe = parse_recipe(apply_overrides(CONTENT, ["method.only=['layer1*']", "seed=3"]))
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe))
    assert load_recipe(tmp_path / "recipe.yaml") == recipe
    settings = complete(recipe, load_model(nn.Flatten(), example=torch.zeros(2, 3, 8, 8)), "cpu")[0].settings()
    assert settings.only == ("layer1*",) and settings.seed == 3
    assert (settings.layout, settings.batch_size, settings.rows_per_column) == ("global", 32, 2)


def test_overrides_leave_the_original_alone() -> None:
    changed = apply_overrides(CONTENT, ["budget.flops=0.7x", "data.samples=12"])
    assert changed["budget"]["flops"] == "0.7x" and changed["data"]["samples"] == 12
    assert CONTENT["budget"]["flops"] == "0.5x" and "data" not in CONTENT


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["metod.selector=obs"], "did you mean 'method'"),
        (["method.selector=best"], "method.selector"),
        (["data.samples=0"], "data.samples"),
        (["method.floor=1.5"], "method.floor"),
        (["model.name.x=1"], "'name' is a value"),
        (["nonsense"], "a.b=value"),
    ],
)
def test_bad_content_names_the_key(changes: list[str], message: str) -> None:
    with pytest.raises(ModhifiError, match=message):
        parse_recipe(apply_overrides(CONTENT, changes))


@pytest.mark.parametrize(("text", "message"), [("a: [", "not YAML"), ("- 1", "mapping")])
def test_bad_files(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(ModhifiError, match=message):
        load_recipe(tmp_path / "r.yaml")
    with pytest.raises(ModhifiError, match="no recipe at"):
        load_recipe(tmp_path / "missing.yaml")


def test_shipped_recipes_are_valid() -> None:
    shipped = [p for p in (files("modhifi.recipes") / "prune").iterdir() if p.name.endswith(".yaml")]
    assert shipped
    for path in shipped:
        recipe = parse_recipe(yaml.safe_load(path.read_text()), path.name)
        assert isinstance(recipe, PruneRecipe)
        recipe.budget.parse()
