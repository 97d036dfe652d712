"""Whatever manifests, recipes, options and images hold: no traceback, and the exit codes of the documentation."""

from __future__ import annotations

import io
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fuzzing
import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from PIL import Image

import modhifi
from modhifi.data.images import from_directory
from modhifi.errors import ModhifiError
from modhifi.models.load import load_model
from modhifi.models.loaded import LoadedModel

FEW = {"manifests": 40, "recipes": 150, "options": 60, "images": 60}
MANY = 1000
SECTIONS: dict[str, Callable[[Path, st.DataObject], object]] = {}
counts = pytest.mark.parametrize(
    "many", [pytest.param(False, id="few"), pytest.param(True, id="many", marks=pytest.mark.slow)]
)


@pytest.fixture(scope="module")
def world(model_dir: Path, image_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A directory to work in, with a small model, an artefact of it, and images."""
    root = tmp_path_factory.mktemp("fuzz")
    shutil.copytree(model_dir, root / "model")
    shutil.copytree(image_dir, root / "images")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setenv("HF_HUB_OFFLINE", "1")
        given = {"samples": 16, "evaluation_samples": 4, "checks": {"walked": 0}}
        modhifi.prune("model", "images:images", ratio=0.3, out="artefact", **given)
        yield root


def section(function: Callable[[Path, st.DataObject], object]) -> Callable[[Path, st.DataObject], object]:
    SECTIONS[function.__name__] = function
    return function


def content_of(path: Path) -> Any:
    return json.loads(path.read_text())


@section
def manifests(world: Path, data: st.DataObject) -> int:
    """One file of an artefact is changed; it is checked, verified or compared."""
    index = {"metadata": {}, "weight_map": {"fc.bias": "model.safetensors"}}
    names = ["modhifi.json"] * 4 + ["report.json", "config.json", "model.safetensors.index.json"]
    name = data.draw(st.sampled_from(names))
    source = world / "artefact"
    content = content_of(source / name) if (source / name).exists() else index
    text = fuzzing.written(content)
    text = data.draw(fuzzing.changed(content).map(fuzzing.written) | fuzzing.damaged(text))
    copy = world / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(source, copy)
    (copy / name).write_bytes(text)
    verbs: list[list[object]] = [["verify", copy, "--data", "images:nowhere"], ["check", copy], ["diff", copy, source]]
    return fuzzing.outcome(*verbs[2 if name == "report.json" else data.draw(st.sampled_from([0, 0, 1, 2]))])


PRUNE = {
    "task": "prune",
    "model": {"name": "model", "revision": None, "args": {}, "weights": None},
    "data": {"source": "images:nowhere", "samples": 8, "evaluate": "images:nowhere", "evaluation_samples": 4},
    "budget": {"flops": "0.5x"},
    "method": {"selector": "obs", "compensate": "lstsq", "only": ["layer1*"], "exclude": []},
    "checks": {"max_flip": 0.5, "confidence": 0.95, "walked": 0},
    "seed": 0,
    "out": "out",
    "export": ["onnx"],
    "summary": "summary.md",
}
UNLEARN = {"task": "unlearn", "model": {"name": "model"}, "data": {"source": "images:nowhere"}, "forget": ["a"]}
VERIFY = {"task": "verify", "directory": "artefact", "data": {"source": "images:nowhere"}, "checks": {"max_error": 0.1}}
AUDIT = {"task": "audit", "directory": "artefact", "data": {"source": "images:nowhere"}}
STEPS = {
    "steps": {"one": PRUNE, "two": {**VERIFY, "directory": "{one}"}},
    "sweep": {"steps.one.budget.flops": ["0.5x"]},
}
RECIPES = [PRUNE, UNLEARN, VERIFY, AUDIT, STEPS]


@section
def recipes(world: Path, data: st.DataObject) -> int:
    """A recipe is changed; it is validated or run, on data that is not there."""
    content = data.draw(st.sampled_from(RECIPES))
    plain = yaml.safe_dump(content).encode()
    text = data.draw(fuzzing.changed(content).map(fuzzing.written) | fuzzing.damaged(plain))
    path = world / "recipe.yaml"
    path.write_bytes(text)
    shutil.rmtree(world / "out", ignore_errors=True)
    return fuzzing.outcome("recipe", *data.draw(st.sampled_from([["validate", path], ["run", path, "--quiet"]])))


VERBS = [
    ["prune", "model", "--data", "images:nowhere"],
    ["prune", "model", "--data", "images:nowhere", "--ratio", "0.5", "--out", "out"],
    ["unlearn", "model", "--data", "images:nowhere", "--forget", "a", "--out", "out"],
    ["verify", "artefact", "--data", "images:nowhere"],
    ["audit", "artefact", "--data", "images:nowhere"],
    ["score", "model", "--data", "images:nowhere"],
    ["check", "nowhere"],
    ["diff", "artefact", "artefact"],
    ["data", "make", "model", "--out", "out", "--kind", "images:nowhere"],
    ["recipe", "validate", "recipe.yaml"],
    ["recipe", "ls"],
    ["env"],
]


@section
def options(world: Path, data: st.DataObject) -> int:
    """A verb gets options with values of any kind; no data is there."""
    shutil.rmtree(world / "out", ignore_errors=True)
    return fuzzing.outcome(*data.draw(fuzzing.command_lines(VERBS)))


def encoded() -> dict[str, bytes]:
    """One small picture in each format and several modes."""
    pixels = np.random.default_rng(0).integers(0, 256, (12, 10, 4), dtype=np.uint8)
    files = {}
    for ending, kind, mode in (
        *(("png", "PNG", mode) for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")),
        *(("jpg", "JPEG", mode) for mode in ("L", "RGB", "CMYK")),
        *(
            (ending, kind, "RGB")
            for ending, kind in (("gif", "GIF"), ("webp", "WEBP"), ("tif", "TIFF"), ("bmp", "BMP"))
        ),
        ("ppm", "PPM", "RGB"),
    ):
        image = Image.fromarray(pixels).convert("RGB").convert("L" if mode == "I;16" else mode)
        buffer = io.BytesIO()
        image.convert(mode).save(buffer, kind)
        files[f"{mode.replace(';', '')}.{ending}"] = buffer.getvalue()
    return files


ENCODED = encoded()
LOADED: list[LoadedModel] = []


@section
def images(world: Path, data: st.DataObject) -> str:
    """A folder holds damaged pictures, in folders of any name, beside one that is whole."""
    directory = world / "pictures"
    shutil.rmtree(directory, ignore_errors=True)
    folder = data.draw(st.sampled_from(["", "a", "0", "-1", "99999999999999999999", "²", "n01440764", "[x]", "\udcff"]))
    (directory / folder).mkdir(parents=True)
    for i, name in enumerate(data.draw(st.lists(st.sampled_from(sorted(ENCODED)), min_size=1, max_size=3))):
        (directory / folder / f"{i}{name}").write_bytes(data.draw(fuzzing.damaged(ENCODED[name])))
    if data.draw(st.booleans()):
        (directory / folder / "whole.png").write_bytes(ENCODED["RGB.png"])
    LOADED[:] = LOADED or [load_model("model")]
    try:
        samples = from_directory(directory, LOADED[0], 4, 0)
    except ModhifiError as error:
        assert "\n" not in str(error)
        return "refused"
    (batch,) = samples.batches(4)
    assert batch.shape[1:] == (3, 32, 32) and bool(batch.isfinite().all())
    return "some skipped" if samples.skipped else "read"


@counts
@pytest.mark.parametrize("name", ["manifests", "recipes", "options", "images"])
def test_no_input_ends_in_a_traceback(name: str, many: bool, world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outcomes: Counter[object] = Counter()

    @settings(
        max_examples=MANY if many else FEW[name],
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate] if many else [Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def one(data: st.DataObject) -> None:
        outcomes[SECTIONS[name](world, data)] += 1

    one()
    with capsys.disabled():
        if many:
            print(f"\n{name}: {sum(outcomes.values())} inputs, {dict(outcomes)}")
