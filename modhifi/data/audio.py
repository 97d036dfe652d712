"""Sounds: those of a directory, and noise and tones that are drawn."""

from __future__ import annotations

import hashlib
import wave
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from modhifi.data.hidden import is_hidden
from modhifi.data.samples import Samples, synthetic_items
from modhifi.errors import ModhifiError
from modhifi.models.listening import Listener
from modhifi.models.loaded import LoadedModel
from modhifi.models.parts import by_kind

# What Python reads alone, and what it reads where soundfile is installed.
WAVE, OTHERS = (".wav",), (".flac", ".ogg", ".mp3", ".aiff")
# A clip is dropped if it is quieter than this share of full scale: silence excites nothing.
QUIET = 1e-4
# The range of drawn tones in hertz, and how many sound together at most.
LOWEST, HIGHEST, TONES = 80.0, 4000.0, 6


def listener_for(loaded: LoadedModel) -> Listener:
    """How the model prepares sound. Raises ModhifiError for one that reads none, or whose preparation is not known."""
    if "audio" not in by_kind(loaded.parts):
        raise ModhifiError(f"{loaded.source} reads no sounds; use text:PATH, images:DIR, pairs:FILE or synthetic")
    if loaded.listener is None:
        raise ModhifiError(
            f"{loaded.source} comes without a preprocessor_config.json, which sounds need; put it beside its "
            "config.json, or use synthetic"
        )
    return loaded.listener


def from_directory(directory: Path, loaded: LoadedModel, n: int, seed: int) -> Samples:
    """At most `n` clips of the sounds in a directory and below, as long as the model reads; a file may give several.

    Files are ``.wav``, and ``.flac``, ``.ogg``, ``.mp3`` or ``.aiff`` where soundfile is installed; hidden ones are
    passed over. Raises ModhifiError for a model that reads no sounds, and where nothing can be read.
    """
    listener = listener_for(loaded)
    files = sorted(p for p in directory.rglob("*") if p.suffix.lower() in (*WAVE, *OTHERS) and p.is_file())
    files = [p for p in files if not any(map(is_hidden, (p, *p.relative_to(directory).parents)))]
    if not files:
        raise ModhifiError(f"no sounds at {directory}; give a folder of .wav files as audio:DIR")
    order = np.random.default_rng(seed).permutation(len(files)).tolist()
    clips: list[tuple[int, np.ndarray]] = []
    skipped = []
    for number in order:
        try:
            clips += [(number, clip) for clip in cut(read(files[number], listener.rate), listener)]
        except ModhifiError as error:
            skipped.append((files[number].name, str(error)))
        if len(clips) >= 4 * n:
            break
    if not clips:
        raise ModhifiError(f"no sound of {directory} can be read: {skipped[0][1]}")
    chosen = np.random.default_rng(seed).permutation(len(clips))[:n].tolist()
    kept = {hashlib.sha256(clips[i][1].tobytes()).hexdigest()[:16]: clips[i] for i in chosen}
    values = list(kept.values())
    seconds = listener.samples / listener.rate
    return Samples(
        load=lambda i: listener(values[i][1]),
        hashes=tuple(kept),
        labels=None,
        names=tuple(f"{files[number].name} clip {i}" for i, (number, _) in enumerate(values)),
        description=f"audio:{directory}, {len(values)} clips of {seconds:.3g} s, seed {seed}",
        synthetic=False,
        skipped=tuple(skipped),
        units=tuple(number for number, _ in values) if len({number for number, _ in values}) > 1 else None,
    )


def read(path: Path, rate: int) -> np.ndarray:
    """A file as mono samples in [-1, 1] at ``rate`` a second, float32. Raises ModhifiError where it cannot be read."""
    try:
        sound, before = _wave(path) if path.suffix.lower() in WAVE else _other(path)
    except (OSError, EOFError, wave.Error, RuntimeError) as error:
        raise ModhifiError(f"cannot read the sound {path.name}: {error}; give a .wav file of whole numbers") from None
    return resampled(sound.mean(1), before, rate).astype(np.float32)


