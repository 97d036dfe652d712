"""Synthetic images as samples, spread over the classes that the model itself predicts."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from modhifi.data import procedural
from modhifi.data.image_inputs import class_count, image_shape, normalisation
from modhifi.data.samples import Samples, synthetic_items
from modhifi.errors import ModhifiError
from modhifi.models.loaded import LoadedModel
from modhifi.progress import Progress, silent

# Images drawn at most for every one kept when a synthetic set is balanced, as far as their pixels stay within the
# budget: 668 candidates of 224x224, 8,192 of 64x64. Pixels, not seconds, so that a run can be repeated anywhere.
CANDIDATES = 10
CANDIDATE_PIXELS = 2**25


def balance(samples: Samples, loaded: LoadedModel, n: int, batch: int = 64, progress: Progress = silent) -> Samples:
    """The `n` samples that are spread most evenly over the classes the model predicts, without any label.

    Every class gives its next sample in turn until `n` are chosen; the order of `samples` is kept. The predictions are
    `loaded.model`'s own (arg max of its logits, eval mode); as soon as every class has its share, no more are made.
    Raises ModhifiError if the model is no classifier.
    """
    count = class_count(loaded)
    if count is None:
        raise ModhifiError(f"{loaded.source} is no classifier; its samples cannot be balanced over classes")
    share, drawn_of = math.ceil(n / count), [0] * count
    predicted, rank = list[int](), list[int]()
    with torch.no_grad():
        for inputs in samples.batches(batch):
            for label in loaded.logits(inputs).argmax(dim=1).tolist():
                predicted.append(label)
                rank.append(drawn_of[label])
                drawn_of[label] += 1
            placed = sum(min(number, share) for number in drawn_of)
            progress("drawing", min(placed, n), n)
            if placed >= n:
                break
    progress("drawing", n, n)
    chosen = sorted(sorted(range(len(rank)), key=lambda i: rank[i])[:n])
    spread = samples.subset(chosen)
    classes = len({predicted[i] for i in chosen})
    return replace(spread, description=f"{spread.description}, spread over {classes} predicted classes")


def drawn(kind: str, loaded: LoadedModel, n: int, seed: int, balanced: bool, progress: Progress = silent) -> Samples:
    """Synthetic images at the model's input size."""
    if kind != "mixed" and kind not in procedural.KINDS:
        kinds = ", ".join(("mixed", "invert", *procedural.KINDS))
        raise ModhifiError(f"unknown kind of synthetic image '{kind}'; use one of {kinds}")
    channels, height, width = image_shape(loaded)
    mean, std = normalisation(loaded)

    def load(index: int) -> Tensor:
        pixels = torch.from_numpy(procedural.draw(kind, seed, index, height, width).copy())
        image = pixels.permute(2, 0, 1).float() / 255
        return ((image if channels == 3 else image.mean(dim=0, keepdim=True)) - mean) / std

    balanced = balanced and class_count(loaded) is not None
    total = min(n * CANDIDATES, max(n, CANDIDATE_PIXELS // (height * width))) if balanced else n
    samples = synthetic_items(
        load,
        total,
        f"synthetic:{kind}, {total} images of {height}x{width}, seed {seed}",
        lambda index: procedural.identity(kind, seed, index, height, width),
    )
    return balance(samples, loaded, n, progress=progress) if total > n else samples
