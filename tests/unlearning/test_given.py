"""Forgetting and audits with what people give them: models of their own, labels in another order, other references."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from timm.models import save_for_hf
from torch import nn
from unlearn_world import ARGUMENTS, NAMES, world

from modhifi.artifacts.diff import diff_runs
from modhifi.data.labels import label_samples
from modhifi.data.samples import Samples
from modhifi.errors import ModhifiError
from modhifi.models.load import load_model
from modhifi.runs.audit import run_audit
from modhifi.runs.recipes.tasks import AuditRecipe
from modhifi.runs.recipes.unlearn import UnlearnRecipe
from modhifi.runs.unlearn import UnlearnResult, run_unlearn
from modhifi.structure.clone import clone
from modhifi.unlearning.alike import same_but_for_values
from modhifi.unlearning.audit import audit
from modhifi.unlearning.audit_text import conclude, unrecognised, usable_rows
from modhifi.unlearning.data import UnlearnData, load_unlearn_data
from modhifi.unlearning.edit import forget
from modhifi.unlearning.settings import UnlearnSettings
from modhifi.unlearning.sites import find_sites

__all__ = ["world"]
CLASS, CLASSES, SIZE = 2, 4, 16


class Gate(nn.Module):
    """What no state dict holds: an attribute, a buffer that is not persistent, the slope of an activation."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = 1.0
        self.register_buffer("open", torch.ones(6), persistent=False)
        self.slope = nn.LeakyReLU(0.01)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.slope(x * self.factor) * self.open


