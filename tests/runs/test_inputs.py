"""What a run reads is known before it writes, and never replaced."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import modhifi
from modhifi.cli.main import app
from modhifi.errors import ModhifiError
from modhifi.runs.inputs import local_paths, located
from modhifi.runs.recipes.files import set_value
from modhifi.runs.recipes.tasks import parse
from modhifi.runs.run_recipe import run_recipe
from modhifi.runs.run_task import Circumstances

# A recipe of every task whose names nobody finds.
BASES: dict[str, dict[str, Any]] = {
    "prune": {"model": {"name": "no/model"}, "budget": {"ratio": 0.5}},
    "unlearn": {"model": {"name": "no/model"}, "data": {"source": "images:no"}, "forget": ["0"]},
    "verify": {"directory": "no/artefact", "data": {"source": "images:no"}},
    "audit": {"directory": "no/artefact", "data": {"source": "images:no"}},
}
KEYS = [
    ("prune", "model.name", ""),
    ("prune", "model.weights", ""),
    ("prune", "model.gguf_file", ""),
    ("prune", "data.source", "images:"),
    ("prune", "data.source", "text:"),
    ("prune", "data.evaluate", "images:"),
    ("unlearn", "model.name", ""),
    ("unlearn", "data.source", "images:"),
    ("unlearn", "data.forget", "images:"),
    ("unlearn", "data.evaluate", "images:"),
    ("unlearn", "data.members", "images:"),
    ("unlearn", "reference", ""),
    ("verify", "directory", ""),
    ("verify", "against.name", ""),
    ("verify", "data.source", "hf:"),
    ("audit", "directory", ""),
    ("audit", "original", ""),
    ("audit", "reference", ""),
    ("audit", "data.source", "images:"),
    ("audit", "data.forget", "images:"),
    ("audit", "data.members", "images:"),
]


def artefact(directory: Path) -> Path:
    """What modhifi wrote, as far as its name tells, with a weights file and a folder of images inside."""
    directory.mkdir()
    for name in ("modhifi.json", "model.safetensors", "recipe.yaml"):
        (directory / name).write_text("{}")
    return directory


@pytest.mark.parametrize("inside", ["", "model.safetensors"])
@pytest.mark.parametrize(("task", "key", "prefix"), KEYS)
def test_a_run_replaces_nothing_that_its_recipe_names(
    tmp_path: Path, task: str, key: str, prefix: str, inside: str
) -> None:
    out = artefact(tmp_path / "out")
    content = BASES[task] | {"task": task, "out": str(out)}
    content = {k: dict(v) if isinstance(v, dict) else v for k, v in content.items()}
    set_value(content, key, f"{prefix}{out / inside}")
    for recipe in (content, {"steps": {"one": {k: v for k, v in content.items() if k != "out"}}, "out": str(out)}):
        with pytest.raises(ModhifiError, match="which this run reads, and is not replaced"):
            run_recipe(parse(recipe), Circumstances(force=True))
    assert sorted(p.name for p in out.iterdir()) == ["model.safetensors", "modhifi.json", "recipe.yaml"]


def test_local_paths_are_those_that_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("model", "images", "data", "out"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    content = {
        "model": {"name": "model", "weights": "~/model"},
        "data": {"source": "images:images", "evaluate": "hf:data:train"},
        "only": ["conv1", "\0", "~nouser/x", "x" * 5000],
        "out": "out",
        "summary": "out",
        "seed": 3,
    }
    found = list(local_paths(content))
    assert found == [Path("model"), tmp_path / "model", Path("images"), Path("data")]


@pytest.mark.parametrize(
    "command",
    [
        ["recipe", "run", "OUT"],
        ["recipe", "run", "OUT/recipe.yaml"],
        ["prune", "--recipe", "OUT"],
    ],
)
def test_a_run_does_not_replace_its_own_recipe(tmp_path: Path, command: list[str]) -> None:
    out = artefact(tmp_path / "out")
    (out / "recipe.yaml").write_text("model: {name: no/model}\nbudget: {ratio: 0.5}\n")
    arguments = [word.replace("OUT", str(out)) for word in command]
    result = CliRunner().invoke(app, [*arguments, "--out", str(out), "--force", "--quiet"])
    assert result.exit_code == 2
    assert "recipe.yaml, which this run reads, and is not replaced" in result.stderr


def test_only_what_a_recipe_reads_from_disk_becomes_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("prune", "obs", "net", "pictures", "erase", "synthetic", "i"):
        (tmp_path / name).mkdir()
    content = {
        "task": "prune",
        "model": {"name": "net", "weights": "missing.pth"},
        "data": {"source": "images:pictures", "evaluate": "hf:i:train", "forget": "synthetic"},
        "method": {"selector": "obs", "name": "erase", "only": ["net"]},
        "steps": {"verify": {"directory": "step:prune", "against": {"name": "net"}}},
    }
    assert located(content) == {
        "task": "prune",
        "model": {"name": f"{tmp_path}/net", "weights": "missing.pth"},
        "data": {
            "source": f"images:{tmp_path}/pictures",
            "evaluate": f"hf:{tmp_path}/i:train",
            "forget": "synthetic",
        },
        "method": {"selector": "obs", "name": "erase", "only": ["net"]},
        "steps": {"verify": {"directory": "step:prune", "against": {"name": f"{tmp_path}/net"}}},
    }


RUNS: list[tuple[Any, dict[str, Any], int]] = [
    (modhifi.prune, {"params": "0.5x"}, 2),
    (modhifi.prune, {"ratio": 0.2}, 2),
    (modhifi.unlearn, {"forget": "frog"}, 4),
]


@pytest.mark.parametrize(("run", "asked", "megabytes"), RUNS)
def test_a_disk_without_room_is_told_before_the_data_are_read(
    run: Any, asked: dict[str, Any], megabytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The demo's weights take 3.76 MB: all of them, half, or what a fifth fewer rows and columns leave."""
    free = partial(shutil._ntuple_diskusage, 10**9, 10**9)  # type: ignore[attr-defined]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free(10**6))
    with pytest.raises(ModhifiError, match=f"weights take some {megabytes} MB and the disk of .* has 1 MB free"):
        run("demo:resnet", "images:/nowhere", out=tmp_path / "out", **asked)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free((megabytes + 1) * 10**6))
    with pytest.raises(ModhifiError, match="/nowhere"):
        run("demo:resnet", "images:/nowhere", out=tmp_path / "out", **asked)
    assert not list(tmp_path.iterdir())
