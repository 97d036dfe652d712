"""Samples: indexable, lazily loaded, seeded inputs, ready for the model they were made for."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from modhifi.models.loaded import PADDING, LoadedModel

# What the description of a part of some samples begins with.
PART = re.compile(r"^\d+ of: ")
# The share that the second of two parts keeps where there are too few for both.
LEAST_SECOND = 1 / 5


def describe_data(samples: Samples, before: Iterable[str] = ()) -> dict[str, Any]:
    """The fingerprint of a set of samples for a manifest: one hash per item, so that an overlap can be found.

    ``before`` are the hashes of what earlier edits of the model have seen.
    """
    return {
        "description": samples.description,
        "n": len(samples),
        "fingerprint": samples.fingerprint(),
        "hashes": [*dict.fromkeys([*samples.hashes, *before])],
        "synthetic": samples.synthetic,
        **({"shares": {source.name: source.share for source in samples.sources}} if samples.sources else {}),
        "skipped": [list(item) for item in samples.skipped],
    }


@dataclass(frozen=True)
class Source:
    """One of several sources of a set of samples: its ``name`` and its ``share`` of the total mass, in (0, 1).

    The other fields are what :class:`Samples` says of its own samples.
    """

    name: str
    share: float
    synthetic: bool
    matched: bool
    description: str


@dataclass(frozen=True, eq=False)
class Samples:
    """A set of model-ready inputs.

    ``load(i)`` gives item `i` without a batch axis (float32 ``(C, H, W)`` for images). ``hashes`` has one content hash
    for each item (16 hex digits of a SHA-256), so that an overlap between two sets can be found. ``labels`` is int64
    ``(n,)`` or None. ``synthetic`` inputs were drawn; ``matched`` ones among them have the moments that BatchNorm
    stores as nearly as real inputs, and are treated as such (see ``adapted``). ``skipped`` names the items that could
    not be read, each with the reason. ``units`` numbers the document that each item was cut from, where several come
    from one: such items are not independent. Of several ``sources``, ``origin`` has the number of every item's own;
    their shares are of the total mass, whatever the numbers of their items are (see :meth:`by_source`).
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
    sources: tuple[Source, ...] = ()
    origin: tuple[int, ...] = ()

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

    def first(self, count: int = 2) -> Tensor:
        """A batch of the first `count` items, or of all where there are fewer."""
        return next(self.subset(range(min(count, len(self)))).batches(count))

    def split(self, first: int, second: int) -> tuple[Samples, Samples]:
        """Two disjoint sets of at most `first` and `second` items; no unit has items in both.

        If there are fewer in all they are shared out in proportion, but that the second set keeps ``LEAST_SECOND`` of
        them where it asks for so many: a verdict on a handful of items says nothing.
        """
        n = len(self)
        least = min(second, math.ceil(LEAST_SECOND * n))
        cut = max(min(first, round(n * first / (first + second)), n - least), n - second)
        units = self.units if self.units is not None else range(n)
        first_units, second_units = set(dict.fromkeys(units)), set[int]()
        for unit in reversed(dict.fromkeys(units)):
            if len(first_units) == 1 or sum(u in second_units for u in units) >= n - cut:
                break
            first_units.remove(unit)
            second_units.add(unit)
        first_items = [i for i, unit in enumerate(units) if unit in first_units][:first]
        second_items = [i for i, unit in enumerate(units) if unit in second_units][:second]
        return self.subset(first_items), self.subset(second_items)

    def subset(self, indices: Iterable[int] | Tensor) -> Samples:
        """The items at `indices`, in that order, still loaded lazily."""
        chosen = [int(i) for i in indices]
        return Samples(
            load=lambda i: self.load(chosen[i]),
            hashes=tuple(self.hashes[i] for i in chosen),
            labels=None if self.labels is None else self.labels[torch.tensor(chosen, dtype=torch.long)],
            names=tuple(self.names[i] for i in chosen),
            description=f"{len(chosen)} of: {PART.sub('', self.description)}",
            synthetic=self.synthetic,
            skipped=self.skipped,
            units=None if self.units is None else tuple(self.units[i] for i in chosen),
            matched=self.matched,
            sources=self.sources,
            origin=tuple(self.origin[i] for i in chosen) if self.sources else (),
        )

    def by_source(self) -> list[tuple[float, Samples]]:
        """The items of each source, in order, behind its share of the total mass; all of it for a single source.

        Sources without an item are left out, and the shares of the others add up to 1.
        """
        return [(share, samples) for _, share, samples in self.parts()]

    def parts(self) -> list[tuple[str, float, Samples]]:
        """As :meth:`by_source`, each with its source's name (of a single one its description)."""
        if not self.sources:
            return [(self.description, 1.0, self)]
        places: dict[int, list[int]] = {}
        for i, number in enumerate(self.origin):
            places.setdefault(number, []).append(i)
        total = sum(self.sources[number].share for number in places)
        return [
            (source.name, source.share / total, self._of(source, places[number]))
            for number, source in enumerate(self.sources)
            if number in places
        ]

    def _of(self, source: Source, places: list[int]) -> Samples:
        return replace(
            self.subset(places),
            description=source.description,
            synthetic=source.synthetic,
            matched=source.matched,
            sources=(),
            origin=(),
        )

    def fingerprint(self) -> str:
        """Hash of the whole set, its order included: 16 hex digits."""
        return hashlib.sha256("\n".join(self.hashes).encode()).hexdigest()[:16]


