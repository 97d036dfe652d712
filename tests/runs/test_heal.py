"""`modhifi heal` on artefacts: figures beside the original's, the lineage, what is refused, forgotten classes."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import timm
import tiny_parts
import tiny_text
import torch
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf
from torch import Tensor
from typer.testing import CliRunner
from unlearn_world import NAMES, world

import modhifi
from modhifi.cli.main import app
from modhifi.data.in_memory import from_items
from modhifi.data.labels import label_samples
from modhifi.errors import ModhifiError
from modhifi.healing.distil import Distillation
from modhifi.models.artifact import load_artifact
from modhifi.models.load import load_model
from modhifi.models.manifest import read_manifest
from modhifi.runs import heal_inputs
from modhifi.runs.defaults import complete_heal, with_end
from modhifi.runs.heal_inputs import LearningData, load_learning_data, load_patient
from modhifi.runs.inputs import NOTHING, original_of
from modhifi.runs.recipes.heal import HealBudget, HealRecipe
from modhifi.runs.recipes.prune import ModelSource
from modhifi.runs.recipes.tasks import parse

__all__ = ["world"]


def run(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture(scope="module")
def small(model_dir: Path, image_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pruned ResNet."""
    out = tmp_path_factory.mktemp("artefacts") / "small"
    data = {"samples": 16, "evaluation_samples": 8, "checks": {"walked": 0}}
    modhifi.prune(model_dir, f"images:{image_dir}", ratio=0.4, out=out, **data)
    return out


def heal(directory: Path, image_dir: Path, *more: object) -> tuple[int, str, str]:
    amounts = ("--samples", 32, "--evaluation-samples", 12, "--batch-size", 8, "--walked", 0, "--only-this-data")
    return run("heal", directory, "--data", f"images:{image_dir}", *amounts, *more)


