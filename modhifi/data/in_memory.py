"""Samples from what a Python program holds: tensors, a list of images, a Dataset."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

import torch
from PIL import Image
from torch import Tensor, nn

from modhifi.data.image_inputs import scored_classes
from modhifi.data.mixture import Mixture, is_named
from modhifi.data.samples import Samples, digest
from modhifi.errors import ModhifiError
from modhifi.models.loaded import LoadedModel
from modhifi.models.packing import Packing, is_several
from modhifi.models.parts import vocabulary_of


@runtime_checkable
class Indexed(Protocol):
    """What a map-style ``torch.utils.data.Dataset``, a list and a batched tensor have in common."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Any: ...


Data = str | Samples | Indexed | Mixture
"""Source strings (see :func:`modhifi.data.sources.load_samples`), samples, items that a program holds, or several."""


def from_items(
    items: Indexed,
    transform: Callable[[Image.Image], Tensor] | None,
    *,
    n: int,
    seed: int,
    ragged: bool = False,
    packing: Packing | None = None,
    tokens: int | None = None,
) -> Samples:
    """At most ``n`` different items, chosen and ordered by ``seed``; ``ragged`` ones are texts of several lengths.

    An item is a model-ready tensor without a batch axis, a PIL image (``transform`` prepares it), several inputs (a
    tuple or mapping of tensors in the form of ``packing``, which packs them), or a pair of one of these with a class
    index; -1 is none. Of a pair with any other target, such as a mask, the input counts alone. Asking for an item again
    must give the same one: no random augmentation. ``items`` that draw what they return, a sampler, say so by an
    attribute ``synthetic`` that is true: batch statistics apply to them.
    ``tokens`` is how many different ones the model knows.
    Raises ModhifiError for anything else, for labels on some items only, and where there is nothing.
    """
    if len(items) == 0:
        raise ModhifiError("the data holds no items; give at least a few dozen")

    def read(index: int) -> tuple[Tensor, float | None]:
        item, label = items[index], None
        if _is_labelled(item) and not (packing is not None and packing.fits(item)):
            item, label = item[0], _class_index(item[1], index)
        item = packing.pack(item) if packing is not None else _without_target(item)
        if isinstance(item, Image.Image):
            if transform is None:
                raise ModhifiError("this model brings no preprocessing for images; give tensors that it reads")
            item = transform(item)
        if not isinstance(item, Tensor):
            raise ModhifiError(
                f"item {index} of the data is {type(item).__name__}; give tensors, PIL images, or pairs "
                "of one with a class index"
            )
        if item.is_floating_point() and not bool(item.isfinite().all()):
            raise ModhifiError(f"item {index} of the data holds NaN or infinite values; repair it or leave it out")
        if tokens is not None and item.numel() and int(item.max()) >= tokens:
            raise ModhifiError(
                f"item {index} of the data holds the token {int(item.max())}, and the model knows {tokens} of them, "
                "from 0 on; give tokens of its own tokenizer"
            )
        return item.detach().cpu(), label

    order = torch.randperm(len(items), generator=torch.Generator().manual_seed(seed)).tolist()
    chosen: dict[str, tuple[int, float | None]] = {}
    shape: torch.Size | None = None
    for index in order:
        if len(chosen) == n:
            break
        tensor, label = read(index)
        shape = shape or tensor.shape
        if tensor.shape != shape and not (ragged and tensor.ndim == 1):
            raise ModhifiError(
                f"item {index} of the data is {tuple(tensor.shape)} and another {tuple(shape)}; give items of one shape"
            )
        chosen.setdefault(digest(tensor), (index, label))
    places = [index for index, _ in chosen.values()]
    given = [label for _, label in chosen.values() if label is not None]
    # Values are no classes; as data sets of the hub have it, -1 stands for none.
    labels = [label for label in given if label >= 0] if all(map(float.is_integer, given)) else []
    if labels and len(labels) < len(places):
        raise ModhifiError("some items of the data have a label and some have none; give all of them one, or none")
    kind = type(items).__name__
    return Samples(
        load=lambda i: read(places[i])[0],
        hashes=tuple(chosen),
        labels=torch.tensor(labels, dtype=torch.long) if labels else None,
        names=tuple(f"{kind} {index}" for index in places),
        description=f"{len(places)} of {len(items)} items of a {kind}, seed {seed}",
        synthetic=bool(getattr(items, "synthetic", False)),
    )


def _class_index(label: Any, index: int) -> float:
    """The label of an item, which is no class where it is no whole number, as the target of a regression."""
    try:
        value = float(label)
        if not math.isfinite(value):
            raise ValueError
        return value
    except (TypeError, ValueError):
        text = repr(label) if isinstance(label, str | float | None) else f"a {type(label).__name__}"
        raise ModhifiError(f"the label of item {index} of the data is {text}; give class indices") from None


