"""Data for models that read sounds, series or several inputs: every source, every kind of part."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tiny_parts
import tiny_text
import torch

from modhifi.data import audio
from modhifi.data.sources import load_samples
from modhifi.data.writing import Writer
from modhifi.errors import ModhifiError
from modhifi.models.listening import Listener
from modhifi.models.load import load_model
from modhifi.models.loaded import LoadedModel

WORDS = tiny_text.WORDS


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, LoadedModel]:
    place = tmp_path_factory.mktemp("models")
    return {name: load_model(tiny_parts.save(name, place / name)) for name in tiny_parts.MODELS}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("files")
    tiny_parts.sounds(place / "sounds")
    tiny_parts.pictures(place / "pictures")
    lines = [" ".join(WORDS[(3 * i + j) % len(WORDS)] for j in range(4 + i % 5)) for i in range(60)]
    (place / "text.txt").write_text("\n".join(lines))
    (place / "translations.tsv").write_text("\n".join(f"{a}\t{b}" for a, b in zip(lines, lines[1:], strict=False)))
    rows = [{"image": f"pictures/{i}.png", "text": lines[i]} for i in range(8)]
    (place / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (place / "spoken.csv").write_text("\n".join(f"sounds/{i}.wav,{lines[i]}" for i in range(6)))
    return place


@pytest.mark.parametrize("name", [name for name in tiny_parts.MODELS if name != "detr"])
def test_drawn_samples_fit_and_differ_and_repeat(name: str, loaded: dict[str, LoadedModel]) -> None:
    samples, again = (load_samples("synthetic", loaded[name], n=4, seed=1) for _ in range(2))
    batch = next(samples.batches(4))
    assert torch.equal(batch, next(again.batches(4))) and samples.hashes == again.hashes
    assert len(set(samples.hashes)) == 4 and samples.synthetic
    assert len(loaded[name].logits(batch)) == 4
    assert load_samples("synthetic", loaded[name], n=4, seed=2).hashes != samples.hashes


CASES = [
    ("t5", "text:text.txt"),
    ("t5", "pairs:translations.tsv"),
    ("bart", "pairs:translations.tsv"),
    ("wav2vec2", "audio:sounds"),
    ("clip", "pairs:captions.jsonl"),
    ("clip", "images:pictures"),
    ("llava", "pairs:captions.jsonl"),
    ("smolvlm", "images:pictures"),
]


@pytest.mark.parametrize(("name", "source"), CASES)
def test_sources_of_parts(name: str, source: str, loaded: dict[str, LoadedModel], files: Path) -> None:
    kind, _, file = source.partition(":")
    samples = load_samples(f"{kind}:{files / file}", loaded[name], n=5, seed=0)
    assert len(samples) >= 4 and not samples.synthetic and len(set(samples.hashes)) == len(samples)
    assert bool(loaded[name].logits(next(samples.batches(4))).isfinite().all())


def test_a_decoder_starts_with_its_target_and_goes_on(loaded: dict[str, LoadedModel], files: Path) -> None:
    model = loaded["t5"]
    samples = load_samples(f"pairs:{files / 'translations.tsv'}", model, n=40, seed=0)
    inputs = model.packing.nest(next(samples.batches(40)))
    targets = [line.split("\t")[1] for line in (files / "translations.tsv").read_text().splitlines()]
    starts = {tuple(model.tokenizer(t, add_special_tokens=False)["input_ids"]) for t in targets}
    for ids in inputs["decoder_input_ids"].tolist():
        assert ids[0] == 0 and any(tuple(ids[1 : 1 + len(start)]) == start for start in starts)
    assert not set(inputs["decoder_input_ids"][:, 1:].flatten().tolist()) & {0, 1, 2}
    real = model.real_tokens(next(samples.batches(40)))
    assert real is not None and torch.equal(real, inputs["attention_mask"].bool())


def test_a_decoder_that_does_not_go_on_reads_its_target_and_tokens_at_random(
    loaded: dict[str, LoadedModel], files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a transducer's, whose forward takes more of its encoder than its outputs."""
    model = loaded["t5"]
    spoken = load_samples(f"pairs:{files / 'translations.tsv'}", model, n=40, seed=0)

    def fails(*_: object) -> None:
        raise TypeError("'NoneType' object is not subscriptable")

    monkeypatch.setattr(Writer, "_go_on", fails)
    samples = load_samples(f"pairs:{files / 'translations.tsv'}", model, n=40, seed=0)
    assert "the decoder reads random tokens" in samples.description and "goes on" in spoken.description
    wanted, inputs = (model.packing.nest(next(s.batches(40)))["decoder_input_ids"] for s in (spoken, samples))
    assert torch.equal(inputs[:, :2], wanted[:, :2]) and not torch.equal(inputs, wanted)
    drawn = load_samples("synthetic", model, n=4, seed=0)
    assert "texts of random tokens" in drawn.description