@pytest.fixture(scope="module")
def healed(small: Path, image_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("artefacts") / "healed"
    code, _, stderr = heal(small, image_dir, "--steps", 8, "--precision", "bf16", "--out", out, "--quiet")
    assert code == 0, stderr
    return out


def test_the_report_has_original_pruned_and_healed_side_by_side(healed: Path) -> None:
    report = json.loads((healed / "report.json").read_text())
    assert list(report["columns"].values()) == ["original", "pruned", "healed"]
    assert report["healing"]["precision"] == "bf16" and "minutes, in bfloat16: those" in report["summary"]
    rows = {row["name"]: row for row in report["before_after"]}
    parameters = rows["parameters"]
    assert parameters["before"] > parameters["between"] == parameters["after"]
    assert rows["agreement with the original"]["between"] is not None
    curve = report["healing"]["curve"]
    assert [entry["step"] for entry in curve] == list(range(9))
    assert any("gradients reached the weights" in verdict["text"] for verdict in report["verdicts"])
    page = (healed / "report.html").read_text()
    assert "<th>original</th><th>pruned</th><th>healed</th>" in page and "Learning curve" in page
    card = (healed / "README.md").read_text()
    assert "pruned, then healed with modhifi" in card and "gradients reached its weights" in card
    assert "| | original | pruned | healed | change |" in card and "forward passes only" not in card


def test_the_manifest_tells_the_way_from_the_original(healed: Path, small: Path, model_dir: Path) -> None:
    manifest, before = read_manifest(healed), read_manifest(small)
    assert manifest.task == "heal" and manifest.model_extra["gradients"] == "weights"
    assert manifest.base.sha256 == before.base.sha256 and manifest.groups == before.groups
    assert [edit["task"] for edit in manifest.base.edits_before] == ["prune"]
    assert set(before.calibration.hashes) < set(manifest.calibration.hashes)
    assert original_of(manifest).name == str(model_dir)


def test_what_was_removed_stays_removed(healed: Path, small: Path) -> None:
    shapes = [{k: v.shape for k, v in load_artifact(d).model.state_dict().items()} for d in (healed, small)]
    assert shapes[0] == shapes[1]


def test_bounds_of_a_healed_model_are_those_of_its_dense_shape(healed: Path, image_dir: Path) -> None:
    given = {"samples": 12, "walked": 2, "allow_overlap": True}
    bounds = modhifi.verify(healed, f"images:{image_dir}", **given)
    assert {rung.name: rung.value is not None for rung in bounds.rungs}["R1 every input"]
    with pytest.raises(ModhifiError, match="calibrated this model"):
        modhifi.verify(healed, f"images:{image_dir}", samples=48)


def test_a_short_source_is_shared_out_and_said_to_be_short(small: Path, image_dir: Path, tmp_path: Path) -> None:
    amounts = ("--samples", 1000, "--evaluation-samples", 100)
    code, stdout, stderr = heal(small, image_dir, *amounts, "--steps", 1, "--out", tmp_path / "out", "--json")
    assert code == 0, stderr
    report = json.loads(stdout)
    data = report["data"]
    learnt, held = data["samples"] + data["validation_samples"], data["held_out_samples"]
    assert held == math.ceil((learnt + held) / 5)
    said = f"{held} samples are held out, where 100 were asked for: there are no more"
    assert said in report["warnings"]


@pytest.mark.slow
def test_a_healed_model_is_healed_again(healed: Path, image_dir: Path, tmp_path: Path) -> None:
    code, stdout, stderr = heal(healed, image_dir, "--steps", 1, "--out", tmp_path / "again", "--json")
    assert code == 0, stderr
    assert json.loads(stdout)["model"]["lineage"].count("healed") == 2
    assert [e["task"] for e in read_manifest(tmp_path / "again").base.edits_before] == ["prune", "heal"]


def test_the_defaults_are_written_into_the_recipe(healed: Path, model_dir: Path) -> None:
    content = json.loads((healed / "modhifi.json").read_text())["recipe"]
    assert content["against"]["name"] == str(model_dir)
    assert content["method"]["optimizer"] == "muon" and content["method"]["augment"]
    assert content["method"]["temperature"] == 4.0 and content["batch_size"] == 8


@pytest.mark.parametrize(
    ("method", "facts", "optimizer", "temperature"),
    [
        ({}, {}, "muon", 4.0),
        ({"lora": 2}, {}, "adamw", 4.0),
        ({"optimizer": "sgd"}, {}, "sgd", 4.0),
        ({}, {"whole": True}, "muon", 4.0),
        ({}, {"forgot": True}, "muon", 1.0),
        ({}, {"forgot": True, "whole": True}, "adamw", 1.0),
    ],
)
def test_large_steps_are_the_default_of_networks_with_batchnorm_that_lost_something(
    model_dir: Path, method: dict[str, Any], facts: dict[str, bool], optimizer: str, temperature: float
) -> None:
    recipe = HealRecipe.model_validate({"directory": "small", "method": method})
    completed, _ = complete_heal(recipe, load_model(model_dir), "cpu", ModelSource(name=str(model_dir)), **facts)
    assert (completed.method.optimizer, completed.method.temperature) == (optimizer, temperature)


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> int:
    """As many drawn images are added to few."""
    monkeypatch.setattr(heal_inputs, "FEW", 25)
    monkeypatch.setattr(heal_inputs, "DRAWN", 36)
    return 36


def learning_data(directory: Path, source: str | list[str], **more: Any) -> LearningData:
    data = {"source": source, "samples": 24, "evaluation_samples": 8, **more}
    recipe = parse({"task": "heal", "directory": str(directory), "data": data, "batch_size": 8}, "test")
    return load_learning_data(recipe, load_patient(recipe, NOTHING), NOTHING, lambda *_: None)


def test_few_images_have_drawn_ones_beside_them(small: Path, image_dir: Path, few: int) -> None:
    data = learning_data(small, f"images:{image_dir}")
    own, learnt = set(data.given.hashes), set(data.train.hashes)
    chosen, held = set(data.validation.hashes), set(data.held.hashes)
    # A fifth of the real ones chooses beside as many drawn ones.
    assert (len(own), data.drawn, len(chosen & own), len(chosen - own)) == (24, few, 5, 5)
    assert learnt & own == own - chosen and len(learnt - own) == few - 5 and data.learnt == 24 + few - 10
    real = sum(item in own for item in data.train.hashes)
    assert real == 38 and len(data.train) - real == 31  # as near to a half as whole passes over the real ones come
    assert not held & (own | learnt | chosen) and not data.held.synthetic
    assert data.remarks() == [
        "36 drawn images are learnt from beside the 24 of --data; --only-this-data leaves them out"
    ]


@pytest.mark.usefixtures("few")
def test_a_handful_of_drawn_ones_is_not_worth_it(small: Path, image_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heal_inputs, "DRAWN", 4)  # fewer than choose
    data = learning_data(small, f"images:{image_dir}")
    assert (data.drawn, len(data.train) + len(data.validation)) == (0, 24)


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize(
    ("source", "more"),
    [("images:{}", {"only_this_data": True}), ("images:{}", {"samples": 25}), ("synthetic", {})],
)
def test_only_this_data_enough_and_drawn_ones_are_learnt_from_alone(
    small: Path, image_dir: Path, source: str, more: dict[str, Any]
) -> None:
    data = learning_data(small, source.format(image_dir), **more)
    assert len(data.train) + len(data.validation) == len(data.given) == more.get("samples", 24)
    assert not data.remarks() and data.learnt == len(data.train)


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize(("channels", "size", "dtype"), [(3, 48, torch.float32), (3, 32, torch.float64), (4, 32, None)])
def test_images_unlike_those_that_can_be_drawn_are_learnt_from_alone(
    model_dir: Path, tmp_path: Path, channels: int, size: int, dtype: torch.dtype | None
) -> None:
    if channels == 4:
        given = {"in_chans": 4, "num_classes": 3}
        save_for_hf(timm.create_model("resnet10t", **given), tmp_path, model_args=given)
    images = from_items(torch.randn(24, channels, size, size, dtype=dtype), None, n=24, seed=0)
    assert heal_inputs._drawn_beside(images, load_model(tmp_path if channels == 4 else model_dir), 0) is None


@pytest.mark.usefixtures("few")
def test_a_run_on_few_images_says_what_it_drew(small: Path, image_dir: Path, tmp_path: Path) -> None:
    amounts = {"samples": 24, "evaluation_samples": 8, "batch_size": 8, "steps": 2, "checks": {"walked": 0}}
    healed = modhifi.heal(small, f"images:{image_dir}", out=tmp_path / "out", **amounts)
    assert any(warning.startswith("36 drawn images are learnt from") for warning in healed.report["warnings"])
    assert "synthetic:mixed" in healed.report["data"]["learnt from"]
    calibration = read_manifest(tmp_path / "out").calibration
    assert "synthetic:mixed" in calibration.description and len(calibration.hashes) >= 50
    alone = modhifi.heal(small, f"images:{image_dir}", only_this_data=True, **amounts)
    assert not any("drawn" in warning for warning in alone.report["warnings"])


@pytest.fixture(scope="module")
def small_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pruned language model."""
    work = tmp_path_factory.mktemp("text")
    amounts = {"samples": 8, "evaluation_samples": 2, "window": 16, "checks": {"walked": 0}}
    (work / "text.txt").write_text(tiny_text.articles(6))
    modhifi.prune(
        tiny_text.save(work / "model"),
        f"text:{work / 'text.txt'}",
        ratio=0.3,
        out=work / "small",
        only_this_data=True,
        **amounts,
    )
    return work / "small"


def documents(directory: Path, windows: Sequence[int]) -> str:
    """A folder of documents of so many windows of 15 words."""
    directory.mkdir()
    for number, count in enumerate(windows):
        (directory / f"{number}.txt").write_text(tiny_text.write(100 * len(directory.name) + number, 15 * count + 12))
    return f"text:{directory}"


def test_windows_of_one_document_are_learnt_from_and_chosen_by(small_text: Path, tmp_path: Path) -> None:
    source = documents(tmp_path / "texts", [12, 12, 12, 12])
    # Of the few that calibrate, all are of one document, as the others are held out.
    data = learning_data(small_text, source, samples=4, evaluation_samples=16, window=16)
    learnt, chosen = set(data.train.hashes), set(data.validation.hashes)
    assert (len(learnt), len(chosen), len(learnt | chosen)) == (3, 1, 4)


def test_windows_of_two_unequal_documents_are_not_thrown_away(small_text: Path, tmp_path: Path) -> None:
    alone = {"samples": 60, "evaluate": documents(tmp_path / "others", [9] * 4), "evaluation_samples": 4}
    source = documents(tmp_path / "texts", [70, 4, 1, 1])
    data = learning_data(small_text, f"{source}@1", window=16, **alone)
    assert len(data.train) + len(data.validation) > 0.85 * len(data.given)


def test_a_source_that_is_too_short_keeps_its_share_of_what_is_learnt(small_text: Path, tmp_path: Path) -> None:
    short, long = (documents(tmp_path / name, sizes) for name, sizes in (("short", [2] * 5), ("long", [20] * 4)))
    data = learning_data(small_text, [f"{short}@0.5", f"{long}@0.5"], samples=64, evaluation_samples=4, window=16)
    own = {name: set(samples.hashes) for name, _, samples in data.given.parts()}
    assert len(own[short]) < 12 and len(own[long]) == 32  # of 32 each
    for samples in (data.train, data.validation):
        counts = [sum(item in items for item in samples.hashes) for items in own.values()]
        assert counts[0] == pytest.approx(counts[1], rel=0.25) and min(counts) > 0
    assert not {*data.train.hashes} & {*data.validation.hashes}
    assert data.learnt < len(data.train)


def test_the_report_has_three_columns_for_every_source(small_text: Path, tmp_path: Path) -> None:
    source = documents(tmp_path / "texts", [12, 12, 12, 12])
    amounts = {"samples": 12, "evaluation_samples": 4, "window": 16, "steps": 2, "checks": {"walked": 0}}
    report = modhifi.heal(small_text, source, out=tmp_path / "out", **amounts).report
    rows = {row["name"]: row for row in report["before_after"]}
    for where in ("", f", {source}", ", self"):
        row = rows[f"perplexity{where}"]
        assert all(row[key] > 0 for key in ("before", "between", "after")) and row["between"] != row["before"]
    assert "0.5 of the mass is text that the model writes itself; --only-this-data leaves it out" in report["warnings"]
    assert "perplexity, self" in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.parametrize(
    ("kind", "name"), [("detr", "box overlap (IoU)"), ("clip", "cosine of image"), ("wav2vec2", "transcript agreement")]
)
def test_what_both_models_see_or_hear_alike_has_three_columns(tmp_path: Path, kind: str, name: str) -> None:
    model, amounts = tiny_parts.save(kind, tmp_path / "model"), {"samples": 8, "evaluation_samples": 4}
    modhifi.prune(model, ratio=0.3, out=tmp_path / "small", checks={"walked": 0}, **amounts)
    report = modhifi.heal(tmp_path / "small", steps=1, batch_size=4, checks={"walked": 0}, **amounts).report
    (row,) = [row for row in report["before_after"] if row["name"].startswith(name)]
    assert row["before"] == 1 and 0 <= row["between"] <= 1 and 0 <= row["after"] <= 1


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_healed_model_keeps_what_its_library_put_around_forward(
    small_text: Path, tmp_path: Path, precision: str
) -> None:
    source = documents(tmp_path / "texts", [12, 12, 12, 12])
    amounts = {"samples": 12, "evaluation_samples": 4, "window": 16, "steps": 2, "checks": {"walked": 0}}
    healed = modhifi.heal(small_text, f"{source}@1", method={"precision": precision}, **amounts).model
    assert healed is not None and not {"forward", "_original_forward"} & vars(healed).keys()
    outputs = healed(torch.arange(3, 9)[None], output_hidden_states=True)
    assert len(outputs.hidden_states) == 3 and outputs.logits.dtype == torch.float32


def test_a_run_ends_after_ten_minutes_or_one_pass_over_the_samples_there_are() -> None:
    recipe = HealRecipe.model_validate({"directory": "small", "batch_size": 8})
    ends = [with_end(recipe, 100, one_pass=one_pass).budget for one_pass in (False, True)]
    assert [(end.steps, end.minutes) for end in ends] == [(None, 10.0), (12, None)]
    said = recipe.model_copy(update={"budget": HealBudget(steps=3)})
    assert with_end(said, 100, one_pass=True) is said


@pytest.mark.slow
def test_a_recipe_prunes_heals_and_verifies_with_the_first_budget_that_passes(
    model_dir: Path, image_dir: Path, tmp_path: Path
) -> None:
    data = {"source": f"images:{image_dir}", "samples": 30, "evaluation_samples": 10}
    steps = {
        "prune": {"task": "prune", "model": {"name": str(model_dir)}, "data": data, "budget": {"ratio": 0.3}},
        "heal": {"task": "heal", "directory": "step:prune", "data": data, "batch_size": 8},
        "verify": {"task": "verify", "directory": "step:heal", "data": {**data, "allow_overlap": True}},
    }
    del steps["verify"]["data"]["evaluation_samples"]
    steps["verify"]["checks"] = {"max_flip": 0.99}
    content = {"steps": steps, "sweep": {"steps.heal.budget.steps": [2, 4]}}
    (tmp_path / "recipe.yaml").write_text(json.dumps(content))
    code, stdout, stderr = run("recipe", "run", tmp_path / "recipe.yaml", "--out", tmp_path / "out", "--json")
    assert code == 0, stderr
    assert [report["step"] for report in json.loads(stdout)] == [
        f"{name} (heal.budget.steps=2)" for name in ("prune", "heal", "verify")
    ]
    assert json.loads((tmp_path / "out" / "heal" / "report.json").read_text())["healing"]["steps"] == 2


# -- what is refused ---------------------------------------------------------------------------------------------------
def refused(directory: Path, image_dir: Path, *more: object) -> str:
    code, _, stderr = heal(directory, image_dir, *more)
    assert code == 2 and stderr.startswith("modhifi: error:") and stderr.count("\n") == 1, stderr
    return stderr


def test_weights_that_were_edited(small: Path, image_dir: Path, tmp_path: Path) -> None:
    copy = tmp_path / "edited"
    shutil.copytree(small, copy)
    state = load_file(copy / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in state.items()}, copy / "model.safetensors")
    assert "are not those that were saved" in refused(copy, image_dir, "--steps", 1, "--out", tmp_path / "x")


def test_an_original_that_is_gone_or_another_one(small: Path, model_dir: Path, image_dir: Path, tmp_path: Path) -> None:
    copy = tmp_path / "small"
    shutil.copytree(small, copy)
    text = (copy / "modhifi.json").read_text()
    (copy / "modhifi.json").write_text(text.replace(str(model_dir), str(tmp_path / "gone")))
    assert "gone" in refused(copy, image_dir, "--steps", 1, "--out", tmp_path / "x")
    other = load_model(model_dir)
    next(other.model.parameters()).data += 1
    save_for_hf(other.model, tmp_path / "other", model_args=other.info["model_args"], safe_serialization=True)
    message = refused(small, image_dir, "--against", tmp_path / "other", "--steps", 1, "--out", tmp_path / "x")
    assert "has other weights than the one" in message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--steps", "0"], "--steps: input should be greater than or equal to 1"),
        (["--minutes", "0"], "--minutes: input should be greater than 0"),
        (["--steps", "1", "--lora", "4"], "--lora is for models of transformers"),
        (["--steps", "1", "--lora", "4", "--optimizer", "muon"], "adapters start at zero; take adamw or sgd"),
        (["--steps", "1", "--samples", "2"], "too few to learn from"),
        (["--steps", "1", "--max-perplexity-ratio", "1.1"], "perplexity"),
    ],
)
def test_options_that_do_not_fit(
    small: Path, image_dir: Path, tmp_path: Path, options: list[str], message: str
) -> None:
    assert message in refused(small, image_dir, *options, "--out", tmp_path / "x")


def test_without_a_place_to_write(small: Path, image_dir: Path) -> None:
    assert "give --out DIR" in refused(small, image_dir, "--steps", 1)


def test_a_loss_that_is_not_finite_is_written_and_fails(
    small: Path, image_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Distillation._loss

    def loss(run: Distillation, indices: list[int], number: int) -> Tensor:
        return real(run, indices, number) * (torch.nan if run.state.step == 2 else 1)

    monkeypatch.setattr(Distillation, "_loss", loss)
    out = tmp_path / "x"
    code, _, stderr = heal(small, image_dir, "--steps", 4, "--out", out, "--quiet")
    assert code == 1 and "the loss was not finite before step 3" in stderr and "--learning-rate" in stderr
    assert all(tensor.isfinite().all() for tensor in load_artifact(out).model.state_dict().values())


# -- a run that is ended -----------------------------------------------------------------------------------------------
RUN = """
import os, signal, sys
from modhifi.healing.distil import Distillation
_, at, number, *sys.argv = sys.argv
real = Distillation._step

def step(run, share):
    if run.state.step == int(at):
        os.kill(os.getpid(), int(number))
    real(run, share)

Distillation._step = step
from modhifi.cli.main import main
main()
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code", "said"),
    [(signal.SIGKILL, -9, ""), (signal.SIGINT, 130, "interrupted; the same command goes on from")],
)
def test_a_run_that_is_killed_goes_on(
    small: Path, image_dir: Path, tmp_path: Path, number: signal.Signals, code: int, said: str
) -> None:
    command = ["heal", small, "--data", f"images:{image_dir}", "--samples", 32, "--evaluation-samples", 8]
    command += ["--batch-size", 8, "--walked", 0, "--steps", 6, "--out", tmp_path / "out", "--quiet"]
    done = subprocess.run(
        [sys.executable, "-c", RUN, "4", str(int(number)), "modhifi", *map(str, command)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL) and None if number != signal.SIGKILL else None,
    )
    assert done.returncode == code and said in done.stderr, done.stderr
    assert (tmp_path / "out.healing").is_file() and not (tmp_path / "out").exists()
    result, _, stderr = run(*command)
    assert result == 0, stderr
    assert "going on from step 4" in (tmp_path / "out" / "modhifi.log").read_text()
    assert not (tmp_path / "out.healing").exists()