class Gated(nn.Module):
    """Two layers with a gate between; ``norm`` follows the first."""

    def __init__(self, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(5, 6), norm or nn.Identity()
        self.gate, self.second, self.head = Gate(), nn.Linear(6, 6), nn.Linear(6, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.second(self.gate(self.norm(self.first(x)))).relu())


def vectors(seed: int, n: int = 48) -> Samples:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % CLASSES
    x = torch.randn(n, 5, generator=generator) + 2 * torch.eye(CLASSES, 5)[labels]
    names = tuple(f"{seed} {i}" for i in range(n))
    return Samples(lambda i: x[i], names, labels, names, "vectors", synthetic=False)


def setting(norm: nn.Module | None = None):
    """A model, its sites, and data in three parts."""
    torch.manual_seed(0)
    loaded = load_model(Gated(norm).eval(), example=torch.randn(4, 5))
    edit, fit, test = map(vectors, range(3))
    return loaded, find_sites(loaded), UnlearnData(edit, (edit.labels == CLASS).long(), fit, test, ())


def attributed(model: nn.Module) -> None:
    model.gate.factor = -2.0


def buffered(model: nn.Module) -> None:
    model.gate.open[:4] = 0


def sloped(model: nn.Module) -> None:
    model.gate.slope.negative_slope = 0.9


def hooked(model: nn.Module) -> None:
    model.gate.register_forward_hook(lambda _, args, output: output.flip(1))


@pytest.mark.parametrize("change", [attributed, buffered, sloped, hooked, nn.Module.double])
def test_an_audit_runs_the_edited_model_where_its_state_dict_is_the_originals(change) -> None:
    loaded, sites, data = setting()
    edited = clone(loaded.model)
    assert same_but_for_values(loaded.model, edited)
    change(edited)
    assert not same_but_for_values(loaded.model, edited)
    found = audit(loaded, edited, sites, data, [CLASS], batch_size=SIZE)
    with torch.no_grad():
        truth = torch.cat([loaded.logits(batch, edited) for batch in data.test.batches(SIZE)])
        own = torch.cat([loaded.logits(batch) for batch in data.test.batches(SIZE)])
    assert torch.equal(found.logits[1], truth.float()) and torch.equal(found.logits[0], own)
    right = (truth.argmax(1) == data.test.labels)[data.test.labels == CLASS]
    assert found.figures["rows"]["edited"]["forget"] == float(right.double().mean())


def test_weights_alone_leave_models_alike(world: Path) -> None:
    loaded = load_model(world / "model")
    edited = clone(loaded.model)
    with torch.no_grad():
        for parameter in edited.parameters():
            parameter.mul_(2)
    assert same_but_for_values(loaded.model, edited)
    assert same_but_for_values(loaded.model, load_model(world / "model").model)


def test_a_batchnorm_without_statistics_forgets_by_its_readers_alone() -> None:
    loaded, sites, data = setting(nn.BatchNorm1d(6, track_running_stats=False))
    parts = (loaded, sites, data.edit, data.groups)
    done = forget(*parts, UnlearnSettings(method="erase", only=("first", "head"), batch_size=SIZE), [CLASS])
    assert {record.module for record in done.records} == {"first", "head"}
    done = forget(*parts, UnlearnSettings(only=("first", "second"), batch_size=SIZE), [CLASS])
    assert {record.module for record in done.records} == {"second"}
    assert dict(done.left_out)["first"].startswith("the BatchNorm norm behind first keeps no statistics")


def test_the_sentence_about_writers_names_no_empty_place() -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.head = nn.Linear(5, 6), nn.Linear(5, 6), nn.Linear(6, CLASSES)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head((self.a(x) * self.b(x) + self.b(x) * 2 * self.a(x)).relu())

    loaded, _, data = setting()
    loaded = load_model(Sum().eval(), example=loaded.example)
    with pytest.raises(ModhifiError, match=r"this model has none \(no operator alone writes"):
        forget(loaded, find_sites(loaded), data.edit, data.groups, UnlearnSettings(batch_size=SIZE), [CLASS])


def unlearn(world: Path, *, model: str = "", out: Path | None = None, **changes: object) -> UnlearnResult:
    sources = {"source": f"images:{world / 'train'}", "samples": 480, "evaluate": f"images:{world / 'test'}"}
    recipe = {
        "model": {"name": model or str(world / "model")},
        "forget": ["blue"],
        "data": sources | changes.pop("data", {}),
        "method": {"name": "head-mask"},
        "checks": {"walked": 0},
        "out": None if out is None else str(out),
        "device": "cpu",
    }
    return run_unlearn(UnlearnRecipe.model_validate(recipe | changes))


@pytest.fixture(scope="module")
def rounds(world: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Artefacts without blue, and then without red too."""
    first, second = (tmp_path_factory.mktemp("rounds") / name for name in ("one", "two"))
    unlearn(world, out=first)
    unlearn(world, model=str(first), out=second, forget=["red"], seed=1)
    return first, second


def audited(directory: Path, source: Path, **changes: object) -> dict:
    data = {"source": f"images:{source}", "samples": 240} | changes.pop("data", {})
    return run_audit(AuditRecipe.model_validate({"directory": str(directory), "data": data} | changes))


def test_an_audit_says_which_images_the_edit_saw(world: Path, rounds) -> None:
    report = audited(rounds[0], world / "train")
    total = report["data"]["test_samples"] + report["data"]["fit_samples"]
    said = [warning for warning in report["warnings"] if "calibrated" in warning]
    assert len(said) == 1 and said[0].startswith(f"{total} of the {total} images")
    assert not any("calibrated" in warning for warning in audited(rounds[0], world / "test")["warnings"])


def test_an_audit_of_one_round_leaves_the_rounds_before_out(world: Path, rounds) -> None:
    report = audited(rounds[1], world / "test", forget=["red"])
    found = report["audit"]
    assert found["forgotten"] == ["red"] and found["earlier"] == ["blue"]
    assert any("classes 2 were forgotten before" in warning for warning in report["warnings"])
    assert found["rows"]["edited"]["worst_loss"] < 0.5 and found["rows"]["edited"]["retain"] > 0.7
    assert not any("(blue)" in row["name"] for row in report["before_after"])
    assert audited(rounds[1], world / "test")["audit"]["earlier"] == []


def test_labels_in_another_order_are_warned_of(world: Path, tmp_path: Path) -> None:
    for number, name in enumerate(NAMES):
        for split in ("train", "test"):
            (tmp_path / split).mkdir(exist_ok=True)
            (tmp_path / split / NAMES[(number + 1) % len(NAMES)]).symlink_to(world / split / name)
    warnings = unlearn(
        world, data={s: f"images:{tmp_path / p}" for s, p in (("source", "train"), ("evaluate", "test"))}
    )
    said = [w for w in warnings.report["warnings"] if w.startswith("the original takes only")]
    assert len(said) == 2 and "images of blue for that class: its labels may be in another order" in said[0]
    assert "of the other classes" in said[1]
    assert not any("takes only" in warning for warning in unlearn(world).report["warnings"])


def test_chance_is_not_recognised() -> None:
    def figures(share: float, retained: float) -> dict:
        return {
            "classes": [{"class": "cat", "original": share}],
            "forgotten": ["cat"],
            "rows": {"original": {"retain": retained}},
        }

    assert not unrecognised(figures(0.26, 0.26), 4)
    assert [w[:40] for w in unrecognised(figures(0.25, 0.9), 4)] == ["the original takes only 25.0 % of the im"]
    assert len(unrecognised(figures(0.04, 0.04), 1000)) == 2


def saved(directory: Path, classes: int, size: int = 32) -> str:
    model = timm.create_model("resnet10t", num_classes=classes, **ARGUMENTS).eval()
    model.pretrained_cfg.update(input_size=(3, size, size), num_classes=classes, license="apache-2.0")
    save_for_hf(model, directory, model_args=ARGUMENTS, safe_serialization=True)
    return str(directory)


def test_a_reference_of_other_classes_or_size_is_refused_at_once(world: Path, rounds, tmp_path: Path) -> None:
    fewer, larger = saved(tmp_path / "fewer", len(NAMES) - 1), saved(tmp_path / "larger", len(NAMES), 64)
    for reference, said in ((fewer, "has 4 classes .* the forgotten one among them"), (larger, r"\(3, 64, 64\)")):
        with pytest.raises(ModhifiError, match=said):
            unlearn(world, reference=reference)
        with pytest.raises(ModhifiError, match=said):
            audited(rounds[0], world / "test", reference=reference)


def test_a_reference_that_knows_the_class_does_not_raise_the_verdict(world: Path, rounds) -> None:
    report = audited(rounds[0], world / "test", reference=str(world / "model"))
    assert report["audit"]["verdict"] == "SUPPRESSED" and "retrained" not in report["audit"]["conclusion"]
    assert report["audit"]["rows"]["reference"]["forget"] > 0.5
    assert any(w.startswith("the reference recognises") for w in report["warnings"])
    row = {"forget": 0.0, "retain": 0.9, "recall": 0.0, "probe": 0.6, "neighbours": 0.9}
    rows = {"original": row | {"forget": 0.9, "probe": 0.9}, "edited": row, "head-mask": row}
    rows["reference"] = row | {"probe": 0.7}
    assert conclude(usable_rows(rows, ["cat"])[0], ["cat"])[0] == "ERASED FOR A LINEAR READER"


def test_members_of_other_classes_alone_are_refused_at_once(world: Path, rounds, tmp_path: Path) -> None:
    (tmp_path / "red").symlink_to(world / "train" / "red")
    data = {"members": f"images:{tmp_path}"}
    with pytest.raises(ModhifiError, match="holds no image of blue"):
        unlearn(world, data=data)
    with pytest.raises(ModhifiError, match="holds no image of blue"):
        audited(rounds[0], world / "test", data=data)
    loaded, sites, parts = setting()
    others = parts.edit.subset(torch.nonzero(parts.groups == 0).flatten())
    found = audit(loaded, clone(loaded.model), sites, parts, [CLASS], members=others, batch_size=SIZE)
    assert found.figures["rows"]["edited"]["membership"] is None


def test_the_settings_of_a_report_are_all_of_them(world: Path, rounds) -> None:
    report = unlearn(world, method={"name": "gls", "strength": 0.2, "damping": 1e-2}).report
    method, data = report["settings"]["method"], report["settings"]["data"]
    assert method["name"] == "gls" and method["damping"] == 1e-2 and method["settle"] is True
    assert method["depth"] > 0 and method["passes"] > 0 and method["strength"].startswith("0.2 (")
    assert data["samples"] == 480 and data["source"] == f"images:{world / 'train'}"
    page = (rounds[0] / "report.html").read_text()
    assert f"images:{world / 'test'}" in page and "forget weight" in page
    changed = {entry["name"] for entry in diff_runs(*rounds)["settings"]}
    assert {"model.name", "seed"} <= changed and not any(name.startswith("method") for name in changed)


def test_sentences_about_labels_say_why_and_of_which_images(world: Path) -> None:
    loaded = load_model(world / "model")
    labelled = load_unlearn_data(loaded, [CLASS], source=f"images:{world / 'train'}", samples=480)
    unlabelled = replace(
        labelled.edit, labels=None, description="mine; labels unused: class index 5 of a model of 5 classes"
    )
    remark = label_samples(loaded, unlabelled, 64)[1]
    assert remark.startswith("labels unused: class index 5 of a model of 5 classes: ") and "accuracy on them" in remark
    data = load_unlearn_data(
        loaded,
        [CLASS],
        source=replace(unlabelled, description="mine"),
        samples=240,
        evaluate=f"images:{world / 'test'}",
    )
    assert len(data.notes) == 1 and data.notes[0].startswith("python:Samples: no labels: ")


def test_images_to_evaluate_on_that_the_edit_sees_are_said_to_be_the_reason(world: Path, tmp_path: Path) -> None:
    loaded, source = load_model(world / "model"), f"images:{world / 'train'}"
    with pytest.raises(ModhifiError, match="all 480 images to evaluate on are also among those that the edit sees"):
        load_unlearn_data(loaded, [CLASS], source=source, samples=480, evaluate=source)
    with pytest.raises(ModhifiError, match=r"for the attacks part.* \(4\d\d to evaluate on were left out"):
        load_unlearn_data(loaded, [CLASS], source=source, samples=440, evaluate=source)
