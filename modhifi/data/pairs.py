"""Pairs of a file: source and target texts, or an image, or a sound, and its text."""

from __future__ import annotations

import csv
import hashlib
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from modhifi.data import audio
from modhifi.data.samples import Samples
from modhifi.data.text import Cutter, identity
from modhifi.errors import ModhifiError
from modhifi.models.loaded import LoadedModel
from modhifi.models.parts import by_kind, vocabulary_of

FORMATS = "lines of SOURCE<tab>TARGET, a .csv of two columns, or a .jsonl of two strings a line"


def from_file(path: Path, loaded: LoadedModel, n: int, seed: int) -> dict[str, Samples]:
    """At most `n` pairs of a file, for the parts of one model: its encoder's text, image or sound, and ``target`` text.

    Images and sounds are paths, which may be relative to the file's folder. Raises ModhifiError where a model has no
    two parts, without a tokenizer, and where nothing can be read.
    """
    kinds = by_kind(loaded.parts)
    first = next((kind for kind in ("image", "audio", "text") if kind in kinds), None)
    second = "target" if "decoder" in kinds else "text" if "text" in kinds else None
    if first is None or second in (None, first):
        raise ModhifiError(f"{loaded.source} reads no pairs; use text:PATH, images:DIR, audio:DIR or synthetic")
    if loaded.tokenizer is None:
        raise ModhifiError(f"{loaded.source} comes without a tokenizer, which text needs; put its files beside it")
    rows = read(path)
    order = np.random.default_rng(seed).permutation(len(rows)).tolist()
    chosen: list[tuple[Tensor | str, Tensor]] = []
    skipped: list[tuple[str, str]] = []
    for number in order:
        if len(chosen) == n:
            break
        source, target = rows[number]
        try:
            chosen.append((_source(source, first, path, loaded), _tokens(target, second, loaded)))
        except (ModhifiError, OSError, UnidentifiedImageError) as error:
            skipped.append((f"line {number + 1}", str(error)))
    if not chosen:
        raise ModhifiError(f"no pair of {path} can be used: {skipped[0][1] if skipped else 'it is empty'}")
    described = f"pairs:{path}, {len(chosen)} pairs, seed {seed}"
    return {
        first: _samples([source for source, _ in chosen], first, path, loaded, described, tuple(skipped)),
        str(second): _samples([target for _, target in chosen], "text", path, loaded, described, ()),
    }


def read(path: Path) -> list[tuple[str, str]]:
    """The pairs of a file. Raises ModhifiError where it has another form."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        if path.suffix == ".jsonl":
            found = [[v for v in json.loads(line).values() if isinstance(v, str)] for line in lines if line.strip()]
        else:
            found = list(csv.reader(lines, delimiter="," if path.suffix == ".csv" else "\t"))
    except (OSError, UnicodeDecodeError, ValueError, AttributeError, csv.Error) as error:
        raise ModhifiError(f"cannot read {path}: {error}; give {FORMATS}") from error
    pairs = [(row[0], row[1]) for row in found if len(row) >= 2 and row[0].strip() and row[1].strip()]
    if not pairs:
        raise ModhifiError(f"{path} holds no pairs; give {FORMATS}")
    return pairs


def _source(value: str, kind: str, path: Path, loaded: LoadedModel) -> Tensor | str:
    """Tokens of a text, or the place of an image or a sound, which must be readable."""
    if kind == "text":
        return _tokens(value, "text", loaded)
    place = path.parent / value
    if kind == "image":
        with Image.open(place) as image:
            image.verify()
    else:
        audio.read(place, audio.listener_for(loaded).rate)
    return str(place)


def _tokens(value: str, kind: str, loaded: LoadedModel) -> Tensor:
    """A text's tokens with the tokenizer's frame, a target's without what begins it; as many as the part holds."""
    part = by_kind(loaded.parts)["decoder" if kind == "target" else "text"]
    cutter = Cutter(loaded.tokenizer, part.shape[0], vocabulary_of(loaded.model.config, kind == "target"))
    before, behind = cutter.frame
    ids = cutter.tokens(value)
    if not ids:
        raise ModhifiError("its text holds no token")
    if kind == "target":
        return torch.tensor(ids[: part.shape[0] - 1])
    return torch.tensor(before + ids[: part.shape[0] - len(before) - len(behind)] + behind)


def _samples(
    values: list[Tensor | str],
    kind: str,
    path: Path,
    loaded: LoadedModel,
    description: str,
    skipped: tuple[tuple[str, str], ...],
) -> Samples:
    def load(index: int) -> Tensor:
        value = values[index]
        if isinstance(value, Tensor):
            return value
        if kind == "image":
            assert loaded.transform is not None
            with Image.open(value) as image:
                return loaded.transform(image)
        listener = audio.listener_for(loaded)
        clips = audio.cut(audio.read(Path(value), listener.rate), listener)
        return listener(clips[0])

    def hashed(value: Tensor | str) -> str:
        if isinstance(value, Tensor):
            return identity(value)
        return hashlib.sha256(Path(value).read_bytes()).hexdigest()[:16]

    return Samples(
        load=load,
        hashes=tuple(map(hashed, values)),
        labels=None,
        names=tuple(f"{path.name} {i}" for i in range(len(values))),
        description=description,
        synthetic=False,
        skipped=skipped,
    )
