"""The inputs of models of transformers that read more than pixels or token ids alone: sounds, series, several at once.

Each is a part: an argument of the forward pass, what it holds, and the shape of one item's. A decoder's tokens are a
part as well, since the model itself can go on from what its encoder reads.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from modhifi.errors import ModhifiError
from modhifi.models import hub
from modhifi.models.given import MAKERS, SOUNDS, field, given, main_input, series_length
from modhifi.models.listening import FRAMES, Listener, samples_of

# Tokens that an encoder and a decoder read where the model takes as many.
TEXT, WRITTEN = 128, 64
# What a model without a vocabulary reads are the codes of characters.
CHARACTERS = 128
# Heads that make their decoder's tokens themselves.
SHIFTING = ("Classification", "QuestionAnswering")
PartKind = Literal["text", "mask", "image", "audio", "series", "decoder", "given"]


@dataclass(frozen=True)
class Part:
    """One input: the ``name`` of the argument, what it holds, and the ``shape`` of one item's, without a batch axis."""

    name: str
    kind: PartKind
    shape: tuple[int, ...]


def reads_both(model: Any) -> bool:
    """Whether a model reads images and text together, in two towers or in one stream."""
    takes = inspect.signature(model.forward).parameters
    towers = hasattr(model.config, "vision_config") and hasattr(model.config, "text_config")
    return towers and "input_ids" in takes and "pixel_values" in takes


def parts_of(
    model: Any, pixels: tuple[int, ...] | None, listener: Listener | None, warnings: list[str]
) -> tuple[Part, ...]:
    """The parts of a model; none for one that reads pixels alone, or token ids alone, or nothing that is known."""
    parts = every_part(model, pixels, listener, warnings)
    alone = {part.kind for part in parts} <= {"text", "mask"} or [part.kind for part in parts] == ["image"]
    return () if alone else parts


def every_part(
    model: Any, pixels: tuple[int, ...] | None, listener: Listener | None, warnings: list[str]
) -> tuple[Part, ...]:
    """What a model reads, be it one thing alone.

    ``pixels`` is the shape of a prepared image. A warning is added where a model of images and text takes images in
    a form that is not known: only its text is left then.
    """
    config, main = model.config, main_input(model)
    takes = inspect.signature(model.forward).parameters
    both = reads_both(model)
    parts = []
    if (main == "input_ids" and main in takes) or both:
        length = _positions(text_config(config), ("max_position_embeddings", "n_positions"), TEXT)
        if image_token(config) is not None and pixels is not None:
            try:
                length += image_tokens(model, torch.randn(1, *pixels))
            except Exception as error:  # a model's own code may raise anything
                reason = f"the model did not run on drawn ones ({hub.first_line(error)})"
                warnings.append(f"images are left out, and what reads them stays as it is: {reason}")
                pixels = None
        parts.append(Part("input_ids", "text", (length,)))
        if "attention_mask" in takes:
            parts.append(Part("attention_mask", "mask", (length,)))
    if (main == "pixel_values" or both) and pixels is not None:
        parts.append(Part("pixel_values", "image", pixels))
    if main in SOUNDS:
        parts.append(Part(main, "audio", _sound_shape(config, main, listener)))
    if main == "past_values":
        parts.append(Part(main, "series", _series_shape(config)))
    if "decoder_input_ids" in takes and config.is_encoder_decoder and not type(model).__name__.endswith(SHIFTING):
        names = ("max_target_positions", "max_position_embeddings")
        length = _positions(text_config(config, decoder=True), names, WRITTEN)
        if any(part.kind == "text" and part.shape == (length,) for part in parts):
            length -= (
                1  # rows of as many tokens as the encoder reads would be taken for its own, and masked as they are
            )
        parts.append(Part("decoder_input_ids", "decoder", (length,)))
    return tuple(parts)


def _positions(config: Any, names: tuple[str, ...], most: int) -> int:
    return min([int(value) for name in names if isinstance(value := getattr(config, name, None), int)] + [most])


def _sound_shape(config: Any, main: str, listener: Listener | None) -> tuple[int, ...]:
    if listener is not None:
        return tuple(listener(np.zeros(listener.samples, dtype=np.float32)).shape)
    bands = field(config, "num_mel_bins")
    if width := field(config, "feature_projection_input_dim", "input_dim", "input_feat_size"):
        return (FRAMES, int(width))
    if main == "input_values":
        return (samples_of(config),) if bands is None else (int(field(config, "max_length") or FRAMES), int(bands))
    if hasattr(config, "max_source_positions") and not hasattr(config, "input_feat_per_channel"):
        return (int(bands or 80), 2 * int(config.max_source_positions))  # Whisper halves its frames
    return (FRAMES, int(getattr(config, "input_feat_per_channel", 0) or bands or 80))


def _series_shape(config: Any) -> tuple[int, ...]:
    channels = getattr(config, "num_input_channels", None)
    length = series_length(config, "context_length") or TEXT
    return (length,) if channels is None else (length, int(channels))


def image_token(config: Any) -> int | None:
    """The token id in whose place a model of images and text puts what it has seen; None for two towers."""
    for name in ("image_token_id", "image_token_index"):
        if isinstance(value := getattr(config, name, None), int):
            return value
    return None


