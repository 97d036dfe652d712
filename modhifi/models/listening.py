"""How a model prepares sound, and how much of it one item holds."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from modhifi.models import hub
from modhifi.models.given import SOUNDS, SPECTRUM, field, main_input

# Frames of sound where a model takes any number of them; samples a second.
FRAMES = SPECTRUM
RATE = 16_000


@dataclass(frozen=True)
class Listener:
    """A model's own preparation of sound: mono samples at ``rate`` a second, float32 ``(n,)``, to what it reads.

    ``samples`` is how many of them one item holds; ``extractor`` is transformers' own object, where there is one.
    """

    rate: int
    samples: int
    prepare: Callable[[np.ndarray], Tensor]
    extractor: Any | None = None

    @property
    def pads(self) -> bool:
        """Whether a shorter sound is filled up by the model's own preparation."""
        return hasattr(self.extractor, "n_samples") or hasattr(self.extractor, "max_length")

    def __call__(self, sound: np.ndarray) -> Tensor:
        return self.prepare(sound)

    def shaped(self, shape: tuple[int, ...]) -> Listener:
        """The same for a model that reads raw sound of another length, or with an axis of channels in front."""
        heard = self(np.zeros(self.samples, dtype=np.float32))
        if heard.ndim > 1 or shape not in ((shape[-1],), (1, shape[-1])):
            return self
        return replace(self, samples=shape[-1], prepare=lambda sound: self.prepare(sound).reshape(*shape[:-1], -1))


def samples_of(config: Any) -> int:
    """Samples of raw sound from which an encoder of convolutions makes so many frames."""
    if (length := field(config, "max_length")) and field(config, "num_mel_bins"):
        return int(length) * RATE // 100  # spectra have a frame each 10 milliseconds
    strides = field(config, "conv_stride")
    return FRAMES * math.prod(strides) + sum(field(config, "conv_kernel") or ()) if strides else 2 * RATE


def listener_of(model: Any, directory: Path | None, notes: list[str]) -> Listener | None:
    """How a model prepares sound: by the extractor of its directory, else raw samples of mean 0 and variance 1.

    None without such a file where it reads spectra.
    """
    config = model.config
    if directory is not None and (directory / "preprocessor_config.json").is_file():
        import transformers  # seconds, which whatever else needs this file does without

        with hub.explained(str(directory / "preprocessor_config.json")):
            extractor = transformers.AutoFeatureExtractor.from_pretrained(str(directory))
        rate = int(getattr(extractor, "sampling_rate", RATE))
        samples = int(getattr(extractor, "n_samples", 0)) or samples_of(config)
        return Listener(rate, samples, partial(_extract, extractor, rate), extractor)
    if main_input(model) == "input_values" and getattr(config, "num_mel_bins", None) is None:
        notes.append("no preprocessor_config.json: sounds are brought to mean 0 and variance 1, at 16,000 a second")
        return Listener(RATE, samples_of(config), _standardised)
    notes.append("no preprocessor_config.json: only drawn spectra are available, no sounds")
    return None


def _extract(extractor: Any, rate: int, sound: np.ndarray) -> Tensor:
    output = extractor(sound, sampling_rate=rate, return_tensors="pt")
    values: Tensor = next(output[name] for name in SOUNDS if name in output)[0]
    return values.float()


def _standardised(sound: np.ndarray) -> Tensor:
    return torch.from_numpy((sound - sound.mean()) / np.sqrt(sound.var() + 1e-7)).float()
