"""Recipes of several steps: what an ended, a failed and a replaced run leave in their directory."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from modhifi.disk import check_output, foreign, steps_of
from modhifi.errors import ModhifiError
from modhifi.healing.checkpoint import Checkpoint
from modhifi.runs.recipes.files import apply_overrides
from modhifi.runs.recipes.tasks import parse
from modhifi.runs.run_recipe import run_recipe
from modhifi.runs.run_task import Circumstances

DATA = {"source": "synthetic", "samples": 8, "evaluation_samples": 8}
CHECKS = {"walked": 0}


def steps(model: Path, **sweep: list[Any]) -> dict[str, Any]:
    return {
        "steps": {
            "prune": {
                "task": "prune",
                "model": {"name": str(model)},
                "budget": {"flops": "0.7x"},
                "data": DATA,
                "checks": CHECKS,
            },
            "heal": {
                "task": "heal",
                "directory": "step:prune",
                "budget": {"steps": 40},
                "data": DATA,
                "checks": CHECKS,
            },
        },
        **({"sweep": dict(sweep)} if sweep else {}),
    }


def run(content: dict[str, Any], out: Path, force: bool = False, **more: Any) -> list[Any]:
    return run_recipe(parse({**content, "out": str(out)}), Circumstances(force=force, **more))


def test_an_ended_run_goes_on_and_a_replaced_one_leaves_nothing_of_its_own(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, content, write = tmp_path / "out", steps(model_dir), Checkpoint.write

    def interrupted(checkpoint: Checkpoint, state: Any) -> None:
        write(checkpoint, state)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Checkpoint, "write", interrupted)
        run(content, out)
    assert (out / "heal.healing").is_file() and foreign(out) is None
    with pytest.raises(ModhifiError, match="is not empty"):  # another recipe
        run(steps(model_dir, **{"steps.heal.budget.steps": [50]}), out)
    read = []
    monkeypatch.setattr(Checkpoint, "read", lambda c, read_=Checkpoint.read: read.append(read_(c)) or read[-1])
    healed = run(content, out)[-1]
    assert [state is not None for state in read] == [True] and healed.report["healing"]["steps"] == 40
    assert sorted(path.name for path in out.iterdir()) == ["heal", "prune", "recipe.yaml"]
    (out / "heal.log").write_text("of a killed run")
    (out / "heal.healing").write_text("of one, too")
    shutil.copytree(out / "prune", out / "mine")  # an artefact that is no step
    assert foreign(out) is None
    only = {"steps": {"cut": content["steps"]["prune"]}}
    run(only, out, force=True)
    assert sorted(path.name for path in out.iterdir()) == ["cut", "mine", "recipe.yaml"]
    (out / "notes.txt").write_text("mine")
    with pytest.raises(ModhifiError, match=r"notes\.txt"):
        run(only, out, force=True)


def test_a_step_whose_name_leads_elsewhere_is_none_of_ours(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("steps: {../other: {}, here: {}, 7: {}}")
    assert steps_of(tmp_path) == {"here", "7"} and not steps_of(tmp_path / "nothing")


def test_bad_input_leaves_no_directory(model_dir: Path, tmp_path: Path) -> None:
    content = steps(model_dir)
    content["steps"]["prune"]["data"] = {**DATA, "source": f"images:{tmp_path / 'nothing'}"}
    with pytest.raises(ModhifiError):
        run(content, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ModhifiError):
        run(steps(model_dir, **{"steps.prune.budget.flosp": ["0.5x"]}), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_sweep_passes_over_a_budget_out_of_reach(model_dir: Path, tmp_path: Path) -> None:
    content = steps(model_dir, **{"steps.prune.budget.flops": ["0.0001x", "0.7x"]})
    del content["steps"]["heal"]
    (done,) = run(content, tmp_path / "out")
    assert done.name == "prune (prune.budget.flops=0.7x)" and done.failure is None
    strict = _strict(content)
    (failed,) = run({**content, "sweep": {"steps.prune.budget.flops": ["0.7x", "0.0001x"]}} | strict, tmp_path / "b")
    assert failed.name.endswith("=0.7x)") and (tmp_path / "b" / "prune").is_dir()
    assert "prune.budget.flops=0.0001x is out of reach: no allocation keeps only" in str(failed.failure)
    with pytest.raises(ModhifiError, match="no allocation keeps only"):
        run({**content, "sweep": {"steps.prune.budget.flops": ["0.0001x"]}}, tmp_path / "c")


def test_a_later_variant_leaves_nothing_of_an_earlier_one(model_dir: Path, tmp_path: Path) -> None:
    content = steps(model_dir, **{"steps.prune.checks.max_error": [10.0, 1e-9]})
    content["steps"]["heal"] |= {"budget": {"steps": 2}, "checks": {"walked": 0, "max_error": 1e-9}}
    finished = run(content, tmp_path / "out")
    assert [done.name.partition(" ")[0] for done in finished] == ["prune"] and finished[0].failure is not None
    assert {path.name for path in (tmp_path / "out").iterdir() if path.is_dir()} == {"prune"}


def _strict(content: dict[str, Any]) -> dict[str, Any]:
    prune = {**content["steps"]["prune"], "checks": {"walked": 0, "max_error": 1e-9}}
    return {"steps": {"prune": prune}}


def test_a_report_is_replaced_with_its_summary_and_written_into_no_artefact(model_dir: Path, tmp_path: Path) -> None:
    prune = steps(model_dir)["steps"]["prune"]
    run_recipe(parse({**prune, "out": str(tmp_path / "small")}))
    verify = {
        "task": "verify",
        "directory": str(tmp_path / "small"),
        "data": {"source": "synthetic", "samples": 8},
        "seed": 3,
        "checks": CHECKS,
        "out": str(tmp_path / "report"),
        "summary": str(tmp_path / "report" / "s.md"),
    }
    for force in (False, True):
        run_recipe(parse(verify), Circumstances(force=force))
        assert (tmp_path / "report" / "s.md").is_file()
    with pytest.raises(ModhifiError, match="a file of an artefact"):
        run_recipe(parse({**verify, "out": str(tmp_path / "small" / "report.json"), "summary": None}))


def test_the_working_directory_is_filled_and_stays(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    prune = steps(model_dir)["steps"]["prune"]
    (done,) = run_recipe(parse({**prune, "out": "."}))
    assert done.path is not None and (Path.cwd() / "modhifi.json").is_file() and Path.cwd().samefile(tmp_path)
    with pytest.raises(ModhifiError, match="is not empty"):
        check_output(".")


def test_what_is_set_is_not_swept() -> None:
    content = {"steps": {"a": {}}, "sweep": {"steps.a.budget.flops": ["0.9x", "0.5x"]}}
    assert apply_overrides(content, ["steps.a.budget.flops=0.7x"]) == {
        "steps": {"a": {"budget": {"flops": "0.7x"}}},
        "sweep": {},
    }
    assert apply_overrides(content, ["steps.a.seed=1"])["sweep"] == content["sweep"]
