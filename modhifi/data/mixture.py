"""Several sources of samples in shares of the total mass: how they are written, and how they are put together."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from modhifi.data.samples import Samples, Source
from modhifi.data.sources.base import SOURCES
from modhifi.disk import home_path
from modhifi.errors import ModhifiError

# How far shares may add up to something else than 1, as decimals are rounded.
ROUNDING = 1e-6


class Mixture:
    """Sources of data, each with its share of the total mass, in (0, 1]; the shares add up to 1.

    ``sources`` are source strings or what a program holds; a share of None is an equal part of what the others leave.
    Raises ModhifiError for shares that cannot be.
    """

    def __init__(self, sources: Sequence[Any], shares: Sequence[float | None] | None = None) -> None:
        shares = [None] * len(sources) if shares is None else shares
        if not sources or len(shares) != len(sources):
            raise ModhifiError(
                f"{len(sources)} sources of data and {len(shares)} shares; give each source one, or None"
            )
        self.sources, self.shares = tuple(sources), _completed(shares)

    def __iter__(self) -> Iterator[tuple[Any, float]]:
        return iter(zip(self.sources, self.shares, strict=True))

    @staticmethod
    def of(data: Any) -> Mixture:
        """The mixture that data stands for: ``A,B@0.2`` or a list of such texts; anything else is its only source.

        Raises ModhifiError for shares that cannot be.
        """
        if isinstance(data, Mixture):
            return data
        if not isinstance(data, str) and not is_named(data):
            return Mixture([data])
        sources, shares = zip(*map(split_share, separated(data) if isinstance(data, str) else data), strict=True)
        return Mixture(sources, shares)

    def counts(self, total: int) -> list[int]:
        """How many samples of each source make up about ``total`` in the shares, at least one of each."""
        return [max(1, round(share * total)) for share in self.shares]


def beside_self(data: str | Sequence[str]) -> list[str]:
    """The sources of data, and the model's own text where they are files of text whose shares leave it something.

    It comes last: files that are not there are found before the model writes.
    """
    sources = separated(data) if isinstance(data, str) else list(data)
    shares = [split_share(source)[1] for source in sources]
    said = all(share is not None for share in shares) and sum(share or 0 for share in shares) > 1 - ROUNDING
    return sources if said or not all(source.startswith("text:") for source in sources) else [*sources, "self"]


def is_named(data: object) -> bool:
    """Whether data is a list of source strings."""
    return isinstance(data, list | tuple) and len(data) > 0 and all(isinstance(part, str) for part in data)


def separated(text: str) -> list[str]:
    """The sources in ``A,B@0.2``: a comma parts before the name of a source, but not inside a path that exists."""
    if is_path(text):
        return [text]
    names = "|".join(map(re.escape, SOURCES))
    first, *others = re.split(rf",\s*(?=(?:{names})(?:[:,@]|$))", text)
    sources = [first]
    for part in others:
        together = f"{sources[-1]},{part}"
        if is_path(together) or is_path(re.sub("@[^@,:]*$", "", together)):
            sources[-1] = together
        else:
            sources.append(part)
    return sources


def split_share(text: str) -> tuple[str, float | None]:
    """The source and the share in ``SOURCE@SHARE``; the share is None where there is none, as in a path of such a name.

    Raises ModhifiError for a share outside (0, 1].
    """
    source, at, number = text.rpartition("@")
    if not at or is_path(text):
        return text, None
    try:
        share = float(number)
    except ValueError:
        return text, None
    if not 0 < share <= 1:
        raise ModhifiError(f"the share in '{text}' is {number}; give one above 0 and at most 1")
    return source, share


def is_path(text: str) -> bool:
    """Whether what follows the colon of a source string is there on disk."""
    name, _, path = text.partition(":")
    return name in SOURCES and bool(path) and os.path.exists(home_path(path))


def _completed(shares: Sequence[float | None]) -> tuple[float, ...]:
    """The shares with equal parts of what is left in place of None."""
    known = [share for share in shares if share is not None]
    total, unsaid = sum(known), len(shares) - len(known)
    if any(not 0 < share <= 1 for share in known):
        raise ModhifiError(f"the shares of the data are {known}; give numbers above 0 and at most 1")
    if unsaid and total > 1 - ROUNDING:
        raise ModhifiError(f"the shares of the data add up to {total:.4g} and leave nothing for the rest; lower them")
    if not unsaid and not math.isclose(total, 1, abs_tol=ROUNDING):
        raise ModhifiError(f"the shares of the data add up to {total:.4g}; let them add up to 1, or leave one out")
    return tuple((1 - total) / unsaid if share is None else share for share in shares)


def _check_alike(parts: Sequence[tuple[str, float, Samples]]) -> None:
    """Raises ModhifiError where items of two sources cannot stand in one batch."""
    (first, _, samples), *others = parts
    wanted = samples.load(0)
    for name, _, other in others:
        item = other.load(0)
        same = item.ndim == wanted.ndim == 1 or item.shape == wanted.shape  # texts are padded
        if not same or item.is_floating_point() != wanted.is_floating_point():
            raise ModhifiError(
                f"items of {name} are {tuple(item.shape)} {item.dtype} and those of {first} {tuple(wanted.shape)} "
                f"{wanted.dtype}; give sources of one shape"
            )


def mixed(parts: Sequence[tuple[str, float, Samples]]) -> Samples:
    """One set of samples from sources that are given by name, share of the total mass, and samples.

    Items of a source keep their order; as long as no source is used up, the first items of all are in the shares. What
    two sources have in common is the first one's. A single source is what it was. Raises ModhifiError where a source
    has nothing of its own.
    """
    if len(parts) == 1:
        return parts[0][2]
    _check_alike(parts)
    seen: set[str] = set()
    places: list[tuple[float, int, int]] = []  # where an item comes in the order, its source, its number in there
    for number, (name, share, samples) in enumerate(parts):
        own = [i for i, item in enumerate(samples.hashes) if item not in seen]
        if not own:
            raise ModhifiError(f"every sample of {name} is also one of another source; leave it out")
        seen.update(samples.hashes)
        places += [((rank + 0.5) / share, number, i) for rank, i in enumerate(own)]
    places.sort()
    items = [(parts[number][2], i) for _, number, i in places]
    labels = [samples.labels[i] for samples, i in items if samples.labels is not None]
    documents: dict[tuple[int, int], int] = {}
    units = [
        documents.setdefault((number, i if samples.units is None else samples.units[i]), len(documents))
        for (_, number, i), (samples, _) in zip(places, items, strict=True)
    ]
    kinds = [samples for _, _, samples in parts]
    return Samples(
        load=lambda i: items[i][0].load(items[i][1]),
        hashes=tuple(samples.hashes[i] for samples, i in items),
        labels=torch.stack(labels) if len(labels) == len(items) else None,
        names=tuple(samples.names[i] for samples, i in items),
        description="; ".join(f"{share:.3g} of the mass: {samples.description}" for _, share, samples in parts),
        synthetic=any(samples.synthetic for samples in kinds),
        skipped=tuple(item for samples in kinds for item in samples.skipped),
        units=tuple(units) if any(samples.units is not None for samples in kinds) else None,
        sources=tuple(
            Source(name, share, samples.synthetic, samples.matched, samples.description)
            for name, share, samples in parts
        ),
        origin=tuple(number for _, number, _ in places),
    )
