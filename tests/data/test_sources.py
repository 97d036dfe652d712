"""Samples from folders, datasets and the generator; a tiny deterministic classifier stands for the model."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from modhifi.data import images, procedural, synthetic
from modhifi.data.contact_sheet import contact_sheet, materialise, picture
from modhifi.data.image_inputs import class_count, normalisation
from modhifi.data.samples import Samples, warn_degenerate
from modhifi.data.sources import load_samples
from modhifi.data.synthetic import balance
from modhifi.errors import ModhifiError
from modhifi.models.loaded import LoadedModel

MEAN, STD = torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1), torch.tensor([0.2, 0.25, 0.5]).view(3, 1, 1)


class Brightness(nn.Module):
    """Classifies an image by its mean brightness into equal bins, most of them rare."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.centres = nn.Parameter(torch.linspace(-1.5, 1.5, classes), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return -((x.flatten(1).mean(dim=1, keepdim=True) - self.centres) ** 2)


def transform(image: Image.Image) -> Tensor:
    pixels = np.asarray(image.convert("RGB").resize((16, 16), Image.Resampling.BILINEAR), np.float32) / 255
    return (torch.from_numpy(pixels).permute(2, 0, 1) - MEAN) / STD


def stand_in(classes: int = 4, labels: tuple[str, ...] | None = None, **changes: Any) -> LoadedModel:
    fields: dict[str, Any] = dict(
        model=Brightness(classes).eval(),
        source="test:brightness",
        framework="torch",
        kind="image",
        example=torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)),
        transform=transform,
        tokenizer=None,
        labels=labels,
        info={},
    )
    return LoadedModel(**{**fields, **changes})