def test_raw_sound_takes_the_form_that_a_model_reads() -> None:
    listener = Listener(100, 10, lambda sound: torch.from_numpy(sound))
    codec = listener.shaped((1, 8))
    assert codec(np.ones(codec.samples)).shape == (1, 8) and codec.rate == 100
    assert listener.shaped((80, 16)) is listener
    assert listener.shaped((3, 8, 8)) is listener


def test_images_take_their_tokens_of_the_text(loaded: dict[str, LoadedModel], files: Path) -> None:
    model = loaded["llava"]
    samples = load_samples(f"pairs:{files / 'captions.jsonl'}", model, n=4, seed=0)
    ids = model.packing.nest(next(samples.batches(4)))["input_ids"]
    assert ((ids == tiny_text.VOCABULARY).sum(1) == 4).all()  # patches of 8 in 16 x 16 pixels


@pytest.mark.parametrize(
    ("name", "source", "message"),
    [
        ("t5", "images:pictures", "reads no images"),
        ("whisper", "audio:sounds", "comes without a preprocessor_config.json, which sounds need"),
        ("t5", "audio:sounds", "reads no sounds"),
        ("wav2vec2", "pairs:spoken.csv", "reads no pairs"),
        ("wav2vec2", "text:text.txt", "reads no text"),
        ("wav2vec2", "audio:pictures", "no sounds at"),
        ("t5", "pairs:text.txt", "holds no pairs; give lines of SOURCE<tab>TARGET"),
        ("t5", "synthetic:invert", "takes no data of 'synthetic:invert'"),
        ("patchtst", "audio:sounds", "reads no sounds"),
    ],
)
def test_what_a_model_does_not_read(
    name: str, source: str, message: str, loaded: dict[str, LoadedModel], files: Path
) -> None:
    kind, _, file = source.partition(":")
    with pytest.raises(ModhifiError, match=message):
        load_samples(source if file == "invert" else f"{kind}:{files / file}", loaded[name], n=4)


def test_a_resampled_tone_is_the_tone_at_the_other_rate() -> None:
    tone = [np.sin(2 * np.pi * 40 * np.arange(rate) / rate) for rate in (800, 1000)]
    np.testing.assert_allclose(audio.resampled(tone[0], 800, 1000), tone[1], atol=1e-9)
    np.testing.assert_allclose(audio.resampled(tone[1], 1000, 800), tone[0], atol=1e-9)


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_files_of_every_width_give_the_same_sound(width: int, tmp_path: Path) -> None:
    import wave

    sound = 0.5 * np.sin(np.arange(400) / 9)
    values = np.round(sound * (2 ** (8 * width - 1) - 1)).astype(np.int64) + (128 if width == 1 else 0)
    with wave.open(str(tmp_path / "a.wav"), "wb") as file:
        file.setnchannels(1), file.setsampwidth(width), file.setframerate(100)
        file.writeframes(values.astype("<i8").view(np.uint8).reshape(-1, 8)[:, :width].tobytes())
    np.testing.assert_allclose(audio.read(tmp_path / "a.wav", 100), sound, atol=2.0 ** (2 - 8 * width) + 1e-6)


def test_short_sounds_are_repeated_and_silence_is_dropped() -> None:
    listener = Listener(100, 10, lambda sound: torch.from_numpy(sound))
    assert [clip.tolist() for clip in audio.cut(np.ones(4), listener)] == [[1.0] * 10]
    assert audio.cut(np.zeros(40), listener) == []
