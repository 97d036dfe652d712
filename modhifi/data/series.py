"""Series of numbers that are drawn: trends, seasons and noise."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from modhifi.data.samples import Samples, synthetic_items
from modhifi.models.loaded import LoadedModel
from modhifi.models.parts import by_kind

SEASONS = 4


def drawn(loaded: LoadedModel, n: int, seed: int) -> Samples:
    """`n` drawn series as long as the model reads, each a random walk with seasons and noise."""
    shape = by_kind(loaded.parts)["series"].shape

    def load(index: int) -> Tensor:
        return series(shape, np.random.default_rng((seed, index)))

    return synthetic_items(load, n, f"synthetic, {n} series of trends, seasons and noise, seed {seed}")


def series(shape: tuple[int, ...], chance: np.random.Generator) -> Tensor:
    """One series, float32 ``(length,)`` or ``(length, channels)``."""
    length, channels = shape[0], shape[1] if len(shape) > 1 else 1
    time = np.arange(length)[:, None]
    values = chance.standard_normal((length, channels)).cumsum(0) * chance.uniform(0, 0.3, channels)
    for _ in range(int(chance.integers(1, SEASONS + 1))):
        period = length * chance.uniform(0.05, 1.0, channels)
        values += chance.uniform(0, 2, channels) * np.sin(2 * np.pi * (time / period + chance.random(channels)))
    values += chance.uniform(0.05, 0.5) * chance.standard_normal((length, channels))
    return torch.from_numpy(values.reshape(shape)).float()
