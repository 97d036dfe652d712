"""`modhifi compare`: the grid on the screen, as JSON and as files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

import modhifi
from modhifi.calibration import collect
from modhifi.cli.main import app
from modhifi.errors import ModhifiError
from modhifi.pruning import stages
from modhifi.runs.compare import half_width
from modhifi.runs.recipes.compare import CompareRecipe

GRID = ["--selectors", "obs,random", "--compensate", "lstsq", "--compensate", "none"]


def test_the_grid_is_measured_once_and_shows_empty_cells(
    model_dir: Path, image_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = []

    def counted(*args: object, **options: object) -> object:
        passes.append(1)
        return collect.collect(*args, **options)

    monkeypatch.setattr(stages, "collect", counted)
    out = tmp_path / "grid"
    given = [str(model_dir), "--data", f"images:{image_dir}", "--samples", "16", "--evaluation-samples", "12"]
    command = ["compare", *given, "--flops", "0.6x,0.01x", "--inner-only", "--no-cache", "--out", str(out)]
    done = CliRunner().invoke(app, [*command, *GRID, "--json"])
    assert done.exit_code == 0, done.output
    assert len(passes) == 1
    content = json.loads(done.stdout)
    cells = content["comparison"]["cells"]
    assert [(c["selector"], c["compensate"], c["budget"]) for c in cells] == [
        (selector, compensate, f"{share} FLOPs")
        for selector in ("obs", "random")
        for share in ("0.6x", "0.01x")
        for compensate in ("lstsq", "none")
    ]
    full, empty = ([c for c in cells if c["budget"].startswith(share)] for share in ("0.6", "0.01"))
    assert all(c["error"] is None and abs(c["flops"] - 0.6) < 0.02 and c["time"] > 0 for c in full)
    assert all(c["quality"] == c["accuracy_after"] for c in full)  # folders are labels
    assert all("no allocation" in c["error"] for c in empty)
    assert {cost for c in full for cost in c["front"]} == {"flops", "time"}
    assert json.loads((out / "report.json").read_text())["comparison"]["cells"][0]["selector"] == "obs"
    page = (out / "report.html").read_text()
    assert page.count("<svg ") == 2 and "not measured" in page and "recipe.yaml" not in page
    assert (out / "front.png").stat().st_size > 10_000
    shown = CliRunner().invoke(app, [*command, "--force", "--selectors", "random", "--compensate", "none"])
    assert shown.exit_code == 0, shown.output
    assert "random + none at 0.01x FLOPs is empty: no allocation" in shown.output and "Best top-1 acc" in shown.output


def test_budgets_have_names_and_a_default() -> None:
    model = {"name": "demo:resnet"}
    assert [*CompareRecipe(model=model).budgets()] == ["0.7x FLOPs", "0.5x FLOPs", "0.3x FLOPs"]
    recipe = CompareRecipe(model=model, params=["0.5x"], ratio=[0.25])
    assert {name: (b.measure, b.keep) for name, b in recipe.budgets().items()} == {
        "0.5x parameters": ("parameters", 0.5),
        "0.25 removed": ("components", 0.75),
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"selectors": ["obs", "obss"]}, "unknown selector 'obss'; did you mean 'obs'"),
        ({"flops": ["2x"]}, "below 1x, not '2x'"),
        ({"method": {"eta": 0.9}}, "eta is not what all cells share"),
        ({"method": {"selector": "naive"}}, "selector is not what all cells share"),
    ],
)
def test_what_no_grid_can_be_is_refused(options: dict, message: str) -> None:
    with pytest.raises(ModhifiError, match=message):
        modhifi.compare("demo:resnet", "demo:calibration", **options)


def test_what_may_be_chance_is_never_nothing() -> None:
    # 17 of 18 with one success and one failure added; where half agree the addition changes nothing but the count
    expected = pytest.approx(1.96 * (17 / 18 / 18 / 18) ** 0.5)
    assert half_width(1.0, 16) == expected and half_width(0.0, 16) == expected
    assert half_width(0.5, 98) == pytest.approx(1.96 * 0.05)