def save(path: Path, seed: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(path)
    return path


@pytest.fixture
def flat_folder(tmp_path: Path) -> Path:
    for i in range(12):
        save(tmp_path / "flat" / f"{i:02d}.png", i)
    return tmp_path / "flat"


def class_folders(root: Path, names: tuple[str, ...], each: int = 3) -> Path:
    for k, name in enumerate(names):
        for i in range(each):
            save(root / name / f"{i}.png", 100 * k + i)
    return root


def test_flat_folder(flat_folder: Path) -> None:
    samples = load_samples(f"images:{flat_folder}", stand_in(), n=5, seed=0)
    assert len(samples) == 5 and samples.labels is None and not samples.synthetic and not samples.skipped
    assert samples.description == f"images:{flat_folder}, 5 of 12 images, seed 0"
    for i, name in enumerate(samples.names):
        assert torch.equal(samples.load(i), transform(Image.open(flat_folder / name)))


def test_selection_is_seeded(flat_folder: Path) -> None:
    draws = [load_samples(f"images:{flat_folder}", stand_in(), n=6, seed=s) for s in (0, 0, 1)]
    assert draws[0].names == draws[1].names and draws[0].fingerprint() == draws[1].fingerprint()
    assert draws[0].names != draws[2].names and draws[0].fingerprint() != draws[2].fingerprint()


def test_fewer_images_than_asked_for(flat_folder: Path) -> None:
    samples = load_samples(f"images:{flat_folder}", stand_in(), n=50)
    assert len(samples) == 12 and "12 of 12 images" in samples.description and "50 were asked" in samples.description


def test_large_sets_are_read_again_instead_of_kept(flat_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = load_samples(f"images:{flat_folder}", stand_in(), n=4)
    monkeypatch.setattr(images, "CACHE_BYTES", 0)
    lazy = load_samples(f"images:{flat_folder}", stand_in(), n=4)
    assert kept.hashes == lazy.hashes
    assert all(torch.equal(kept.load(i), lazy.load(i)) for i in range(4))
    save(flat_folder / lazy.names[0], 999)
    assert not torch.equal(kept.load(0), lazy.load(0))


@pytest.mark.parametrize(
    ("names", "labels", "expected"),
    [
        (("cat", "dog", "eel", "fox"), None, [0, 1, 2, 3]),
        (("0003", "0001"), None, [3, 1]),
        (("Dog", "cat"), ("cat", "cow", "dog", "fox"), [2, 0]),
        (("great_white-shark", "tench"), ("tench, Tinca tinca", "cow", "great white shark", "fox"), [2, 0]),
        (("2", "1"), ("3", "2", "1", "0"), [1, 2]),
    ],
)
def test_labels_of_class_folders(tmp_path: Path, names: tuple[str, ...], labels: Any, expected: list[int]) -> None:
    samples = load_samples(f"images:{class_folders(tmp_path, names)}", stand_in(labels=labels), n=100)
    assert samples.labels is not None and samples.labels.dtype == torch.int64
    truth = dict(zip(names, expected, strict=True))
    assert samples.labels.tolist() == [truth[name.split("/")[0]] for name in samples.names]
    assert len(samples) == 3 * len(names)


@pytest.mark.parametrize("hidden", [".ipynb_checkpoints", "__MACOSX", ".cache", ".git"])
def test_hidden_folders_and_files_are_no_data(tmp_path: Path, hidden: str) -> None:
    classes = ("cat", "dog", "eel", "fox")
    plain = load_samples(f"images:{class_folders(tmp_path, classes)}", stand_in(), n=100)
    save(tmp_path / hidden / "0.png", 999)
    save(tmp_path / "cat" / hidden / "0.png", 998)
    save(tmp_path / "cat" / "._0.png", 997)
    (tmp_path / "._cat.png").write_bytes(b"no image")
    beside = load_samples(f"images:{tmp_path}", stand_in(), n=100)
    assert plain.labels is not None and beside.labels is not None
    assert beside.names == plain.names and torch.equal(beside.labels, plain.labels) and not beside.skipped


@pytest.mark.parametrize("names", [("cat", "dog"), ("0", "7")])
def test_labels_that_fit_no_class_are_not_guessed(tmp_path: Path, names: tuple[str, ...]) -> None:
    samples = load_samples(f"images:{class_folders(tmp_path, names)}", stand_in(), n=100)
    assert samples.labels is None and "labels unused" in samples.description


@pytest.mark.parametrize(
    ("names", "odd"),
    [(("cat", "cow", "dogs", "fox"), "'dogs' is"), (("a", "b", "crane", "d"), "'a', 'b', 'crane' and")],
)
def test_folders_named_otherwise_than_the_classes_have_no_labels(
    tmp_path: Path, names: tuple[str, ...], odd: str
) -> None:
    """There are as many as the model has classes, and yet their places say nothing."""
    labels = ("crane", "cow", "crane", "fox") if "crane" in names else ("cat", "cow", "dog", "fox")
    samples = load_samples(f"images:{class_folders(tmp_path, names)}", stand_in(labels=labels), n=100)
    assert samples.labels is None and f"labels unused: {odd}" in samples.description


def test_wordnet_folders_of_an_imagenet_model() -> None:
    indices, _ = images.match_labels(["n01443537", "n01440764"], stand_in(classes=1000))
    assert indices == {"n01443537": 1, "n01440764": 0}


def test_corrupt_files_are_skipped_and_named(flat_folder: Path) -> None:
    (flat_folder / "broken.png").write_bytes(b"not an image")
    whole = (flat_folder / "00.png").read_bytes()
    (flat_folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    (flat_folder / "empty.jpg").write_bytes(b"")
    samples = load_samples(f"images:{flat_folder}", stand_in(), n=100)
    assert len(samples) == 12
    assert sorted(name for name, _ in samples.skipped) == ["broken.png", "cut.png", "empty.jpg"]
    assert all(reason for _, reason in samples.skipped) and "3 unreadable skipped" in samples.description


def test_corrupt_files_do_not_shrink_the_set(flat_folder: Path) -> None:
    for i in range(6):
        (flat_folder / f"bad{i}.png").write_bytes(b"bad")
    assert len(load_samples(f"images:{flat_folder}", stand_in(), n=12)) == 12


def test_the_same_pixels_are_used_once(flat_folder: Path) -> None:
    Image.open(flat_folder / "03.png").save(flat_folder / "copy.bmp")
    samples = load_samples(f"images:{flat_folder}", stand_in(), n=100)
    assert len(samples) == 12 == len(set(samples.hashes)) and "1 duplicates dropped" in samples.description


def test_hash_is_of_the_pixels(tmp_path: Path) -> None:
    save(tmp_path / "a" / "x.png", 1)
    (tmp_path / "b").mkdir()
    Image.open(tmp_path / "a" / "x.png").save(tmp_path / "b" / "y.tiff")
    first, second = (load_samples(f"images:{tmp_path / d}", stand_in(), n=1) for d in "ab")
    assert first.hashes == second.hashes and len(first.hashes[0]) == 16


def only_corrupt(root: Path) -> Path:
    (root / "a.png").write_bytes(b"bad")
    return root


def both_kinds(root: Path) -> Path:
    save(root / "a.png", 0)
    save(root / "cat" / "a.png", 1)
    return root


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda root: root / "missing", "no directory"),
        (lambda root: root, "no images"),
        (lambda root: save(root / "a.png", 0), "no directory"),
        (only_corrupt, "nothing readable .* 1 files failed, the first a.png"),
        (both_kinds, "both images and folders"),
    ],
)
def test_useless_directories(tmp_path: Path, prepare: Callable[[Path], Path], message: str) -> None:
    with pytest.raises(ModhifiError, match=message) as caught:
        load_samples(f"images:{prepare(tmp_path)}", stand_in(), n=4)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("spec", ["", "photos", "images:", "hf:", "synthetic:sunsets", "video:x"])