@pytest.mark.slow
def test_two_processes_learn_what_one_learns(small: Path, image_dir: Path, tmp_path: Path) -> None:
    command = ["heal", small, "--data", f"images:{image_dir}", "--samples", 32, "--evaluation-samples", 8, "--steps", 4]
    command += [
        "--batch-size",
        8,
        "--walked",
        0,
        "--no-augment",
        "--no-batch-statistics",
        "--precision",
        "no",
        "--device",
        "cpu",
        "--json",
    ]
    launcher = ["torch.distributed.run", "--nproc_per_node", "2", "--standalone", "-m", "modhifi"]
    together = subprocess.run(
        [sys.executable, "-m", *launcher, *map(str, command), "--out", str(tmp_path / "two")],
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert together.returncode == 0, together.stderr
    code, alone, stderr = run(*command, "--out", tmp_path / "one")
    assert code == 0, stderr
    curves = [json.loads(report)["healing"]["curve"] for report in (together.stdout, alone)]
    for ours, theirs in zip(*curves, strict=True):
        assert ours["divergence"] == pytest.approx(theirs["divergence"], rel=1e-3)
        assert ours["loss"] is None or ours["loss"] == pytest.approx(theirs["loss"], rel=1e-3)


# -- forgotten classes, language models --------------------------------------------------------------------------------
def test_what_forgot_classes_without_saying_which_is_refused(small: Path, image_dir: Path, tmp_path: Path) -> None:
    older = tmp_path / "older"
    shutil.copytree(small, older)
    content = json.loads((older / "modhifi.json").read_text())
    content["base"]["edits_before"] = [{"source": "forgot", "task": "unlearn", "files": {}}]
    (older / "modhifi.json").write_text(json.dumps(content))
    code, _, stderr = heal(older, image_dir, "--steps", 1, "--out", tmp_path / "out")
    assert code == 2 and "made from forgot, which forgot classes" in stderr and not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_class_stays_forgotten_after_pruning_and_healing(world: Path, tmp_path: Path) -> None:
    train, amounts = f"images:{world / 'train'}", {"samples": 400, "checks": {"walked": 0}}
    given = {**amounts, "evaluate": f"images:{world / 'test'}", "evaluation_samples": 480}
    modhifi.unlearn(world / "model", train, forget=NAMES[2], out=tmp_path / "forgot", **given)
    modhifi.prune(tmp_path / "forgot", train, ratio=0.5, out=tmp_path / "small", **given)
    healed = modhifi.heal(tmp_path / "small", train, steps=40, batch_size=32, out=tmp_path / "healed", **given)
    assert [entry.index for entry in read_manifest(tmp_path / "healed").forgotten] == [2]
    forgetting = healed.bounds.forgetting
    assert forgetting["original"].measured < 0.5 and forgetting["edited"].measured >= 0.98


@pytest.mark.slow
def test_a_forgotten_class_is_not_taught_again(world: Path, tmp_path: Path) -> None:
    images = {"data": f"images:{world / 'train'}", "evaluate": f"images:{world / 'test'}"}
    forgot = modhifi.unlearn(world / "model", forget=NAMES[2], out=tmp_path / "forgot", checks={"walked": 0}, **images)
    # The edit saw all images to learn from, so none of them may be held out.
    source = {"source": images["data"], "evaluate": images["evaluate"], "samples": 300, "evaluation_samples": 60}
    recipe = parse({"task": "heal", "directory": str(tmp_path / "forgot"), "data": source, "batch_size": 64}, "test")
    patient = load_patient(recipe, NOTHING)
    data = load_learning_data(recipe, patient, NOTHING, lambda *_: None)
    for part in (data.train, data.validation):
        assert len(part) and 2 not in set(label_samples(patient.original, part, 64)[0].labels.tolist())
    healed = modhifi.heal(
        tmp_path / "forgot",
        images["data"],
        evaluate=images["evaluate"],
        samples=400,
        evaluation_samples=480,
        steps=20,
        batch_size=32,
        checks={"walked": 0},
        out=tmp_path / "healed",
    )
    rows = healed.report["audit"]["rows"]
    assert rows["edited"]["forget"] <= forgot.report["audit"]["rows"]["edited"]["forget"] + 0.02
    assert rows["edited"]["retain"] > rows["original"]["retain"] - 0.05
    row = next(r for r in healed.report["before_after"] if "forgotten" in r["name"].lower() or "forget" in r["name"])
    assert row["between"] is not None
    assert [entry.index for entry in read_manifest(tmp_path / "healed").forgotten] == [2]
    assert healed.report["healing"]["matched blocks"] == []


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["uniform", "global"])
def test_a_language_model_is_healed_on_its_own_text(tmp_path: Path, layout: str) -> None:
    model = tiny_text.save(tmp_path / "model")
    given: dict[str, Any] = {"samples": 40, "evaluation_samples": 4, "window": 16, "checks": {"walked": 0}}
    modhifi.prune(model, "self", ratio=0.3, out=tmp_path / "small", method={"layout": layout}, **given)
    result = modhifi.heal(
        tmp_path / "small", "self", steps=20, method={"learning_rate": 1e-3}, out=tmp_path / "healed", **given
    )
    curve = result.report["healing"]["curve"]
    assert curve[-1]["divergence"] < curve[0]["divergence"] and "perplexity_after" in result.report["errors"]
    assert load_artifact(tmp_path / "healed").artifact is not None
