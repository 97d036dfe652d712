"""What a forward pass is to be given beside what a model reads: where things stand, which of them are padding, noise.

A table by the name of the argument; what a model is to be given is found by trying.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn

# Rows of noise that stand for what another model would hand over, frames of a film, patches to a side of an image.
ROWS, FRAMES, SIDE = 8, 4, 4
# Frames of a drawn sound.
SPECTRUM = 100
# The largest coordinate of a box on a page.
PAGE = 1000
# What a class may forget to name as its main input.
SOUNDS = ("input_features", "input_values", "audio_mel")
INPUTS = ("pixel_values", *SOUNDS, "past_values")
# Fields that count the pictures of a film.
FILMED = ("num_frames", "frames_per_clip")
# What a model reads of the time that it is to foresee: without, its decoder does not run.
FORECAST = "future_"

Shapes = dict[str, tuple[int, ...]]
"""The shapes of one item of what is there already, by the name of the argument."""
Maker = Callable[[nn.Module, Shapes, torch.Generator], Tensor]
"""One item of an argument, for a model, beside what is there already."""


def field(config: Any, *names: str) -> Any | None:
    """The first of some fields that a configuration, or one inside it, sets; None without any."""
    for part in _configs(config):
        for name in names:
            if (value := getattr(part, name, None)) is not None:
                return value
    return None


def main_input(model: Any) -> str:
    """The argument that a forward pass reads first: the one that the class names, if there is one of that name."""
    takes = list(inspect.signature(model.forward).parameters)
    named: str = model.main_input_name
    return named if named in takes else next((name for name in takes if name in INPUTS), named)


def _configs(config: Any) -> Iterator[Any]:
    yield config
    for name in getattr(config, "sub_configs", None) or ():
        if (inner := getattr(config, name, None)) is not None:
            yield from _configs(inner)


def _noise(*fields: str, rows: int = ROWS) -> Maker:
    def make(model: Any, _: Shapes, chance: torch.Generator) -> Tensor:
        return torch.randn(rows, int(field(model.config, *fields, "hidden_size") or 1), generator=chance)

    return make


def _picture(model: Any, chance: torch.Generator, *frames: int) -> Tensor:
    size = field(model.config, "image_size", "crop_size") or 224
    height, width = (size, size) if isinstance(size, int) else tuple(size)[-2:]
    return torch.randn(*frames, int(field(model.config, "num_channels") or 3), height, width, generator=chance)


def _film(model: Any, _: Shapes, chance: torch.Generator) -> Tensor:
    return _picture(model, chance, int(field(model.config, *FILMED) or FRAMES))


def first_read(model: nn.Module) -> tuple[int, ...]:
    """The shape of what the first operator of a model reads for one of its outputs."""
    kinds = (nn.Linear, nn.modules.conv._ConvNd)
    return next((tuple(m.weight.shape[1:]) for m in model.modules() if isinstance(m, kinds)), (1,))


def _patches(model: nn.Module, shapes: Shapes, chance: torch.Generator) -> Tensor:
    """Patches one after the other where something says how they lie, else a film, or an image."""
    if INSTEAD.keys() & inspect.signature(model.forward).parameters:
        return torch.randn(SIDE * SIDE, *first_read(model), generator=chance)
    return _film(model, shapes, chance) if field(model.config, *FILMED) else _picture(model, chance)


def _places(model: nn.Module, _: Shapes, chance: torch.Generator) -> Tensor:
    """Patches that begin with their row and their column, counted from 1."""
    grid = 1.0 + torch.cartesian_prod(torch.arange(SIDE), torch.arange(SIDE))
    return torch.cat([grid, torch.randn(SIDE * SIDE, math.prod(first_read(model)), generator=chance)], -1)


def _tokens(model: nn.Module, _: Shapes, chance: torch.Generator) -> Tensor:
    return torch.randint(3, ROWS, (ROWS,), generator=chance)


def _codes(model: Any, _: Shapes, chance: torch.Generator) -> Tensor:
    """A token of every codebook at each step of a sound that is written."""
    books = field(model.config, "num_codebooks", "num_channels")
    if books is None:
        raise KeyError("num_codebooks")
    return torch.randint(3, ROWS, (ROWS, int(books)), generator=chance)


def _box(model: Any, shapes: Shapes, chance: torch.Generator) -> Tensor:
    """A box around every token: left, top, right, bottom."""
    corners = torch.randint(PAGE // 2, (*shapes["input_ids"], 2), generator=chance)
    boxes = torch.cat([corners, corners + PAGE // 4], -1)
    most = field(model.config, "max_2d_position_embeddings")
    return boxes % int(most) if most else boxes / PAGE


def _spectrum(model: Any, _: Shapes, chance: torch.Generator) -> Tensor:
    """A spectrum as an image of one channel where it is cut into patches, else frames of bands."""
    bands = int(field(model.config, "num_mel_bins", "feature_size") or 1)
    as_image = field(model.config, "spec_size") is not None
    return torch.randn(*((1, SPECTRUM, bands) if as_image else (bands, SPECTRUM)), generator=chance)


def _features_of(*fields: str) -> Maker:
    """Features of the time at every step of a series of some lengths."""

    def make(model: Any, _: Shapes, chance: torch.Generator) -> Tensor:
        count = int(field(model.config, "num_time_features") or 0)
        return torch.randn(series_length(model.config, *fields), count, generator=chance)

    return make


def series_length(config: Any, *fields: str) -> int:
    """The length that some fields of a configuration add up to; of what goes before, with its longest lag."""
    lags = field(config, "lags_sequence") if "context_length" in fields else None
    return sum(int(field(config, name) or 0) for name in fields) + max(lags or [0])


def _frames(model: nn.Module, shapes: Shapes, _: torch.Generator) -> Tensor:
    """Every frame of a sound counts."""
    frames = sorted(shapes["input_features"], key=SPECTRUM.__eq__)[-1]
    return torch.ones(frames, dtype=torch.int64)


def _nothing_padded(model: nn.Module, shapes: Shapes, _: torch.Generator) -> Tensor:
    """No frame of a spectrum is padding."""
    return torch.zeros(shapes["audio_mel"][0], dtype=torch.bool)


def _pixels(model: nn.Module, shapes: Shapes, _: torch.Generator) -> Tensor:
    """Every pixel of an image counts."""
    return torch.ones(shapes["pixel_values"][-2:], dtype=torch.int64)


def _listed(model: nn.Module, shapes: Shapes, _: torch.Generator) -> Tensor:
    """Every patch of a list counts."""
    return torch.ones(shapes["pixel_values"][0], dtype=torch.int64)


def _whole_patches(model: Any, shapes: Shapes, _: torch.Generator) -> Tensor:
    """Every patch of an image counts."""
    size = int(field(model.config, "patch_size") or 1)
    return torch.ones([length // size for length in shapes["pixel_values"][-2:]], dtype=torch.bool)


MAKERS: dict[str, Maker] = {
    "grid_thw": lambda *_: torch.tensor([1, SIDE, SIDE]),
    "spatial_shapes": lambda *_: torch.tensor([SIDE, SIDE]),
    "pixel_position_ids": lambda *_: torch.cartesian_prod(torch.arange(SIDE), torch.arange(SIDE)),
    "bbox": _box,
    "input_features_mask": _frames,
    "audio_mel_mask": _nothing_padded,
    "pixel_mask": _pixels,
    "pixel_attention_mask": _listed,
    "patch_attention_mask": _whole_patches,
    "pixel_values": _patches,
    "hidden_states": _patches,
    "pixel_values_videos": _film,
    "flattened_patches": _places,
    "input_ids": _tokens,
    "decoder_input_ids": _codes,
    "qformer_input_ids": _tokens,
    "query_embeds": _noise(),
    "input_features": _spectrum,
    "past_observed_mask": lambda _, shapes, __: torch.ones(shapes["past_values"]),
    "past_time_features": _features_of("context_length"),
    "future_values": lambda model, _, chance: torch.randn(
        series_length(model.config, "prediction_length"), generator=chance
    ),
    "future_time_features": _features_of("prediction_length"),
    "states": _noise("state_dim"),
    "actions": _noise("act_dim"),
    "returns_to_go": lambda _, __, chance: torch.randn(ROWS, 1, generator=chance),
    "timesteps": lambda *_: torch.arange(ROWS),
    "encoder_hidden_states": _noise("encoder_hidden_size", "cross_attention_hidden_size"),
}
# What a model reads in another form where it is told how that lies, and whether its rows are then those of all items.
INSTEAD = {"grid_thw": True, "spatial_shapes": False, "pixel_position_ids": False}
LISTS = ("hidden_states", "pixel_values")


def missing(model: Any, there: Collection[str]) -> list[tuple[str, ...]]:
    """Sets of arguments that a model could miss: those that it requires, each that is known, all of these, a film."""
    takes = inspect.signature(model.forward).parameters
    known = [name for name in takes if name in MAKERS and name not in there and name != "hidden_states"]
    required = tuple(
        name for name in known if takes[name].default is inspect.Parameter.empty or name.startswith(FORECAST)
    )
    sets = [required, *((name,) for name in known), tuple(known)]
    lists = tuple(name for name in LISTS if name in takes)
    together = [(*dict.fromkeys((*(lists if INSTEAD.keys() & set(names) else ()), *names)),) for names in sets]
    film = [("pixel_values",)] if "pixel_values" in there and field(model.config, *FILMED) else []
    return list(dict.fromkeys([*filter(None, together), *film]))


def given(model: nn.Module, names: list[str], shapes: Shapes, chance: torch.Generator) -> dict[str, Tensor]:
    """One item of each of some arguments, ``shapes`` being those of what is there already."""
    items: dict[str, Tensor] = {}
    for name in names:
        items[name] = MAKERS[name](model, shapes | {n: tuple(item.shape) for n, item in items.items()}, chance)
    return items


def flat_among(names: Collection[str]) -> tuple[str, ...]:
    """The arguments of rows, those of all items one after the other, where a grid says how they lie."""
    flat = any(INSTEAD.get(name) for name in names)
    return tuple(name for name in names if flat and name in LISTS)