def test_unknown_sources(spec: str) -> None:
    with pytest.raises(ModhifiError, match="unknown"):
        load_samples(spec, stand_in(), n=4)


def test_models_and_numbers_that_cannot_be_served(flat_folder: Path) -> None:
    tokens = stand_in(kind="text", example=torch.zeros(2, 16, dtype=torch.long), transform=None)
    for spec in ("synthetic:fractal", f"images:{flat_folder}"):
        with pytest.raises(ModhifiError, match="takes no images"):
            load_samples(spec, tokens, n=4)
    with pytest.raises(ModhifiError, match="no preprocessing"):
        load_samples(f"images:{flat_folder}", stand_in(kind="tensor", transform=None), n=4)
    with pytest.raises(ModhifiError, match="at least 1"):
        load_samples("synthetic", stand_in(), n=0)


def test_batches_and_subset(flat_folder: Path) -> None:
    samples = load_samples(f"images:{flat_folder}", stand_in(), n=7)
    sizes = [len(b) for b in samples.batches(3)]
    assert sizes == [3, 3, 1]
    assert torch.equal(torch.cat(list(samples.batches(3))), torch.stack([samples.load(i) for i in range(7)]))
    part = samples.subset(torch.tensor([5, 0]))
    assert part.names == (samples.names[5], samples.names[0]) and part.hashes == (samples.hashes[5], samples.hashes[0])
    assert torch.equal(part.load(0), samples.load(5)) and part.fingerprint() != samples.fingerprint()


def test_normalisation_is_read_off_the_transform() -> None:
    mean, std = normalisation(stand_in())
    assert torch.allclose(mean, MEAN, atol=1e-6) and torch.allclose(std, STD, atol=1e-6)


