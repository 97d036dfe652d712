"""Images that a user has: a directory of files, or a dataset of the Hugging Face hub."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from modhifi.data.hidden import is_hidden
from modhifi.data.image_inputs import class_count, classes_by_name, image_shape, plain
from modhifi.data.samples import Samples
from modhifi.errors import ModhifiError
from modhifi.models import hub
from modhifi.models.loaded import LoadedModel
from modhifi.models.preprocess import to_mode

IMAGE_FILES = frozenset((".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"))
# Below this size prepared images stay in memory; above it they are read again at every pass.
CACHE_BYTES = 2**30
# Items decoded at a time: an interrupt waits for no more than this.
CHUNK = 256


@dataclass(frozen=True)
class _Item:
    name: str
    label: int | None
    open: Callable[[], Image.Image]


@dataclass(frozen=True)
class _Read:
    digest: str
    tensor: Tensor | None
    problem: str | None


def from_directory(directory: Path, loaded: LoadedModel, n: int, seed: int, name: str | None = None) -> Samples:
    """At most `n` readable, different images of a directory: those in it (no labels), or in its class folders.

    The label of a folder is found by `match_labels` on the sorted names. `name` is what the description calls it.
    Hidden files and folders are passed over. Raises ModhifiError if the directory is missing, holds no images, or
    none that can be read.
    """
    if not directory.is_dir():
        raise ModhifiError(f"no directory {directory.absolute()}; give a folder of images as images:DIR")
    try:
        flat = _image_files(directory)
        folders = {p.name: _image_files(p) for p in sorted(directory.iterdir()) if p.is_dir() and not is_hidden(p)}
    except OSError as error:
        raise ModhifiError(f"cannot list {directory}: {error.strerror}; check its permissions") from error
    folders = {name: files for name, files in folders.items() if files}
    if flat and folders:
        raise ModhifiError(f"{directory} holds both images and folders of images; keep one of the two")
    if not flat and not folders:
        raise ModhifiError(f"no images in {directory} or in the folders right below it; name the folder of the classes")
    indices, note = match_labels(list(folders), loaded) if folders else (None, "")
    items = [_Item(p.name, None, _opener(p)) for p in flat] + [
        _Item(f"{name}/{p.name}", None if indices is None else indices[name], _opener(p))
        for name, files in folders.items()
        for p in files
    ]
    return _gather(items, name or f"images:{directory}", note, loaded, n, seed)


def from_datasets(rest: str, loaded: LoadedModel, n: int, seed: int) -> Samples:
    """At most `n` readable, different images of ``DATASET[:SPLIT]``, anything that ``datasets.load_dataset`` takes.

    The image column is the first of that type, the label column ``label``, ``labels``, ``fine_label`` or the first of
    class labels. Raises ModhifiError without the `datasets` package, the dataset or an image column.
    """
    name, table = hub.dataset(rest)
    types = {column: type(feature).__name__ for column, feature in table.features.items()}
    images = [column for column, kind in types.items() if kind == "Image"]
    if not images:
        raise ModhifiError(f"dataset {name} has no image column (it has {', '.join(types)}); use another")
    known = ("label", "labels", "fine_label")
    candidates = [c for c in known if types.get(c) in ("ClassLabel", "Value")]
    candidates += [c for c, kind in types.items() if kind == "ClassLabel"]
    values: list[Any] = list(table[candidates[0]]) if candidates else []
    note = ""
    # Hidden labels of a test split are stored as -1 or null.
    labelled = bool(values) and all(isinstance(v, int) and v >= 0 for v in values)
    if labelled:
        names = getattr(table.features[candidates[0]], "names", None) or [str(i) for i in range(max(values) + 1)]
        indices, note = match_labels(names, loaded)
        labelled = indices is not None
        values = [indices[names[v]] for v in values] if indices is not None else []
    column = images[0]

    def opener(i: int) -> Callable[[], Image.Image]:
        return lambda: table[i][column]

    items = [_Item(f"{name} {i}", values[i] if labelled else None, opener(i)) for i in range(len(table))]
    return _gather(items, f"hf:{rest}", note, loaded, n, seed)


def match_labels(names: Sequence[str], loaded: LoadedModel) -> tuple[dict[str, int] | None, str]:
    """The model's class index for each class name, and a remark for the description.

    In this order: names that are all among the model's labels have those indices; names that are all integers are the
    indices; WordNet ids for a model of the 1,000 ImageNet classes have theirs; otherwise name `i` is class `i` if the
    model has as many classes, and no labels that say something else. None if nothing fits, or a name means two classes:
    a wrong label is worse than none.
    """
    classes, known = class_count(loaded), classes_by_name(loaded.labels)
    found = {name: known.get(plain(name), ()) for name in names}
    odd = [name for name, meant in found.items() if len(meant) != 1]
    if not odd:
        indices = {name: meant[0] for name, meant in found.items()}
    elif all(name.isdecimal() for name in names):
        indices = {name: int(name) for name in names}
    elif classes == 1000 and all(re.fullmatch(r"n\d{8}", name) for name in names):
        from timm.data.imagenet_info import ImageNetInfo

        synsets: list[str] = ImageNetInfo("imagenet-1k").label_names()
        order = {synset: i for i, synset in enumerate(synsets)}
        indices = {name: order.get(name, classes) for name in names}
    elif known:
        few = ", ".join(f"'{name}'" for name in odd[:3]) + (f" and {len(odd) - 3} others" if len(odd) > 3 else "")
        return None, f"labels unused: {few} {'is' if len(odd) == 1 else 'are'} not the name of one class of the model"
    elif classes is None or classes == len(names):
        indices = {name: i for i, name in enumerate(names)}
    else:
        return None, f"labels unused: {len(names)} class names do not match the model's {classes} classes"
    if classes is not None and max(indices.values()) >= classes:
        return None, f"labels unused: class index {max(indices.values())} of a model of {classes} classes"
    return indices, ""


def _image_files(directory: Path) -> list[Path]:
    return sorted(
        p for p in directory.iterdir() if p.suffix.lower() in IMAGE_FILES and p.is_file() and not is_hidden(p)
    )


def _opener(path: Path) -> Callable[[], Image.Image]:
    return lambda: Image.open(path)


def _gather(items: Sequence[_Item], source: str, note: str, loaded: LoadedModel, n: int, seed: int) -> Samples:
    """Read items in a seeded random order until `n` readable ones with different pixels are found."""
    shape = image_shape(loaded)
    transform = loaded.transform
    if transform is None:
        raise ModhifiError(
            f"{loaded.source} has no preprocessing for image files; load it from timm, the hub or a directory"
        )
    keep = min(n, len(items)) * int(np.prod(shape)) * 4 <= CACHE_BYTES

    def read(item: _Item) -> _Read:
        # A decoder can raise nearly anything on a damaged file, and one bad file must not end the run.
        try:
            with item.open() as image:
                pixels = to_mode(image, "RGB")
                tensor = transform(image) if keep else None
        except Exception as error:
            return _Read("", None, f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}")
        content = repr(pixels.size).encode() + pixels.tobytes()
        return _Read(hashlib.sha256(content).hexdigest()[:16], tensor, None)

    order = np.random.default_rng(seed).permutation(len(items)).tolist()
    by_hash: dict[str, tuple[_Item, Tensor | None]] = {}
    skipped: list[tuple[str, str]] = []
    repeated = 0
    with ThreadPoolExecutor() as pool:
        while order and len(by_hash) < n:
            chunk = [items[order.pop(0)] for _ in range(min(len(order), CHUNK, n - len(by_hash)))]
            for item, result in zip(chunk, pool.map(read, chunk), strict=True):
                if result.problem is not None:
                    skipped.append((item.name, result.problem))
                elif result.digest in by_hash:
                    repeated += 1
                else:
                    by_hash[result.digest] = (item, result.tensor)
    if not by_hash:
        name, problem = skipped[0] if skipped else ("it", "is empty")
        raise ModhifiError(f"nothing readable in {source}: {len(skipped)} files failed, the first {name} ({problem})")

    chosen = list(by_hash.values())

    def load(i: int) -> Tensor:
        item, tensor = chosen[i]
        if tensor is not None:
            return tensor
        with item.open() as image:
            return transform(image)

    remarks = [f"{source}, {len(chosen)} of {len(items)} images, seed {seed}"]
    remarks += [f"{n} were asked for"] * (len(chosen) < n)
    remarks += [f"{len(skipped)} unreadable skipped"] * bool(skipped)
    remarks += [f"{repeated} duplicates dropped"] * bool(repeated)
    remarks += [note] * bool(note)
    labels = [item.label for item, _ in chosen]
    return Samples(
        load=load,
        hashes=tuple(by_hash),
        labels=None if None in labels else torch.tensor(labels, dtype=torch.long),
        names=tuple(item.name for item, _ in chosen),
        description=", ".join(remarks),
        synthetic=False,
        skipped=tuple(skipped),
    )
