"""Forgetting a class end to end, on a tiny ResNet of coloured noise."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import timm
import torch
from typer.testing import CliRunner, Result
from unlearn_world import NAMES, world

from cli.main import app
from modhifi.bounds.ladder import verify_unlearned
from modhifi.calibration.prefix_cache import Passes
from modhifi.data.labels import populations
from modhifi.data.sources import load_samples
from modhifi.errors import ModhifiError
from modhifi.models.load import load_model
from modhifi.runs.audit import run_audit
from modhifi.runs.inputs import forgotten_before
from modhifi.runs.recipes.files import read_yaml
from modhifi.runs.recipes.tasks import AuditRecipe
from modhifi.runs.recipes.unlearn import UnlearnRecipe
from modhifi.runs.unlearn import run_unlearn
from modhifi.structure.operators import columns_of
from modhifi.unlearning import reader_edits
from modhifi.unlearning.batchnorm import recall
from modhifi.unlearning.data import find_classes, load_unlearn_data
from modhifi.unlearning.edit import blend, fit_strength, forget
from modhifi.unlearning.methods import METHODS
from modhifi.unlearning.moments import joint_moments
from modhifi.unlearning.settings import UnlearnSettings
from modhifi.unlearning.sites import find_sites
from modhifi.unlearning.wide import spanned_moments

__all__ = ["world"]
CLASS = 2


@pytest.fixture(scope="module")
def setting(world: Path):
    loaded = load_model(world / "model")
    train = load_samples(f"images:{world / 'train'}", loaded, n=480)
    test = load_samples(f"images:{world / 'test'}", loaded, n=480)
    return loaded, find_sites(loaded), train, test


def accuracies(loaded, model, test, index=CLASS):
    with torch.no_grad():
        predicted = torch.cat([loaded.logits(b, model) for b in test.batches(240)]).argmax(1)
    gone = test.labels == index
    right = (predicted == test.labels).double()
    return float(right[gone].mean()), float(right[~gone].mean())


@pytest.mark.parametrize("method", METHODS)
def test_every_method_forgets_the_class_and_keeps_the_shapes(setting, method: str) -> None:
    loaded, sites, train, test = setting
    before = accuracies(loaded, loaded.model, test)
    assert before[0] > 0.7 and before[1] > 0.7
    result = forget(loaded, sites, train, populations(train, [CLASS]), UnlearnSettings(method=method), [CLASS])
    assert {k: v.shape for k, v in result.model.state_dict().items()} == {
        k: v.shape for k, v in loaded.model.state_dict().items()
    }
    assert result.records and all(r.change > 0 for r in result.records) and not result.left_out
    own = METHODS[method].defaults(sites.straight)
    assert result.values == own and own.depth > 0 and own.passes > 0 and own.strength > 0 and own.unit
    after = accuracies(loaded, result.model, test)
    assert after[0] < 0.75 * before[0] and before[0] - after[0] > before[1] - after[1]
    if method in ("erase-writers", "erase", "head-mask"):
        assert after[0] <= 0.05 and after[1] >= before[1] - 0.02


def test_an_unknown_method_is_named_with_the_nearest(setting) -> None:
    loaded, sites, train, _ = setting
    with pytest.raises(ModhifiError, match="unknown unlearning method 'erase-writer'; did you mean 'erase-writers'"):
        forget(loaded, sites, train, populations(train, [CLASS]), UnlearnSettings(method="erase-writer"), [CLASS])


def test_the_documentation_names_every_method() -> None:
    page = (Path(__file__).parents[2] / "docs" / "unlearning.md").read_text()
    assert [name for name in METHODS if f"**{name}**" not in page] == []


def test_operators_with_too_many_columns_are_left_out(setting, monkeypatch) -> None:
    loaded, sites, train, _ = setting
    groups, settings = populations(train, [CLASS]), UnlearnSettings(method="gls")
    monkeypatch.setattr(reader_edits, "MOST_COLUMNS", 100)
    found = forget(loaded, sites, train, groups, settings, [CLASS])
    widths = [columns_of(loaded.model.get_submodule(r.module))[1] for r in found.records]
    assert widths and max(widths) <= 100
    assert found.left_out and all("columns are too many" in reason for _, reason in found.left_out)
    monkeypatch.setattr(reader_edits, "MOST_COLUMNS", 1)
    with pytest.raises(ModhifiError, match=r"cannot be edited: its \d+ input columns"):
        forget(loaded, sites, train, groups, settings, [CLASS])


def test_writers_of_too_many_columns_forget_too(setting, monkeypatch) -> None:
    loaded, _, train, test = setting
    for module in ("sites", "wide"):
        monkeypatch.setattr(sys.modules[f"modhifi.unlearning.{module}"], "MOST_COLUMNS", 150)
    sites = find_sites(loaded)
    assert any(w.wide for w in sites.writers)
    before = accuracies(loaded, loaded.model, test)
    found = forget(loaded, sites, train, populations(train, [CLASS]), UnlearnSettings(), [CLASS])
    after = accuracies(loaded, found.model, test)
    assert after[0] <= 0.05 and after[1] >= before[1] - 0.05
    assert {r.module for r in found.records} & {w.site.module for w in sites.writers if w.wide}


@pytest.mark.parametrize("wide", [False, True])
def test_the_means_of_retained_classes_are_those_of_their_samples(setting, monkeypatch, wide: bool) -> None:
    loaded, sites, train, _ = setting
    groups, writer = populations(train, [CLASS]), sites.writers[-1]
    runs = Passes(loaded, loaded.model, train, 100, [writer.site.module])
    if wide:
        joint = spanned_moments(runs, groups, train.labels, writer, None).joint
    else:
        monkeypatch.setattr(sys.modules[joint_moments.__module__], "ROWS_PER_COLUMN", 10**6)
        joint = joint_moments(runs, groups, train.labels, writer, None)
    kept = [c for c in train.labels.unique().tolist() if c != CLASS]
    assert torch.allclose(joint.shares, torch.stack([(train.labels[groups == 0] == c).double().mean() for c in kept]))
    mean = (joint.class_means * joint.shares[:, None]).sum(0)
    assert torch.allclose(mean, joint.moments[0].mean[0], atol=1e-4)
    own = torch.where(train.labels == kept[0], 0, -1)
    alone = joint_moments(runs, own, train.labels, writer, None).moments[0].mean[0]
    streamed = len(writer.rows[0])
    assert torch.allclose(joint.class_means[0][-streamed:], alone[-streamed:], atol=1e-4)


def test_the_class_means_of_a_stream_approach_each_other(setting) -> None:
    loaded, sites, train, _ = setting
    groups = populations(train, [CLASS])
    settings = UnlearnSettings(depth=1, passes=4, settle=False)
    found = forget(loaded, sites, train, groups, settings, [CLASS])
    writer = sites.writers[-1]

    def gap(model: torch.nn.Module) -> float:
        retain, gone = joint_moments(Passes(loaded, model, train, 96), groups, train.labels, writer, None).moments
        return float((gone.mean[0] - retain.mean[0])[-16:].norm())

    assert gap(found.model) < 0.3 * gap(loaded.model)


def test_settled_norms_compute_the_same_and_find_themselves_on_retained_images(setting) -> None:
    loaded, sites, train, test = setting
    groups = populations(train, [CLASS])
    found = forget(loaded, sites, train, groups, UnlearnSettings(batch_size=96), [CLASS])
    batch = next(test.batches(64))
    with torch.no_grad():
        ours, plain = loaded.logits(batch, found.model), loaded.logits(batch, found.plain)
    assert torch.allclose(ours, plain, atol=1e-3)
    retained = train.subset(torch.nonzero(groups == 0).flatten())
    again = recall(loaded, found.model, retained, 384)
    assert again is not None
    assert accuracies(loaded, again, test)[0] <= 0.05


def test_two_classes_at_once(setting) -> None:
    loaded, sites, train, test = setting
    found = forget(loaded, sites, train, populations(train, [1, 3]), UnlearnSettings(), [1, 3])
    assert accuracies(loaded, found.model, test, 1)[0] <= 0.1
    assert accuracies(loaded, found.model, test, 3)[0] <= 0.1
    kept = (test.labels != 1) & (test.labels != 3)
    with torch.no_grad():
        predicted = torch.cat([loaded.logits(b, found.model) for b in test.batches(240)]).argmax(1)
    assert float((predicted == test.labels)[kept].double().mean()) > 0.7


def test_blend_goes_all_the_way(setting) -> None:
    loaded, sites, train, _ = setting
    found = forget(loaded, sites, train, populations(train, [CLASS]), UnlearnSettings(passes=1, depth=1), [CLASS])
    for strength, target in ((0.0, loaded.model), (1.0, found.model)):
        mixed = blend(loaded.model, found.model, strength).state_dict()
        assert all(torch.allclose(v, mixed[k], atol=1e-6) for k, v in target.state_dict().items())


def test_bisection_finds_the_largest_strength_within_the_budget() -> None:
    strength, loss = fit_strength(lambda s: s * s, 0.25, steps=12)
    assert strength == pytest.approx(0.5, abs=1e-3) and loss <= 0.25
    assert fit_strength(lambda s: s, 1.0) == (1.0, 1.0)
    assert fit_strength(lambda s: float(s > 0), 0.5)[0] < 0.02


def test_classes_by_name_and_index(setting) -> None:
    loaded = setting[0]
    assert find_classes(["blue,1", "Red"], loaded) == (2, 1, 0)
    with pytest.raises(ModhifiError, match="did you mean 'yellow'"):
        find_classes(["yelow"], loaded)
    with pytest.raises(ModhifiError, match="classes 0 to 4"):
        find_classes(["5"], loaded)
    with pytest.raises(ModhifiError, match="leave at least two"):
        find_classes([",".join(NAMES)], loaded)


def test_parts_are_disjoint_and_too_few_samples_are_named(setting, world: Path) -> None:
    loaded = setting[0]
    data = load_unlearn_data(loaded, [CLASS], source=f"images:{world / 'train'}", samples=240)
    parts = [set(part.hashes) for part in (data.edit, data.fit, data.test)]
    assert all(parts) and not (parts[0] & parts[1] or parts[0] & parts[2] or parts[1] & parts[2])
    with pytest.raises(ModhifiError, match="at least 16 are needed"):
        load_unlearn_data(loaded, [CLASS], source=f"images:{world / 'train'}", samples=30)


def test_forget_data_of_its_own_replaces_what_the_retain_data_holds(setting, world: Path) -> None:
    loaded = setting[0]
    data = load_unlearn_data(
        loaded,
        [CLASS],
        source=f"images:{world / 'train'}",
        samples=480,
        forget_source=f"images:{world / 'test' / 'blue'}",
        evaluate=None,
    )
    assert any("were left out" in note for note in data.notes)
    blue = {name for name, label in zip(data.edit.names, data.edit.labels.tolist(), strict=True) if label == CLASS}
    assert blue and all("/" not in name for name in blue)
    # A folder of every class gives only what is to be forgotten, and takes nothing else from the retain data.
    both = load_unlearn_data(
        loaded, [CLASS], source=f"images:{world / 'train'}", samples=480, forget_source=f"images:{world / 'train'}"
    )
    kept = both.edit.labels[both.groups == 0]
    assert set(kept.tolist()) == {c for c in range(len(NAMES)) if c != CLASS}


def test_unlabelled_images_are_labelled_by_the_model(setting, world: Path, tmp_path: Path) -> None:
    loaded = setting[0]
    flat = tmp_path / "flat"
    flat.mkdir()
    for path in sorted((world / "train").glob("*/*.png")):
        (flat / f"{path.parent.name}{path.name}").write_bytes(path.read_bytes())
    data = load_unlearn_data(loaded, [CLASS], source=f"images:{flat}", samples=240)
    assert any("labelled by the model itself" in note for note in data.notes)


def unlearn(world: Path, out: Path | None, model: Path | None = None, forget: str = "blue", **method: object):
    recipe = {
        "model": {"name": str(model or world / "model")},
        "forget": [forget],
        "data": {"source": f"images:{world / 'train'}", "samples": 480, "evaluate": f"images:{world / 'test'}"},
        "method": method,
        "checks": {"walked": 0},
        "out": None if out is None else str(out),
        "device": "cpu",
    }
    return run_unlearn(UnlearnRecipe.model_validate(recipe))


def by_command(world: Path, out: Path) -> Result:
    command = ["unlearn", str(world / "model"), "--forget", "blue", "--data", f"images:{world / 'train'}"]
    more = ["--samples", "480", "--evaluate", f"images:{world / 'test'}", "--out", str(out), "--device", "cpu"]
    return CliRunner().invoke(app, [*command, *more, "--quiet", "--json"])


@pytest.fixture(scope="module")
def artefact(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("artefact") / "without-blue"
    done = by_command(world, out)
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["title"] == json.loads((out / "report.json").read_text())["title"]
    return out


def test_the_artefact_loads_with_stock_timm(world: Path, artefact: Path) -> None:
    loaded = load_model(world / "model")
    stock = timm.create_model(f"local-dir:{artefact}", pretrained=True).eval()
    ours = load_model(artefact)
    with torch.no_grad():
        assert torch.allclose(stock(loaded.example), ours.model(loaded.example), atol=1e-6)
    assert forgotten_before(ours) == [CLASS]
    assert UnlearnRecipe.model_validate(read_yaml(artefact / "recipe.yaml")).forget == ["blue"]
    page = (artefact / "report.html").read_text()
    assert "Attacks, model by model" in page and "no proof of data deletion" in page


def test_a_second_round_keeps_the_first(world: Path, artefact: Path) -> None:
    report = unlearn(world, None, artefact, "red").report
    after = {c["class"]: c["edited"] for c in report["audit"]["classes"]}
    assert after["red"] <= 0.1 and after["blue"] <= 0.1 and after["green"] > 0.7
    assert any("forgotten before" in warning for warning in report["warnings"])


def test_a_retain_budget_weakens_an_edit_that_costs_too_much(world: Path) -> None:
    report = unlearn(world, None, name="gls", strength=10.0, retain_budget=0.02).report
    assert 0 < report["strength"]["of_the_full_edit"] < 1.0
    assert report["strength"]["retain_loss_on_held_out"] <= 0.02
    rows = report["audit"]["rows"]
    assert rows["edited"]["retain"] > rows["original"]["retain"] - 0.1


def test_verify_bounds_the_retained_classes_and_counts_the_forgotten(world: Path, artefact: Path) -> None:
    arguments = ["verify", str(artefact), "--against", str(world / "model"), "--data", f"images:{world / 'test'}"]
    done = CliRunner().invoke(app, [*arguments, "--samples", "80", "--walked", "1", "--quiet", "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    verdicts = {v["name"]: v["verdict"] for v in found["verdicts"]}
    assert verdicts["forgotten classes no longer predicted"] == "INFORMATIVE" and verdicts["self-test"] == "HOLDS"
    gone = found["bounds"]["forgetting"]["edited"]
    assert gone["n"] + found["bounds"]["statistical"]["n"] == 80 and gone["lower"] > 0.5
    loaded, edited = load_model(world / "model"), load_model(artefact).model
    held = load_samples(f"images:{world / 'test'}", loaded, n=40)
    for kind, chosen in (("retained", held.labels == CLASS), ("forgotten", held.labels != CLASS)):
        with pytest.raises(ModhifiError, match=f"no held-out image of the {kind} classes"):
            verify_unlearned(loaded, edited, edited, held.subset(chosen.nonzero().flatten()), [CLASS])


def test_audit_alone_agrees_with_the_run(world: Path, artefact: Path) -> None:
    data = {"source": f"images:{world / 'test'}", "samples": 240}
    report = run_audit(AuditRecipe(directory=str(artefact), data=data, reference=str(world / "model")))
    rows = report["audit"]["rows"]
    assert report["audit"]["forgotten"] == ["blue"]
    assert rows["edited"]["forget"] <= 0.05 and rows["reference"]["forget"] == rows["original"]["forget"]
    assert rows["edited"]["recall_plain"] is None


def test_command_line(world: Path, artefact: Path, tmp_path: Path) -> None:
    report = json.loads((artefact / "report.json").read_text())
    assert report["audit"]["rows"]["edited"]["forget"] <= 0.1
    verdicts = {v["name"]: v["verdict"] for v in report["verdicts"]}
    assert verdicts["self-test"] == "HOLDS" and verdicts["forgotten classes no longer predicted"] == "INFORMATIVE"
    gone = report["bounds"]["forgetting"]
    assert gone["original"]["upper"] < gone["edited"]["lower"] <= gone["edited"]["measured"]
    again = by_command(world, artefact)
    assert again.exit_code == 2 and "--force" in again.output
    page = tmp_path / "audit.html"
    more = ["--data", f"images:{world / 'test'}", "--samples", "240", "--out", str(page), "--quiet"]
    audited = CliRunner().invoke(app, ["audit", str(artefact), *more])
    assert audited.exit_code == 0, audited.output
    assert "a linear probe finds" in audited.stdout and page.is_file()


def test_the_screen_names_verdicts_and_the_retained_class_that_lost_most(capsys: pytest.CaptureFixture[str]) -> None:
    """Wherever its table stands: the layers that spend the error come behind it."""
    from modhifi.cli.screens import show_audit

    classes = [["cat", 0.9, 0.1], ["dog", 0.8, 0.7], ["frog", 0.9, 0.9]]
    report = {
        "title": "run",
        "warnings": [],
        "audit": {"forgotten": ["cat"], "moved": []},
        "tables": [
            {"title": "Attacks, model by model", "columns": ["", "original", "edited"], "rows": [["probe", 0.5, None]]},
            {"title": "Accuracy by class", "columns": ["class", "original", "edited"], "rows": classes},
            {"title": "Which layers spend the error", "columns": ["layer", "own error"], "rows": [["conv", 8.7, 0.4]]},
        ],
        "verdicts": [
            {"name": "audit", "verdict": "SUPPRESSED", "text": "the features hold it"},
            {"name": "R4 measured", "verdict": "INFORMATIVE", "text": "0.5"},
        ],
        "outcome": {"tone": "good", "text": "At most 1 % are still recognised.", "advice": []},
    }
    show_audit(report, None)
    shown = capsys.readouterr().out
    assert "worst retained class: dog, 80.0 % before, 70.0 % after" in shown
    assert "At most 1 % are still recognised." in shown and "SUPPRESSED (audit): the features hold it" in shown
    assert "R4" not in shown and "not measured" in shown


def test_the_screen_of_an_unlearning_is_a_table_before_and_after_a_sentence_and_a_verdict(
    capsys: pytest.CaptureFixture[str],
) -> None:
    from modhifi.cli.screens import show_report

    report = {
        "title": "run",
        "task": "unlearn",
        "warnings": [],
        "before_after": [{"name": "accuracy on forgotten classes", "before": 0.9, "after": 0.0, "unit": "%"}],
        "audit": {"forgotten": ["cat"], "moved": [{"class": "cat", "to": {"dog": 0.7}}]},
        "verdicts": [{"name": "forgetting", "verdict": "SUPPRESSED", "text": "The features hold it. Output: nothing."}],
        "outcome": {"tone": "good", "text": "At most 1 % are still recognised.", "advice": []},
    }
    show_report(report, None)
    shown = capsys.readouterr().out
    assert "accuracy on forgotten classes" in shown and "−90.00 points" in shown
    assert "images of cat are now called: dog 70 %" in shown and "head-mask" not in shown
    assert "SUPPRESSED (forgetting): The features hold it.\n" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--forget", "blu"], "did you mean 'blue'"),
        (["--forget", "0,1,2,3,4"], "leave at least two"),
        (["--forget", "blue", "--set", "method.nam=erase"], "did you mean 'name'"),
        (["--forget", "blue", "--forget-data", "images:/nonexistent"], "no directory"),
        ([], "--forget is missing"),
    ],
)
def test_bad_usage_is_one_line(world: Path, arguments: list[str], message: str) -> None:
    done = CliRunner().invoke(
        app, ["unlearn", str(world / "model"), "--data", f"images:{world / 'train'}", "--samples", "60", *arguments]
    )
    assert done.exit_code == 2
    assert message in done.output and "Traceback" not in done.output
