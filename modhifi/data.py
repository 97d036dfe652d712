"""Calibration and evaluation samples: indexable, lazily loaded, seeded, ready for the model they were made for."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor

from modhifi import synthetic
from modhifi.errors import ModhifiError
from modhifi.models.demo import IMAGES, bundled
from modhifi.models.loaded import PADDING, LoadedModel

if TYPE_CHECKING:
    from modhifi.own_data import Source

# Images drawn at most for every one kept when a synthetic set is balanced, as far as their pixels stay within the
# budget: 668 candidates of 224x224, 8,192 of 64x64. Pixels, not seconds, so that a run can be repeated anywhere.
CANDIDATES = 10
CANDIDATE_PIXELS = 2**25


@dataclass(frozen=True, eq=False)
class Samples:
    """A set of model-ready inputs.

    ``load(i)`` gives item `i` without a batch axis (float32 ``(C, H, W)`` for images). ``hashes`` has one content hash
    for each item (16 hex digits of a SHA-256), so that an overlap between two sets can be found. ``labels`` is int64
    ``(n,)`` or None. ``synthetic`` inputs were drawn; ``matched`` ones among them have the moments that BatchNorm
    stores as nearly as real inputs, and are treated as such (see ``adapted``). ``skipped`` names the items that could
    not be read, each with the reason. ``units`` numbers the document that each item was cut from, where several come
    from one: such items are not independent.
    """

    load: Callable[[int], Tensor]
    hashes: tuple[str, ...]
    labels: Tensor | None
    names: tuple[str, ...]
    description: str
    synthetic: bool
    skipped: tuple[tuple[str, str], ...] = ()
    units: tuple[int, ...] | None = None
    matched: bool = False

    @property
    def adapted(self) -> bool:
        """Whether BatchNorm normalises by the batch while moments are collected."""
        return self.synthetic and not self.matched

    def __len__(self) -> int:
        return len(self.hashes)

    def batches(self, size: int) -> Iterator[Tensor]:
        """Stack the items in order, `size` at a time; the last batch may be smaller. Short texts are padded."""
        for start in range(0, len(self), size):
            items = [self.load(i) for i in range(start, min(start + size, len(self)))]
            if items[0].ndim == 1 and len({len(x) for x in items}) > 1:
                yield torch.nn.utils.rnn.pad_sequence(items, batch_first=True, padding_value=PADDING)
            else:
                yield torch.stack(items)

    def split(self, first: int, second: int) -> tuple[Samples, Samples]:
        """Two disjoint sets of at most `first` and `second` items, in proportion if there are fewer in all.

        No unit has items in both.
        """
        n = len(self)
        cut = max(min(first, round(n * first / (first + second))), n - second)
        units = self.units if self.units is not None else range(n)
        kept, later = set(dict.fromkeys(units)), set[int]()
        for unit in reversed(dict.fromkeys(units)):
            if len(kept) == 1 or sum(u in later for u in units) >= n - cut:
                break
            kept.remove(unit)
            later.add(unit)
        ours = [i for i, unit in enumerate(units) if unit in kept][:first]
        theirs = [i for i, unit in enumerate(units) if unit in later][:second]
        return self.subset(ours), self.subset(theirs)

    def subset(self, indices: Iterable[int] | Tensor) -> Samples:
        """The items at `indices`, in that order, still loaded lazily."""
        chosen = [int(i) for i in indices]
        return Samples(
            load=lambda i: self.load(chosen[i]),
            hashes=tuple(self.hashes[i] for i in chosen),
            labels=None if self.labels is None else self.labels[torch.tensor(chosen, dtype=torch.long)],
            names=tuple(self.names[i] for i in chosen),
            description=f"{len(chosen)} of: {self.description}",
            synthetic=self.synthetic,
            skipped=self.skipped,
            units=None if self.units is None else tuple(self.units[i] for i in chosen),
            matched=self.matched,
        )

    def fingerprint(self) -> str:
        """Hash of the whole set, its order included: 16 hex digits."""
        return hashlib.sha256("\n".join(self.hashes).encode()).hexdigest()[:16]


def load_samples(
    spec: Source,
    loaded: LoadedModel,
    *,
    n: int,
    seed: int = 0,
    balanced: bool = True,
    window: int | None = None,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> Samples:
    """Samples of one source, prepared for one model.

    `spec` is ``images:DIR`` (class folders, or images alone), ``text:PATH`` (a file, or a folder of .txt files),
    ``hf:DATASET[:SPLIT]`` (split ``train`` if not said), ``synthetic[:KIND]`` (``mixed``, any of
    `modhifi.synthetic.KINDS`), ``self``, text that a causal language model writes itself, which is also what
    ``synthetic`` means there, ``demo:PART`` (images that come with the package: ``calibration``, unlabelled, or
    ``test``), or what a program holds (see `modhifi.own_data`). At most `n` items are used, chosen and ordered by
    `seed`. ``synthetic:invert`` are images that the network's own norms draw (see `modhifi.inversion`). Items of text
    are windows of `window` tokens (1,024, or as many as the model takes, if not said).
    `balanced` concerns synthetic images for classifiers: candidates are drawn until each class that the model itself
    predicts has its share of `n`, ten at most for each image kept (fewer for large images, see `CANDIDATE_PIXELS`); it
    costs one forward pass for each candidate. Other models get the first `n` images.

    Raises ModhifiError for a source that is unknown, missing or has nothing readable, and for a model without images.
    """
    if n < 1:
        raise ModhifiError(f"{n} samples asked for; ask for at least 1")
    from modhifi import images, inversion, own_data, self_written, text  # which build on Samples
    from modhifi.disk import default_directory

    if not isinstance(spec, str):
        return own_data.samples_from(spec, loaded, n=n, seed=seed)
    source, _, rest = spec.partition(":")
    if source == "text" and rest:
        return text.from_files(Path(rest).expanduser(), loaded, n, seed, window)
    if source == "hf" and rest and loaded.kind in ("text", "encoder"):
        return text.from_dataset(rest, loaded, n, seed, window)
    if spec == "self" or (spec == "synthetic" and loaded.kind in ("text", "encoder")):
        return self_written.write(loaded, n, seed, window, progress)
    if source == "images" and rest:
        return images.from_directory(Path(rest).expanduser(), loaded, n, seed)
    if source == "hf" and rest:
        return images.from_datasets(rest, loaded, n, seed)
    if spec == "synthetic:invert":
        return inversion.inverted(loaded, n, seed, cache=default_directory(), progress=progress)
    if source == "synthetic":
        return _drawn(rest or "mixed", loaded, n, seed, balanced)
    if source == "demo":
        return images.from_directory(bundled(spec, IMAGES), loaded, n, seed, spec)
    raise ModhifiError(
        f"unknown data source '{spec}'; use images:DIR, text:FILE, hf:DATASET[:SPLIT], synthetic[:KIND] or self"
    )


def warn_degenerate(samples: Samples, look_at: int = 64) -> list[str]:
    """Reasons why moments of `samples` may be worthless: one sentence each, none for a healthy set.

    Looks at no more than `look_at` items.
    """
    warnings = []
    if len(samples) == 1:
        warnings.append("only one sample: its statistics say nothing about other inputs; use a few hundred")
    looked = [samples.load(i) for i in range(min(len(samples), look_at))]
    broken = sum(not bool(torch.isfinite(x).all()) for x in looked if x.is_floating_point())
    if broken:
        warnings.append(f"{broken} of the first {len(looked)} samples hold NaN or infinite values")
    flat = sum(_is_flat(x) for x in looked)
    if flat == len(looked):
        warnings.append(f"all of the first {len(looked)} samples are flat (one colour or token): they excite no filter")
    elif flat > len(looked) // 2:
        warnings.append(f"{flat} of the first {len(looked)} samples are flat (one colour or token)")
    if len(looked) > 1 and all(torch.equal(x, looked[0]) for x in looked[1:]):
        warnings.append(f"the first {len(looked)} samples are all the same")
    return warnings


def balance(samples: Samples, loaded: LoadedModel, n: int, batch: int = 64) -> Samples:
    """The `n` samples that are spread most evenly over the classes the model predicts, without any label.

    Every class gives its next sample in turn until `n` are chosen; the order of `samples` is kept. The predictions are
    `loaded.model`'s own (arg max of its logits, eval mode); as soon as every class has its share, no more are made.
    Raises ModhifiError if the model is no classifier.
    """
    count = class_count(loaded)
    if count is None:
        raise ModhifiError(f"{loaded.source} is no classifier; its samples cannot be balanced over classes")
    share, found = math.ceil(n / count), [0] * count
    predicted, rank = list[int](), list[int]()
    with torch.no_grad():
        for inputs in samples.batches(batch):
            for label in loaded.logits(inputs).argmax(dim=1).tolist():
                predicted.append(label)
                rank.append(found[label])
                found[label] += 1
            if sum(min(number, share) for number in found) >= n:
                break
    chosen = sorted(sorted(range(len(rank)), key=lambda i: rank[i])[:n])
    kept = samples.subset(chosen)
    classes = len({predicted[i] for i in chosen})
    return replace(kept, description=f"{kept.description}, spread over {classes} predicted classes")


def class_count(loaded: LoadedModel) -> int | None:
    """Number of classes of an image classifier; None for any other model (a backbone's features are no classes)."""
    if loaded.example.ndim != 4 or getattr(loaded.model, "num_classes", None) == 0:
        return None
    with torch.no_grad():
        logits = loaded.logits(loaded.example)
    return int(logits.shape[1]) if logits.ndim == 2 and logits.shape[1] > 1 else None


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
        std = torch.from_numpy(synthetic.PIXEL_STD).mean() / example.std(dim=1).clamp_min(1e-12)
        mean = torch.from_numpy(synthetic.MEAN_COLOUR).mean() - example.mean(dim=1) * std
    if not bool(torch.isfinite(std).all() and (std.abs() < 1e9).all()):
        raise ModhifiError(f"cannot tell how {loaded.source} normalises its input; give a varied example batch")
    return mean.float().view(channels, 1, 1), std.float().view(channels, 1, 1)


def image_shape(loaded: LoadedModel) -> tuple[int, int, int]:
    """Channels, height and width of the model's input. Raises ModhifiError if it takes no images."""
    shape = tuple(loaded.example.shape)
    if loaded.kind not in ("image", "tensor") or len(shape) != 4 or shape[1] not in (1, 3):
        raise ModhifiError(f"{loaded.source} takes no images (kind {loaded.kind}, input {shape}); use another source")
    return shape[1], shape[2], shape[3]


def _is_flat(x: Tensor) -> bool:
    """Whether every channel of an image, or every token of a text, has one value."""
    rows = x.flatten(1) if x.ndim == 3 else x.reshape(1, -1)
    return bool((rows == rows[:, :1]).all())


def _drawn(kind: str, loaded: LoadedModel, n: int, seed: int, balanced: bool) -> Samples:
    """Synthetic images at the model's input size."""
    if kind != "mixed" and kind not in synthetic.KINDS:
        kinds = ", ".join(("mixed", "invert", *synthetic.KINDS))
        raise ModhifiError(f"unknown kind of synthetic image '{kind}'; use one of {kinds}")
    channels, height, width = image_shape(loaded)
    mean, std = normalisation(loaded)

    def load(index: int) -> Tensor:
        pixels = torch.from_numpy(synthetic.draw(kind, seed, index, height, width).copy())
        image = pixels.permute(2, 0, 1).float() / 255
        return ((image if channels == 3 else image.mean(dim=0, keepdim=True)) - mean) / std

    balanced = balanced and class_count(loaded) is not None
    total = min(n * CANDIDATES, max(n, CANDIDATE_PIXELS // (height * width))) if balanced else n
    samples = Samples(
        load=load,
        hashes=tuple(synthetic.identity(kind, seed, i, height, width) for i in range(total)),
        labels=None,
        names=tuple(f"synthetic {i}" for i in range(total)),
        description=f"synthetic:{kind}, {total} images of {height}x{width}, seed {seed}",
        synthetic=True,
    )
    return balance(samples, loaded, n) if total > n else samples
