"""What a model of transformers reads where that is not what it is usually fed: found by trying other forms."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from modhifi.errors import ModhifiError
from modhifi.models.given import LISTS, first_read, flat_among, given, missing
from modhifi.models.listening import FRAMES, RATE, Listener
from modhifi.models.loaded import LoadedModel
from modhifi.models.packing import Packing, pack_batch
from modhifi.models.parts import Part, PartKind, every_part, example_of


def completed(loaded: LoadedModel) -> LoadedModel:
    """The model with what else its forward pass asks for, where it fails without and that is found by trying."""
    shape = tuple(loaded.example.shape[1:]) if loaded.kind == "image" else None
    others = list(alternatives(loaded.model, loaded.parts, shape, loaded.listener))
    if not others or _runs(loaded):
        return loaded
    for parts, batch in drawn(loaded.model, others):
        kind, packing, example = fed(parts, batch)
        sound = next((part.shape for part in parts if part.kind == "audio"), None)
        listener = loaded.listener if loaded.listener is None or sound is None else loaded.listener.shaped(sound)
        other = replace(loaded, parts=parts, packing=packing, example=example, kind=kind, listener=listener)
        if _runs(other):
            return other
    return loaded


def drawn(model: Any, forms: Iterable[tuple[Part, ...]]) -> Iterator[tuple[tuple[Part, ...], dict[str, Tensor]]]:
    """Some forms of what a model may read, with an example; without those that it cannot have."""
    for parts in forms:
        with suppress(Exception):  # a model's own code, and what is drawn for another kind of model
            yield parts, example_of(model, parts)


def fed(parts: tuple[Part, ...], batch: dict[str, Tensor]) -> tuple[str, Packing | None, Tensor]:
    """The kind of a model that reads some parts, the form of its items, and its example."""
    if len(parts) == 1 and parts[0].kind != "given":
        return parts[0].kind, None, batch[parts[0].name]
    packing, example = pack_batch(batch)
    return "tensor", replace(packing, flat=flat_among(packing.names)), example


@torch.no_grad()
def _runs(loaded: LoadedModel) -> bool:
    with torch.random.fork_rng(devices=[]):
        try:
            loaded.require_runs()
        except ModhifiError:
            return False
    return True


def alternatives(
    model: Any, parts: tuple[Part, ...], pixels: tuple[int, ...] | None, listener: Listener | None
) -> Iterator[tuple[Part, ...]]:
    """Other parts that a model could read, likely ones first: sounds of another form, and what it could miss."""
    base = parts or every_part(model, pixels, listener, [])
    forms = [base]
    sound = next((part for part in base if part.kind == "audio"), None)
    if sound is not None and (listener is None or len(sound.shape) == 1):
        raw = [(FRAMES * RATE // 100,), (1, *sound.shape)] if sound.name == "input_values" else []
        for shape in (sound.shape[::-1], (FRAMES, math.prod(first_read(model))), *raw):
            forms.append(tuple(replace(part, shape=shape) if part is sound else part for part in base))
    if any(part.kind == "decoder" for part in base):
        forms.append(tuple(part for part in base if part.kind != "decoder"))
    for form in forms:
        more = missing(model, {part.name for part in form})
        with_codes = [names for names in more if "decoder_input_ids" in names]  # before the start that it makes itself
        for names in [*with_codes, *([()] if form is not base else []), *more]:
            rest = tuple(part for part in form if part.name not in names)
            shapes = {part.name: part.shape for part in rest}
            with suppress(KeyError, StopIteration):  # what goes along with a part that this model has not
                drawn = given(model, list(names), shapes, torch.Generator().manual_seed(0))
                yield (*rest, *(Part(name, _kind(name, value), tuple(value.shape)) for name, value in drawn.items()))
                flat = {name: value.flatten(1) if name in LISTS else value for name, value in drawn.items()}
                if any(flat[name].ndim < value.ndim for name, value in drawn.items()):
                    yield (*rest, *(Part(name, "given", tuple(value.shape)) for name, value in flat.items()))


def _kind(name: str, value: Tensor) -> PartKind:
    return "image" if name == "pixel_values" and value.ndim == 3 else "given"