def test_a_model_without_transform_gets_the_spread_of_its_example() -> None:
    example = 5 + 2 * torch.randn(64, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    samples = load_samples("synthetic:gaussian", stand_in(kind="tensor", transform=None, example=example), n=32)
    x = torch.cat(list(samples.batches(32)))
    assert abs(x.mean() - 5) < 0.4 and abs(x.std() - 2) < 0.3
    with pytest.raises(ModhifiError, match="varied example"):
        load_samples("synthetic", stand_in(kind="tensor", transform=None, example=torch.zeros(2, 3, 8, 8)), n=2)


def test_one_channel_models_get_grey_images() -> None:
    loaded = stand_in(example=torch.randn(2, 1, 16, 16), transform=lambda image: transform(image)[:1])
    assert load_samples("synthetic", loaded, n=2, balanced=False).load(0).shape == (1, 16, 16)


def test_synthetic_items_are_lazy_and_reproducible(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []
    draw = procedural.draw

    def counted(kind: str, seed: int, index: int, height: int, width: int) -> Any:
        drawn.append(index)
        return draw(kind, seed, index, height, width)

    monkeypatch.setattr(procedural, "draw", counted)
    samples = load_samples("synthetic", stand_in(), n=100_000, seed=3, balanced=False)
    assert len(samples) == 100_000 and drawn == []
    item = samples.load(99_999)
    assert drawn == [99_999] and item.shape == (3, 16, 16) and item.dtype == torch.float32
    assert samples.synthetic and samples.labels is None and samples.names[17] == "synthetic 17"
    again = load_samples("synthetic:mixed", stand_in(), n=100, seed=3, balanced=False)
    assert torch.equal(again.load(5), samples.load(5)) and again.hashes[5] == samples.hashes[5]
    assert not set(again.hashes) & set(load_samples("synthetic", stand_in(), n=100, seed=4, balanced=False).hashes)


def spread(samples: Samples, loaded: LoadedModel) -> list[int]:
    predicted = torch.cat([loaded.logits(x).argmax(1) for x in samples.batches(64)])
    return torch.bincount(predicted, minlength=7).tolist()


def test_balance_flattens_the_predicted_classes() -> None:
    loaded = stand_in(classes=7)
    candidates = load_samples("synthetic", loaded, n=180, balanced=False)
    counts = spread(candidates, loaded)
    told: list[tuple[str, int, int]] = []
    kept = balance(candidates, loaded, 60, progress=lambda *step: told.append(step))
    assert told[-1] == ("drawing", 60, 60) and len(told) > 1
    after = spread(kept, loaded)
    # The best that any 60 of these 180 can do: level every class down to one height.
    height = next(h for h in range(181) if sum(min(c, h) for c in counts) >= 60)
    assert sum(after) == 60 and len(kept.hashes) == 60
    assert all(min(c, height - 1) <= a <= min(c, height) for a, c in zip(after, counts, strict=True))
    assert max(after) - min(after) < (max(counts) - min(counts)) / 3
    # The share of every class is 9: nothing behind the image with which that can be had is looked at.
    position = [int(name.split()[1]) for name in kept.names]
    predicted = torch.cat([loaded.logits(x).argmax(1) for x in candidates.batches(64)]).tolist()
    enough = [i for i in range(180) if sum(min(predicted[: i + 1].count(c), 9) for c in range(7)) >= 60]
    assert not enough or max(position) < 64 * (enough[0] // 64 + 1)
    assert position == sorted(position) and "predicted classes" in kept.description


def test_synthetic_is_balanced_by_default() -> None:
    loaded = stand_in(classes=7)
    default = load_samples("synthetic", loaded, n=40)
    by_hand = balance(load_samples("synthetic", loaded, n=40 * synthetic.CANDIDATES, balanced=False), loaded, 40)
    assert default.names == by_hand.names
    assert default.names != load_samples("synthetic", loaded, n=40, balanced=False).names


def test_balancing_large_sets_stays_within_a_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synthetic, "CANDIDATE_PIXELS", 50 * 16 * 16)
    assert "40 of: synthetic:mixed, 50 images" in load_samples("synthetic", stand_in(), n=40).description
    assert "synthetic:mixed, 60 images of 16x16, seed 0" == load_samples("synthetic", stand_in(), n=60).description


def test_balance_needs_a_classifier() -> None:
    backbone = stand_in(model=nn.Conv2d(3, 4, 1))
    with pytest.raises(ModhifiError, match="no classifier"):
        balance(load_samples("synthetic", backbone, n=4), backbone, 2)
    headless = replace(stand_in(), values=True)
    assert class_count(headless) is None and class_count(stand_in()) == 4


def samples_of(*items: Tensor) -> Samples:
    names = tuple(str(i) for i in range(len(items)))
    return Samples(lambda i: items[i], names, None, names, "test", False)


def test_degenerate_sets_are_named() -> None:
    flat = [torch.full((3, 4, 4), float(i)) for i in range(4)]
    noise = [torch.rand(3, 4, 4, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    assert warn_degenerate(samples_of(*noise)) == []
    assert ["only one" in w for w in warn_degenerate(samples_of(noise[0]))] == [True]
    assert ["are flat" in w for w in warn_degenerate(samples_of(*flat))] == [True]
    assert ["3 of the first 4" in w for w in warn_degenerate(samples_of(*flat[:3], noise[0]))] == [True]
    assert ["all the same" in w for w in warn_degenerate(samples_of(noise[0], noise[0]))] == [True]
    assert ["NaN" in w for w in warn_degenerate(samples_of(*noise, noise[0] / 0))] == [True]
    assert len(warn_degenerate(samples_of(torch.zeros(8, dtype=torch.long)))) == 2


class Table:
    """The part of a ``datasets.Dataset`` that modhifi uses."""

    def __init__(self, rows: list[dict[str, Any]], features: dict[str, Any]) -> None:
        self.rows, self.features = rows, features

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: int | str) -> Any:
        return [row[key] for row in self.rows] if isinstance(key, str) else self.rows[key]


def fake_datasets(monkeypatch: pytest.MonkeyPatch, load_dataset: Callable[..., Any]) -> None:
    module = types.ModuleType("datasets")
    module.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)


def feature(kind: str, **attributes: Any) -> Any:
    return type(kind, (), attributes)()


def test_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str]] = []
    rows = [{"id": i, "photo": Image.fromarray(np.full((9, 9, 3), 20 * i, np.uint8)), "label": i % 2} for i in range(6)]

    def load_dataset(name: str, split: str) -> Table:
        asked.append((name, split))
        columns = {"id": "Value", "photo": "Image"}
        features = {c: feature(kind) for c, kind in columns.items()}
        return Table(rows, {**features, "label": feature("ClassLabel", names=["dog", "cat"])})

    fake_datasets(monkeypatch, load_dataset)
    loaded = stand_in(labels=("cat", "cow", "dog", "fox"))
    samples = load_samples("hf:org/pets:test", loaded, n=4)
    load_samples("hf:org/pets", loaded, n=4)
    assert asked == [("org/pets", "test"), ("org/pets", "train")]
    rows_used = [int(name.split()[1]) for name in samples.names]
    assert samples.labels is not None and samples.labels.tolist() == [(2, 0)[i % 2] for i in rows_used]
    assert torch.equal(samples.load(0), transform(rows[rows_used[0]]["photo"]))
    rows[0]["label"] = -1
    assert load_samples("hf:org/pets", loaded, n=6).labels is None