def _wave(path: Path) -> tuple[np.ndarray, int]:
    with wave.open(str(path)) as file:
        width, channels, rate = file.getsampwidth(), file.getnchannels(), file.getframerate()
        raw = np.frombuffer(file.readframes(file.getnframes()), dtype=np.uint8).reshape(-1, channels, width)
    if width == 1:
        return raw[:, :, 0].astype(np.float64) / 128 - 1, rate  # a byte has no sign
    padded = np.zeros((*raw.shape[:2], 4), dtype=np.uint8)
    padded[:, :, 4 - width :] = raw
    return padded.view("<i4")[:, :, 0] / 2.0**31, rate


def _other(path: Path) -> tuple[np.ndarray, int]:
    try:
        import soundfile  # type: ignore[import-not-found]
    except ImportError:
        raise ModhifiError(f"{path.name} needs the package soundfile; give .wav files") from None
    sound, rate = soundfile.read(path, always_2d=True)
    return sound, int(rate)


def resampled(sound: np.ndarray, before: int, after: int) -> np.ndarray:
    """A sound ``(n,)`` at another number of samples a second, by its spectrum: what lies above is left out."""
    count = round(len(sound) * after / before)
    if before == after or not count:
        return sound
    spectrum = np.fft.rfft(sound)
    size = count // 2 + 1
    fitted = np.zeros(size, dtype=complex)
    fitted[: min(size, len(spectrum))] = spectrum[:size]
    return np.fft.irfft(fitted, count) * (count / len(sound))


def cut(sound: np.ndarray, listener: Listener) -> list[np.ndarray]:
    """The clips of a sound, each as long as one item; a shorter sound is repeated unless the model's own code pads it.

    Silent clips are left out.
    """
    length = listener.samples
    if len(sound) < length and len(sound) and not listener.pads:
        sound = np.tile(sound, -(-length // len(sound)))
    starts = range(0, max(1, len(sound) - length + 1), length)
    clips = [np.ascontiguousarray(sound[start : start + length]) for start in starts]
    return [clip for clip in clips if len(clip) and float(np.abs(clip).max()) > QUIET]


def drawn(loaded: LoadedModel, n: int, seed: int) -> Samples:
    """`n` drawn sounds, noise and tones that swell and fade, as the model reads them.

    Where its preparation is not known, spectra of noise with ridges. Raises ModhifiError for a model that reads none.
    """
    part, listener = by_kind(loaded.parts)["audio"], loaded.listener

    def load(index: int) -> Tensor:
        chance = np.random.default_rng((seed, index))
        return ridges(part.shape, chance) if listener is None else listener(tones(listener, chance))

    what = "spectra" if listener is None else "sounds"
    return synthetic_items(load, n, f"synthetic, {n} {what} of noise and tones, seed {seed}")


def tones(listener: Listener, chance: np.random.Generator) -> np.ndarray:
    """A sound of one item's length: harmonic tones that swell and fade, in noise. float32 ``(samples,)``."""
    time = np.arange(listener.samples) / listener.rate
    sound = chance.uniform(0.001, 0.05) * chance.standard_normal(listener.samples)
    for _ in range(int(chance.integers(1, TONES + 1))):
        pitch = LOWEST * (HIGHEST / LOWEST) ** chance.random()
        middle, width = chance.random() * time[-1], time[-1] * chance.uniform(0.05, 0.5)
        swell = np.exp(-(((time - middle) / width) ** 2))
        for harmonic in range(1, int(chance.integers(1, 6))):
            if pitch * harmonic < listener.rate / 2:
                sound += 0.2 / harmonic * swell * np.sin(2 * np.pi * pitch * harmonic * time + 6.3 * chance.random())
    return np.clip(sound, -1, 1).astype(np.float32)


def ridges(shape: tuple[int, ...], chance: np.random.Generator) -> Tensor:
    """Noise and ridges along each axis, float32 of ``shape``: a spectrum, whichever of its axes is time."""
    values = chance.standard_normal(shape)
    for _ in range(int(chance.integers(1, TONES + 1))):
        ridge: Any = 3 * chance.random()
        for axis, size in enumerate(shape):
            wave_along = np.cos(2 * np.pi * chance.random() * np.arange(size) / max(2.0, size * chance.random()))
            ridge = ridge * wave_along.reshape([-1 if a == axis else 1 for a in range(len(shape))])
        values = values + ridge
    return torch.from_numpy(values / values.std()).float()
