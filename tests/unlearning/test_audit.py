"""What an audit runs, and the words that are made of its figures."""

from __future__ import annotations

import math

import pytest
import torch
from counting import counted
from torch import nn
from unlearn_world import world

from modhifi.bounds.ladder import verify_unlearned
from modhifi.calibration.prefix_cache import Passes
from modhifi.data.samples import Samples
from modhifi.data.sources import load_samples
from modhifi.models.load import load_model
from modhifi.unlearning.audit import audit
from modhifi.unlearning.audit_text import conclude
from modhifi.unlearning.data import UnlearnData
from modhifi.unlearning.edit import forget
from modhifi.unlearning.observe import observe, observe_passes
from modhifi.unlearning.settings import UnlearnSettings
from modhifi.unlearning.sites import find_sites

__all__ = ["world"]
CLASS, SIZE = 2, 40


def row(**values: float) -> dict[str, float | None]:
    return {"forget": 0.9, "retain": 0.9, "recall": 0.9, "probe": 0.9, "neighbours": 0.9, "recall_plain": None} | values


@pytest.mark.parametrize(
    ("edited", "reference", "verdict"),
    [
        (row(), None, "NOT FORGOTTEN"),
        (row(forget=0.0, recall=0.0), None, "SUPPRESSED"),
        (row(forget=0.0, recall=0.5, probe=0.1), None, "PARTLY ERASED"),
        (row(forget=0.0, recall=0.0, probe=0.5), None, "PARTLY ERASED"),
        (row(forget=0.0, recall=0.0, probe=0.2), None, "ERASED FOR A LINEAR READER"),
        (row(forget=0.0, recall=0.0, probe=0.5), row(probe=0.6), "ERASED FOR A LINEAR READER"),
        (row(forget=0.0, recall=0.0, probe=0.2, nearest_mean=0.8), None, "PARTLY ERASED"),
        (row(forget=0.0, recall=0.0, probe=0.2, nearest_mean=0.2), None, "ERASED FOR A LINEAR READER"),
        (row(forget=0.0, recall=0.0, probe=0.5, nearest_mean=0.8), row(nearest_mean=0.6), "PARTLY ERASED"),
    ],
)
def test_the_verdict_follows_the_figures(edited, reference, verdict: str) -> None:
    rows = {"original": row(nearest_mean=0.9), "edited": edited, "head-mask": row(forget=0.0)}
    if reference is not None:
        rows["reference"] = reference
    found, text = conclude(rows, ["cat"])
    assert found == verdict
    assert "no proof of data deletion" in text and "cat" in text
    first = text.partition(". ")[0]
    assert f"{100 * edited['probe']:.1f} %" in first and "90.0 % before" in first


@pytest.fixture(scope="module")
def edited(world):
    """A model, its sites, data in three parts, and the model without a class."""
    loaded = load_model(world / "model")
    sites, samples = find_sites(loaded), load_samples(f"images:{world / 'train'}", loaded, n=240)
    edit, fit, test = (samples.subset(range(start, 240, 3)) for start in range(3))
    data = UnlearnData(edit, (edit.labels == CLASS).long(), fit, test, ())
    settings = UnlearnSettings(method="erase-writers", batch_size=SIZE, depth=1, passes=1)
    return loaded, sites, data, forget(loaded, sites, edit, data.groups, settings, [CLASS])


def batches(samples: Samples, chosen: torch.Tensor | None = None) -> int:
    return math.ceil((len(samples) if chosen is None else int(chosen.sum())) / SIZE)


def test_what_models_have_in_common_runs_once(edited) -> None:
    """The stem runs once for every batch that is observed, and in every re-estimation of other norms."""
    loaded, sites, data, edit = edited
    with counted(nn.Conv2d) as convolutions:
        audit(loaded, edit.model, sites, data, [CLASS], plain=edit.plain, batch_size=SIZE)
    stem = next(name for name, m in loaded.model.named_modules() if isinstance(m, nn.Conv2d))
    width = loaded.model.get_submodule(stem).weight.shape
    runs = sum(n for module, n in convolutions.items() if module.weight.shape == width and module.in_channels == 3)
    observing, settling, watched = batches(data.fit) + batches(data.test), batches(data.edit, data.groups == 0), 2
    retained, forgotten = batches(data.fit, data.fit.labels != CLASS), batches(data.test, data.test.labels == CLASS)
    assert runs == observing + settling + watched + 5 * (retained + forgotten)


def test_a_copy_gives_what_its_own_passes_give(edited) -> None:
    """Streams, features and logits, where what comes before the edit is known, of some batches too."""
    loaded, sites, data, edit = edited
    changed = [record.module for record in edit.records]
    own = observe(loaded, edit.plain, sites, data.test, SIZE)
    for most in (2**30, 1):
        runs = Passes(loaded, loaded.model, data.test, SIZE, changed, most_bytes=most)
        before = observe_passes(runs, sites)
        shared = observe_passes(runs.of(edit.plain), sites, before)
        assert torch.equal(own.logits, shared.logits) and torch.equal(own.features, shared.features)
        assert not torch.equal(own.logits, before.logits) and own.streams.keys() == shared.streams.keys()
        assert all(torch.equal(stream, shared.streams[block]) for block, stream in own.streams.items())


def test_known_outputs_are_not_computed_again_for_the_bounds(edited) -> None:
    loaded, sites, data, edit = edited
    logits = tuple(observe(loaded, model, sites, data.test, SIZE).logits for model in (loaded.model, edit.model))

    def bounds(known):
        with counted(nn.Linear) as runs:
            report = verify_unlearned(
                loaded, edit.model, None, data.test, [CLASS], walked=0, batch_size=SIZE, logits=known
            )
        return report, sum(runs.values())

    (usual, all_runs), (report, few_runs) = bounds(None), bounds(logits)
    retained, forgotten = batches(data.test, data.test.labels != CLASS), batches(data.test, data.test.labels == CLASS)
    assert all_runs - few_runs == 2 * (retained + forgotten)
    assert report.forgetting == usual.forgetting and report.statistical.flips == usual.statistical.flips
    known = {rung.name: rung.value for rung in usual.rungs if rung.value is not None}
    assert known and {r.name: r.value for r in report.rungs if r.value is not None} == pytest.approx(known, rel=1e-5)