def remembered(samples: Samples, most_bytes: float) -> Samples:
    """The same samples, each loaded once, while those that were take at most so many bytes together.

    For those who read them again and again: drawing or decoding an image can take longer than what is done with it.
    """
    known: dict[int, Tensor] = {}
    room = most_bytes

    def load(index: int) -> Tensor:
        nonlocal room
        item = known.get(index)
        if item is None:
            item = samples.load(index)
            if item.nbytes <= room:
                room -= item.nbytes
                known[index] = item
        return item

    return replace(samples, load=load)


def examples_in(samples: Samples, loaded: LoadedModel) -> float:
    """The number of samples, in units of the size of the model's example: a long text counts as several."""
    return len(samples) * samples.load(0).numel() / loaded.example[0].numel()


def warn_degenerate(samples: Samples, look_at: int = 64) -> list[str]:
    """Reasons why moments of `samples` may be worthless: one sentence each, none for a healthy set.

    Looks at no more than `look_at` items.
    """
    warnings = []
    if len(samples) == 1:
        warnings.append("only one sample: its statistics say nothing about other inputs; use a few hundred")
    items = [samples.load(i) for i in range(min(len(samples), look_at))]
    broken = sum(not bool(torch.isfinite(x).all()) for x in items if x.is_floating_point())
    if broken:
        warnings.append(f"{broken} of the first {len(items)} samples hold NaN or infinite values")
    flat = sum(_is_flat(x) for x in items)
    if flat == len(items):
        warnings.append(f"all of the first {len(items)} samples are flat (one colour or token): they excite no filter")
    elif flat > len(items) // 2:
        warnings.append(f"{flat} of the first {len(items)} samples are flat (one colour or token)")
    if len(items) > 1 and all(torch.equal(x, items[0]) for x in items[1:]):
        warnings.append(f"the first {len(items)} samples are all the same")
    return warnings


def _is_flat(x: Tensor) -> bool:
    """Whether every channel of an image, or every token of a text, has one value."""
    rows = x.flatten(1) if x.ndim == 3 else x.reshape(1, -1)
    return bool((rows == rows[:, :1]).all())


def synthetic_items(
    load: Callable[[int], Tensor], n: int, description: str, identity: Callable[[int], str] | None = None
) -> Samples:
    """``n`` items that ``load`` draws when they are asked for; ``identity`` names one without drawing it.

    Without it each is drawn once for the hash of its content.
    """
    identity = identity or (lambda index: digest(load(index)))
    return Samples(
        load=load,
        hashes=tuple(map(identity, range(n))),
        labels=None,
        names=tuple(f"synthetic {i}" for i in range(n)),
        description=description,
        synthetic=True,
    )


def digest(tensor: Tensor) -> str:
    """Hash of a tensor's bytes: 16 hex digits of a SHA-256."""
    raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
    return hashlib.sha256(raw).hexdigest()[:16]
