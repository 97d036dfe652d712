"""Samples of models that read sounds, series or several inputs: what a source has, the rest drawn or written.

A decoder goes on from what its encoder reads, past its end token, so nothing of it is padded; an encoder without text
reads what the decoder has written on other text that means nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from modhifi.data import audio, images, pairs, series, synthetic, text
from modhifi.data.samples import Samples, digest
from modhifi.data.writing import Writer
from modhifi.disk import home_path
from modhifi.errors import ModhifiError
from modhifi.models.loaded import LoadedModel
from modhifi.models.parts import Part, by_kind, framed, given_items, image_token

if TYPE_CHECKING:
    from modhifi.data.sources.base import Request

Given = dict[str, Samples]
"""Samples of some parts, by what they hold: ``text`` has tokens without a frame of images, ``target`` a decoder's."""


def _text(path: str, loaded: LoadedModel, request: Request) -> Given:
    part = _part(loaded, "text", "text")
    length = part.shape[0] - _front(loaded)
    view = loaded.of_one_part("encoder", torch.zeros(2, length, dtype=torch.int64))
    return {"text": text.from_files(home_path(path), view, request.n, request.seed, length)}


def _images(directory: str, loaded: LoadedModel, request: Request) -> Given:
    return {"image": images.from_directory(home_path(directory), _seeing(loaded), request.n, request.seed)}


def _audio(directory: str, loaded: LoadedModel, request: Request) -> Given:
    return {"audio": audio.from_directory(home_path(directory), loaded, request.n, request.seed)}


def _pairs(path: str, loaded: LoadedModel, request: Request) -> Given:
    return pairs.from_file(home_path(path), loaded, request.n, request.seed)


def _nothing(kind: str, loaded: LoadedModel, request: Request) -> Given:
    return {}


GIVERS: dict[str, Callable[[str, LoadedModel, Request], Given]] = {
    "text": _text,
    "images": _images,
    "audio": _audio,
    "pairs": _pairs,
    "synthetic": _nothing,
    "self": _nothing,
}


def load(name: str, argument: str, loaded: LoadedModel, request: Request) -> Samples:
    """Samples of one source for a model that has parts; raises ModhifiError where the source has none of them."""
    if name not in GIVERS:
        raise ModhifiError(f"{loaded.source} takes no data of '{name}'; use {', '.join(GIVERS)}")
    given = GIVERS[name](argument, loaded, request)
    return join(loaded, given, request)


def join(loaded: LoadedModel, given: Given, request: Request) -> Samples:
    """Items of every part: those that are given, drawn ones, and what the model itself writes."""
    n = min([len(samples) for samples in given.values()] + [request.n])
    kinds, seed = by_kind(loaded.parts), request.seed
    values = {kind: samples.subset(range(n)) for kind, samples in given.items()}
    for kind in kinds.keys() - values.keys() - {"mask", "decoder", "text", "given"}:
        values[kind] = _drawn(kind, loaded, n, seed)
    if loaded.packing is None:
        return values[loaded.parts[0].kind]
    writer = Writer(loaded, seed, request.progress)
    pixels = values.get("image")
    if "text" in kinds and "text" not in values:
        values["text"] = writer.texts(n, None if pixels is None else pixels.load)
    tables = {part.kind: part for part in loaded.parts}

    def without_decoder(index: int) -> dict[str, Tensor]:
        chance = torch.Generator().manual_seed(seed * n + index)
        return _item(loaded, tables, values, index) | given_items(loaded.model, loaded.parts, chance)

    written = writer.decoders(without_decoder, n, values.get("target")) if "decoder" in kinds else None
    packing = loaded.packing
    assert packing is not None

    def item(index: int) -> Tensor:
        parts = without_decoder(index)
        if written is not None:
            parts["decoder_input_ids"] = written[index]
        return packing.pack({part.name: parts[part.name] for part in loaded.parts})

    said = [values[kind].description for kind in values if kind != "target"] + writer.remarks
    if "given" in kinds:
        said.append(f"{', '.join(p.name for p in loaded.parts if p.kind == 'given')}: drawn, seed {seed}")
    first = next(iter(given.values()), None)
    return Samples(
        load=item,
        hashes=tuple(_hash(values, None if written is None else written[i], i, seed) for i in range(n)),
        labels=None,
        names=tuple(f"item {i}" for i in range(n)) if first is None else first.names[:n],
        description="; ".join(dict.fromkeys(said)),
        synthetic=not given,
        skipped=tuple(item for samples in given.values() for item in samples.skipped),
        units=None if first is None else values[next(iter(given))].units,
    )


def _item(loaded: LoadedModel, tables: Mapping[Any, Part], values: Given, index: int) -> dict[str, Tensor]:
    """Every part of one item but the decoder's."""
    parts: dict[str, Tensor] = {}
    for kind in ("image", "audio", "series"):
        if kind in values:
            parts[tables[kind].name] = values[kind].load(index).reshape(tables[kind].shape)
    if "text" in values:
        ids = values["text"].load(index)
        parts |= framed(loaded.model, ids, _front(loaded), tables["text"].shape[0])
    return parts


def _hash(values: Given, written: Tensor | None, index: int, seed: int) -> str:
    pieces = [samples.hashes[index] for samples in values.values()] or [f"{seed} {index}"]
    pieces += [] if written is None else [digest(written)]
    return hashlib.sha256("".join(pieces).encode()).hexdigest()[:16]


def _drawn(kind: str, loaded: LoadedModel, n: int, seed: int) -> Samples:
    if kind == "image":
        return synthetic.drawn("mixed", _seeing(loaded), n, seed, balanced=False)
    return audio.drawn(loaded, n, seed) if kind == "audio" else series.drawn(loaded, n, seed)


def _seeing(loaded: LoadedModel) -> LoadedModel:
    """The model as one that reads an image alone."""
    shape = _part(loaded, "image", "images").shape[-3:]
    return replace(
        loaded.of_one_part("image", torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))), labels=None
    )


def _part(loaded: LoadedModel, kind: str, what: str) -> Part:
    part = by_kind(loaded.parts).get(kind)
    if part is None:
        names = ", ".join(p.name for p in loaded.parts)
        raise ModhifiError(f"{loaded.source} reads no {what} (it reads {names}); use other data, or synthetic")
    return part


def _front(loaded: LoadedModel) -> int:
    """How many tokens of its text the model gives to an image."""
    if image_token(loaded.model.config) is None or loaded.packing is None:
        return 0
    ids = loaded.packing.nest(loaded.example[:1])["input_ids"]
    return int((ids == image_token(loaded.model.config)).sum())