def _is_labelled(item: Any) -> bool:
    """Whether an item is a pair of an input, or several, and a class index, rather than two inputs."""
    if not isinstance(item, tuple | list) or len(item) != 2:
        return False
    second = item[1]
    if isinstance(second, Tensor):
        return second.ndim == 0 or (second.numel() == 1 and not second.is_floating_point())
    return not is_several(second)


def _without_target(item: Any) -> Any:
    """The input of a pair with what it should give, a mask or boxes, for a model that reads one tensor."""
    pair = isinstance(item, tuple | list) and len(item) == 2 and isinstance(item[0], Tensor | Image.Image)
    return item[0] if pair else item


def _reads_one(module: object) -> bool:
    """Whether a module's forward has a place for one input alone."""
    if not isinstance(module, nn.Module):
        return False
    with suppress(TypeError, ValueError):  # code of C++ tells nothing
        arguments = inspect.signature(module.forward).parameters.values()
        return len(arguments) == 1 and all(a.kind is not a.VAR_POSITIONAL for a in arguments)
    return False


def several_inputs(data: Data, model: object = None) -> Any:
    """An example batch of two items that have several inputs each; None for data of another kind.

    A pair for a ``model`` that reads one input is that input and a target.
    """
    data = held_items(data)
    if isinstance(data, str | Samples | Tensor | Mapping) or not isinstance(data, Indexed) or not len(data):
        return None
    items = [data[i] for i in (0, min(1, len(data) - 1))]
    inputs = [item[0] if _is_labelled(item) else item for item in items]
    if _reads_one(model):
        inputs = [_without_target(item) for item in inputs]
    if not is_several(inputs[0]):
        return None
    packing = Packing.of(inputs[0])
    return packing.nest(torch.stack([packing.pack(one) for one in inputs]))


def first_items(items: Indexed, count: int = 2) -> Tensor:
    """The first model-ready items, stacked: an example batch for a module that brings none."""
    _require_indexed(items)
    samples = from_items([items[i] for i in range(min(count, len(items)))], None, n=count, seed=0)
    return next(samples.batches(count))


def images_of_other_size(data: Data, loaded: LoadedModel) -> Tensor | None:
    """The first two images that a program holds, stacked, where their size is not that of the model's example."""
    items = held_items(data)
    if isinstance(items, str | Mapping) or not isinstance(items, Samples | Indexed) or loaded.kind != "image":
        return None
    found: list[Any] = [items.load(i) if isinstance(items, Samples) else items[i] for i in range(min(2, len(items)))]
    images = [item[0] if _is_labelled(item) else item for item in found]
    tensors, known = [image for image in images if isinstance(image, Tensor)], loaded.example.shape[1:]
    shapes = {image.shape for image in tensors}
    if len(tensors) < len(images) or len(shapes) != 1:
        return None
    (shape,) = shapes
    if len(shape) != len(known) or shape[0] != known[0] or shape == known:
        return None
    return torch.stack(tensors).to(loaded.example.dtype)


def held_items(data: Data) -> str | Samples | Indexed:
    """The first source of a mixture that is no string, else its first; other data is what it is."""
    if isinstance(data, str) or is_named(data):
        return data if isinstance(data, str) else str(data[0])  # type: ignore[index]
    sources: tuple[str | Samples | Indexed, ...] = Mixture.of(data).sources
    return next((source for source in sources if not isinstance(source, str)), sources[0])


def source_name(data: Data) -> str | list[str]:
    """What a recipe calls data: the source string, ``python:TYPE`` for what a program holds, a list of both."""
    if isinstance(data, str):
        return data
    if isinstance(data, Mixture):
        return [f"{source_name(source)}@{share:.9g}" for source, share in data]
    if is_named(data):
        return [str(source) for source in data]  # type: ignore[union-attr]
    return f"python:{'Samples' if isinstance(data, Samples) else type(data).__name__}"


def samples_from(data: Samples | Indexed, loaded: LoadedModel, *, n: int, seed: int) -> Samples:
    """At most ``n`` samples of data that a program holds; labels beyond the model's classes are none."""
    if isinstance(data, Samples):
        return data if len(data) <= n else data.subset(range(n))
    _require_indexed(data)
    samples = from_items(
        data,
        loaded.transform,
        n=n,
        seed=seed,
        ragged=loaded.reads_tokens,
        packing=loaded.packing,
        tokens=vocabulary_of(loaded.model.config) if loaded.reads_tokens else None,
    )
    if samples.labels is None:
        return samples
    classes, last = scored_classes(loaded), int(samples.labels.max())
    if classes is None or last < classes:
        return samples
    note = f"labels unused: class index {last} of a model of {classes} classes"
    return replace(samples, labels=None, description=f"{samples.description}; {note}")


def _require_indexed(data: object) -> None:
    """Raises ModhifiError for what is no sequence of items, such as a DataLoader."""
    if not isinstance(data, Indexed) or isinstance(data, dict | Sequence) and not isinstance(data, list | tuple):
        raise ModhifiError(f"data is {type(data).__name__}; give a source string, a tensor, a list or a Dataset")
