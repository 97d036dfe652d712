"""Every registered source gives samples that a tiny model of each kind it serves can read, offline."""

from __future__ import annotations

import sys
import types
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import tiny_text
import torch
from PIL import Image

from modhifi.data import inversion
from modhifi.data.sources import SOURCES, load_samples, metavars
from modhifi.errors import ModhifiError
from modhifi.models.load import load_model
from modhifi.models.loaded import LoadedModel

# What stands behind the colon of each source; a new one needs a row here if it takes an argument.
ARGUMENTS = {"images": ":{images}", "text": ":{text}", "hf": ":org/some", "demo": ":test"}
KINDS = ("image", "text")
DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def models(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, LoadedModel]:
    return {"image": load_model(model_dir), "text": load_model(tiny_text.save(tmp_path_factory.mktemp("llama")))}


@pytest.fixture
def places(image_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Data on disk, a stand-in for ``datasets``, and an inversion of two steps."""
    (tmp_path / "text.txt").write_text(tiny_text.articles(6))
    columns = {"photo": type("Image", (), {})(), "text": types.SimpleNamespace(dtype="string")}
    rows = [
        {"photo": Image.fromarray(np.full((9, 9, 3), 20 * i, np.uint8)), "text": tiny_text.write(i, 96)}
        for i in range(8)
    ]
    module = types.ModuleType("datasets")
    module.load_dataset = lambda name, split: Table(rows, columns)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    monkeypatch.setattr(inversion, "inverted", partial(inversion.inverted, steps=2))
    return {"images": str(image_dir), "text": str(tmp_path / "text.txt")}


class Table(list):  # type: ignore[type-arg]
    """The part of a ``datasets.Dataset`` that modhifi uses."""

    def __init__(self, rows: list[dict[str, object]], features: dict[str, object]) -> None:
        super().__init__(rows)
        self.features = features


@pytest.mark.parametrize(("name", "kind"), [(s.name, kind) for s in SOURCES.values() for kind in KINDS])
def test_a_source_serves_the_kinds_of_model_it_names(
    name: str, kind: str, models: dict[str, LoadedModel], places: dict[str, str]
) -> None:
    loaded, spec = models[kind], name + ARGUMENTS.get(name, "").format(**places)
    if kind not in SOURCES[name].kinds:
        with pytest.raises(ModhifiError):
            load_samples(spec, loaded, n=3, window=16)
        return
    samples = load_samples(spec, loaded, n=3, window=16)
    assert len(samples) == len(set(samples.hashes)) == 3
    expected = loaded.example[0] if kind == "image" else torch.zeros(16, dtype=torch.long)
    for item in (samples.load(i) for i in range(3)):
        assert item.shape == expected.shape and item.dtype == expected.dtype and bool(torch.isfinite(item).all())
    assert loaded.logits(next(samples.batches(3))).isfinite().all()
    assert load_samples(spec, loaded, n=3, window=16).fingerprint() == samples.fingerprint()


@pytest.mark.parametrize("source", SOURCES.values(), ids=lambda s: s.name)
def test_a_source_string_has_the_form_that_its_source_states(source, models: dict[str, LoadedModel]) -> None:
    assert source.metavar.startswith(source.name) and source.metavar in metavars()
    required = source.metavar.startswith(f"{source.name}:")
    assert source.takes("") is not required
    assert source.takes("something") is (source.metavar != source.name)
    if required:
        with pytest.raises(ModhifiError, match=f"unknown data source '{source.name}'; use "):
            load_samples(source.name, models.get(source.kinds[0], models["text"]), n=3)


def test_the_sources_that_serve_a_model_are_named_to_it(models: dict[str, LoadedModel]) -> None:
    with pytest.raises(ModhifiError) as caught:
        load_samples("pictures:x", models["text"], n=3)
    assert "text:PATH" in str(caught.value) and "images:DIR" not in str(caught.value)


def test_the_documentation_names_every_source() -> None:
    page = (DOCS / "own-data.md").read_text()
    assert [s.name for s in SOURCES.values() if f"--data {s.name}" not in page] == []
