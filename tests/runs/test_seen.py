"""What an edit has seen is not held out by a later one, nor forgotten by its manifest."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import modhifi
from modhifi.data.samples import Samples, synthetic_items
from modhifi.errors import ModhifiError
from modhifi.models.load import load_model
from modhifi.models.manifest import read_manifest
from modhifi.runs.inputs import Given, _split, load_data
from modhifi.runs.recipes.tasks import parse


def items(n: int, units: list[int] | None = None) -> Samples:
    samples = synthetic_items(lambda i: torch.full((8,), float(i)), n, "counted", identity=str)
    return replace(samples, synthetic=False, units=None if units is None else tuple(units))


@pytest.mark.parametrize(("amount", "count", "seen"), [(20, 10, 15), (10, 10, 15), (30, 10, 0), (20, 20, 25)])
def test_none_of_those_that_were_seen_is_held_out(amount: int, count: int, seen: int) -> None:
    before = {str(i) for i in range(0, 2 * seen, 2)}
    ours, held = _split(items(60), amount, count, before)
    assert len(ours) == amount and len(held) == count
    assert not set(held.hashes) & (before | set(ours.hashes))
    assert len(before & set(ours.hashes)) == min(seen, amount)
    assert list(map(int, ours.hashes)) == sorted(map(int, ours.hashes))


def test_no_document_that_was_seen_in_part_is_held_out() -> None:
    documents = [i // 5 for i in range(60)]
    ours, held = _split(items(60, documents), 30, 20, {"0", "11"})
    of = {document: {str(i) for i in range(60) if documents[i] == document} for document in range(12)}
    assert not set(held.hashes) & (of[0] | of[2]) and len(held) == 20
    assert not {documents[int(h)] for h in held.hashes} & {documents[int(h)] for h in ours.hashes}


def test_more_is_loaded_where_too_few_are_new() -> None:
    recipe = parse(
        {
            "task": "prune",
            "model": {"name": "x"},
            "budget": {"ratio": 0.5},
            "data": {"samples": 20, "evaluation_samples": 10},
        }
    )
    loaded = load_model(nn.Linear(8, 2), example=torch.randn(2, 8))
    data = torch.randn(100, 8)
    first, held = load_data(recipe, loaded, Given(data=data))
    before = {*first.hashes, *held.hashes}
    again, fresh = load_data(recipe, loaded, Given(data=data), before=before)
    assert len(fresh) == 10 and not set(fresh.hashes) & before
    assert len(again) == 20
    with pytest.raises(ModhifiError, match="every evaluation sample is also a calibration sample"):
        load_data(recipe, loaded, Given(data=data[:30]), before={*before, *load_all(data[:30])})


def load_all(data: torch.Tensor) -> tuple[str, ...]:
    from modhifi.data.in_memory import from_items

    return from_items(data, None, n=1000, seed=0).hashes


def test_a_chain_of_edits_remembers_what_it_has_seen(model_dir: Path, image_dir: Path, tmp_path: Path) -> None:
    few = {"samples": 16, "evaluation_samples": 8, "checks": {"walked": 0}}
    source = f"images:{image_dir}"
    modhifi.prune(str(model_dir), source, ratio=0.3, out=tmp_path / "one", **few)
    modhifi.heal(str(tmp_path / "one"), source, steps=2, only_this_data=True, out=tmp_path / "two", **few)
    modhifi.prune(str(tmp_path / "two"), "synthetic", ratio=0.3, out=tmp_path / "three", **few)
    one, two, three = (read_manifest(tmp_path / name) for name in ("one", "two", "three"))
    assert not set(one.calibration.hashes) & set(two.held_out.hashes)
    assert set(one.calibration.hashes) <= set(two.calibration.hashes) < set(three.calibration.hashes)
    with pytest.raises(ModhifiError, match="calibrated this model"):
        modhifi.verify(str(tmp_path / "three"), source, samples=16, walked=0)


def test_a_chain_loads_its_original_from_anywhere(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = {"samples": 8, "evaluation_samples": 8, "checks": {"walked": 0}}
    monkeypatch.chdir(model_dir.parent)
    modhifi.prune(model_dir.name, ratio=0.3, out=tmp_path / "one", **few)
    modhifi.prune(str(tmp_path / "one"), ratio=0.3, out=tmp_path / "two", **few)
    modhifi.heal(str(tmp_path / "two"), steps=1, out=tmp_path / "three", **few)
    monkeypatch.chdir(tmp_path)
    for name in ("two", "three"):
        assert modhifi.verify(str(tmp_path / name), "synthetic", samples=8, seed=5, walked=0).statistical.n == 8
