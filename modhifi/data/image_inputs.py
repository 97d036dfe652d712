"""What an image model takes: its size, its normalisation, its classes."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from modhifi.data import procedural
from modhifi.errors import ModhifiError
from modhifi.models.loaded import LoadedModel


def class_count(loaded: LoadedModel) -> int | None:
    """Number of classes of a classifier of images, or of several inputs; None for any other model.

    A backbone's features are no classes, nor are other values.
    """
    return None if loaded.example.ndim != 4 and loaded.packing is None else scored_classes(loaded)


def scored_classes(loaded: LoadedModel) -> int | None:
    """The number of classes that each item has a score for, whatever it is; None where outputs say something else."""
    if loaded.incomparable() or loaded.gives_values:
        return None
    with torch.no_grad():
        logits = loaded.logits(loaded.example)
    return int(logits.shape[1]) if logits.ndim == 2 else None


def classes_by_name(labels: Sequence[str] | None) -> dict[str, tuple[int, ...]]:
    """The class indices that each name may mean: a whole label or one of its comma-separated synonyms (:func:`plain`).

    Two classes may have one name, as the cranes of ImageNet have.
    """
    known: dict[str, tuple[int, ...]] = {}
    for index, label in enumerate(labels or ()):
        for name in {plain(part) for part in (label, *label.split(","))}:
            known[name] = (*known.get(name, ()), index)
    return known


def plain(name: str) -> str:
    """The name of a class in one spelling, whatever its case and whether spaces, hyphens or underscores part words."""
    return re.sub(r"[\s_-]+", " ", name).strip().lower()


def normalisation(loaded: LoadedModel) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation, float32 ``(C, 1, 1)``, such that the model's input is ``(pixel - mean) / std``.

    Pixels are in [0, 1]. Read off the model's own transform with a black and a white image; a model without one gets
    images with the mean and the spread of its example batch. Raises ModhifiError if the model takes no images.
    """
    channels, height, width = image_shape(loaded)
    if loaded.transform is not None:
        plain = [loaded.transform(Image.new("RGB", (width, height), colour)) for colour in ("black", "white")]
        # The centre, because a transform may pad.
        black, white = (image[:, image.shape[1] // 2, image.shape[2] // 2] for image in plain)
        std = 1 / (white - black)
        mean = -black * std
    else:
        example = loaded.example.float().transpose(0, 1).flatten(1)
        std = torch.from_numpy(procedural.PIXEL_STD).mean() / example.std(dim=1).clamp_min(1e-12)
        mean = torch.from_numpy(procedural.MEAN_COLOUR).mean() - example.mean(dim=1) * std
    if not bool(torch.isfinite(std).all() and (std.abs() < 1e9).all()):
        raise ModhifiError(f"cannot tell how {loaded.source} normalises its input; give a varied example batch")
    return mean.float().view(channels, 1, 1), std.float().view(channels, 1, 1)


def image_shape(loaded: LoadedModel) -> tuple[int, int, int]:
    """Channels, height and width of the model's input.

    Raises ModhifiError if it takes no images, or images of other channels than one or three.
    """
    shape = tuple(loaded.example.shape)
    takes_images = loaded.kind in ("image", "tensor") and len(shape) == 4
    if takes_images and shape[1] not in (1, 3):
        raise ModhifiError(
            f"{loaded.source} reads {shape[1]} channels, and files and drawn images have one or three; give tensors "
            "that it reads, from Python"
        )
    if not takes_images:
        hint = "give text, as text:PATH" if loaded.reads_tokens else "use another source"
        raise ModhifiError(f"{loaded.source} takes no images; {hint}")
    return shape[1], shape[2], shape[3]