@torch.no_grad()
def image_tokens(model: Any, pixels: Tensor) -> int:
    """How many tokens of its text one image takes, ``pixels`` a batch of one."""
    owner = model if hasattr(model, "get_image_features") else model.model
    takes = inspect.signature(owner.get_image_features).parameters
    beside = [name for name, p in takes.items() if name in MAKERS and p.default is inspect.Parameter.empty]
    shapes, chance = {"pixel_values": tuple(pixels.shape[1:])}, torch.Generator().manual_seed(0)
    more = given(model, [name for name in beside if name not in shapes], shapes, chance)
    features = owner.get_image_features(
        pixel_values=pixels.to(next(model.parameters()).dtype), **{name: item[None] for name, item in more.items()}
    )
    features = getattr(features, "pooler_output", features)
    pieces = [features] if isinstance(features, Tensor) else list(features)
    return sum(piece.shape[:-1].numel() for piece in pieces)


def text_config(config: Any, decoder: bool = False) -> Any:
    """The configuration of the part of a model that reads text, or of its decoder."""
    return getattr(config, "text_config", None) or config.get_text_config(decoder=decoder)


def special_tokens(config: Any) -> set[int]:
    """The token ids that stand for no text: padding, beginnings, ends, images."""
    configs = (config, text_config(config), text_config(config, decoder=True))
    names = ("pad", "bos", "eos", "sep", "cls", "mask", "image", "decoder_start", "video", "audio", "boi", "eoi")
    values = [getattr(c, f"{name}_token_id", None) for c in configs for name in names] + [image_token(config)]
    return {token for value in values for token in (value if isinstance(value, list) else [value]) if token is not None}


def vocabulary_of(config: Any, decoder: bool = False) -> int:
    """How many different tokens the encoder, or the decoder, of a model knows; characters where it counts none."""
    return int(field(text_config(config, decoder), "vocab_size", "src_vocab_size") or CHARACTERS)


def drawn_tokens(config: Any, length: int, chance: torch.Generator, decoder: bool = False) -> Tensor:
    """Seeded tokens of text, int64 ``(length,)``, none of them special."""
    special = special_tokens(config)
    ordinary = torch.tensor([i for i in range(vocabulary_of(config, decoder)) if i not in special])
    return ordinary[torch.randint(len(ordinary), (length,), generator=chance)]


def framed(model: Any, text: Tensor, images: int, length: int) -> dict[str, Tensor]:
    """The text parts of one item: ``images`` image tokens, then ``text``, an end, and padding up to ``length``."""
    config, kind = model.config, torch.int64
    token, inner = image_token(config), text_config(config)
    front = torch.full((images,), token, dtype=kind) if token is not None else torch.zeros(0, dtype=kind)
    end = inner.eos_token_id if isinstance(getattr(inner, "eos_token_id", None), int) else None
    room = length - len(front)
    text = text[:room]
    if token is None and end is not None and len(text) and int(text[-1]) != end:
        text = torch.cat([text[: room - 1], torch.tensor([end])])
    ids = torch.cat([front, text])
    pad = inner.pad_token_id if isinstance(getattr(inner, "pad_token_id", None), int) else 0
    padded = torch.cat([ids, torch.full((length - len(ids),), pad, dtype=kind)])
    return {"input_ids": padded, "attention_mask": (torch.arange(length) < len(ids)).long()}


def first_token(model: Any) -> int:
    """The token from which a decoder starts."""
    owners = (model.config, text_config(model.config, decoder=True), getattr(model, "generation_config", None))
    for name in ("decoder_start_token_id", "bos_token_id", "pad_token_id"):
        for owner in owners:
            if isinstance(value := getattr(owner, name, None), int):
                return value
    return 0


def example_of(model: Any, parts: tuple[Part, ...]) -> dict[str, Tensor]:
    """A seeded batch of 2 items of every part: noise, and tokens that mean nothing."""
    chance, batch = torch.Generator().manual_seed(0), dict[str, Tensor]()
    for part in parts:
        if part.kind == "text":
            pixels = next((p.shape for p in parts if p.kind == "image"), None)
            images = 0 if image_token(model.config) is None or pixels is None else _image_room(model, pixels)
            texts = [drawn_tokens(model.config, part.shape[0], chance) for _ in range(2)]
            items = [framed(model, text, images, part.shape[0]) for text in texts]
            batch |= {name: torch.stack([item[name] for item in items]) for name in items[0]}
        elif part.kind == "decoder":
            start = torch.full((2, 1), first_token(model))
            more = [drawn_tokens(model.config, part.shape[0] - 1, chance, decoder=True) for _ in range(2)]
            batch[part.name] = torch.cat([start, torch.stack(more)], 1)
        elif part.kind not in ("mask", "given"):
            batch[part.name] = torch.randn(2, *part.shape, generator=chance)
    items = [given_items(model, parts, chance) for _ in range(2)]
    batch |= {name: torch.stack([item[name] for item in items]) for name in items[0]}
    return {part.name: batch[part.name] for part in parts}


def given_items(model: Any, parts: tuple[Part, ...], chance: torch.Generator) -> dict[str, Tensor]:
    """One item of every part that is given beside what a model reads (:mod:`modhifi.models.given`)."""
    shapes = {part.name: part.shape for part in parts if part.kind == "given"}
    items = given(model, list(shapes), {part.name: part.shape for part in parts}, chance)
    return {name: item.reshape(shapes[name]) for name, item in items.items()}


def _image_room(model: Any, pixels: tuple[int, ...]) -> int:
    return image_tokens(model, torch.randn(1, *pixels))


def require_parts(parts: tuple[Part, ...], source: str, main: str) -> None:
    """Raise ModhifiError for a model that reads nothing that is known."""
    if not parts:
        raise ModhifiError(
            f"{source} reads {main!r}; only pixels, token ids, sounds, series and their usual combinations are "
            "supported: from Python, give items that hold its inputs"
        )


def by_kind(parts: tuple[Part, ...]) -> Mapping[str, Part]:
    """The parts by what they hold."""
    return {part.kind: part for part in parts}