def test_datasets_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ModhifiError, match=r"pip install modhifi\[datasets\]"):
        load_samples("hf:org/pets", stand_in(), n=4)

    def refuse(name: str, split: str) -> None:
        raise ConnectionError("no route\nto the hub")

    fake_datasets(monkeypatch, refuse)
    with pytest.raises(ModhifiError, match="cannot load dataset org/pets: no route;") as caught:
        load_samples("hf:org/pets", stand_in(), n=4)
    assert "\n" not in str(caught.value)
    fake_datasets(monkeypatch, lambda name, split: Table([{"text": "x"}], {"text": feature("Value")}))
    with pytest.raises(ModhifiError, match="no image column"):
        load_samples("hf:org/texts", stand_in(), n=4)


def test_pictures_show_the_pixels_drawn(tmp_path: Path) -> None:
    loaded = stand_in()
    samples = load_samples("synthetic", loaded, n=5, seed=2, balanced=False)
    drawn = procedural.draw("mixed", 2, 3, 16, 16)
    assert np.array_equal(np.asarray(picture(samples, loaded, 3)), drawn)
    sheet = contact_sheet(samples, loaded, n=64, tile=40)  # images of 16 pixels, enlarged twice
    assert sheet.size == (3 * 34, 2 * 34)
    assert np.array_equal(np.asarray(sheet)[35:67:2, 1:33:2], drawn)
    assert contact_sheet(samples, loaded, tile=8).size == (3 * 10, 2 * 10)
    paths = materialise(samples, loaded, tmp_path / "new")
    assert [p.name for p in paths] == [f"{i:06d}.png" for i in range(5)]
    assert np.array_equal(np.asarray(Image.open(paths[3])), drawn)
    assert len(load_samples(f"images:{tmp_path / 'new'}", loaded, n=9)) == 5
    with pytest.raises(ModhifiError, match="not empty"):
        materialise(samples, loaded, tmp_path / "new")
