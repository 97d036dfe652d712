"""Calibration and held-out samples by name: every source is one file of this package."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from modhifi.data.sources.base import SOURCES, Request, SampleSource, metavars
from modhifi.errors import ModhifiError
from modhifi.progress import Progress, silent

if TYPE_CHECKING:
    from modhifi.data.in_memory import Data
    from modhifi.data.samples import Samples
    from modhifi.models.loaded import LoadedModel

__all__ = ["SOURCES", "Request", "SampleSource", "load_samples", "metavars"]

SOURCES.discover(__name__)


def load_samples(
    spec: Data,
    loaded: LoadedModel,
    *,
    n: int,
    seed: int = 0,
    balanced: bool = True,
    window: int | None = None,
    progress: Progress = silent,
) -> Samples:
    """Samples of one source, prepared for one model.

    `spec` is a string that names one of :data:`SOURCES` in the form of its ``metavar``, or what a program holds (see
    `modhifi.data.in_memory`). At most `n` items are used, chosen and ordered by `seed`. Items of text are windows of
    `window` tokens (1,024, or as many as the model takes, if not said). `balanced` concerns synthetic images for
    classifiers: candidates are drawn until each class that the model itself predicts has its share of `n`, ten at most
    for each image kept (fewer for large images, see `modhifi.data.synthetic.CANDIDATE_PIXELS`); it costs one forward
    pass for each candidate. Other models get the first `n` images.

    Raises ModhifiError for a source that is unknown, missing or has nothing readable, and for a model of another kind.
    """
    from modhifi.data.in_memory import samples_from
    from modhifi.data.mixture import Mixture

    if n < 1:
        raise ModhifiError(f"{n} samples asked for; ask for at least 1")
    sources = Mixture.of(spec).sources
    if len(sources) > 1:
        raise ModhifiError("only prune, compare, score and heal mix several sources; give one")
    if not isinstance(spec, str):
        return samples_from(sources[0], loaded, n=n, seed=seed)
    if loaded.packing is not None and not loaded.parts:
        raise ModhifiError(
            f"no source has samples for a model of several inputs ({', '.join(loaded.packing.names)}); "
            "from Python, give items that hold all of them"
        )
    # A name may hold a colon itself: synthetic:invert.
    name, _, argument = (spec, "", "") if spec in SOURCES else spec.partition(":")
    if name not in SOURCES or not SOURCES[name].takes(argument):
        hint = f"is {_meant(spec)} meant?" if os.path.exists(spec) else f"use {metavars(loaded.kind)}"
        raise ModhifiError(f"unknown data source '{spec}'; {hint}")
    if loaded.parts:
        from modhifi.data.joined import load

        return load(name, argument, loaded, Request(n, seed, balanced, window, progress))
    return SOURCES[name].load(argument, loaded, Request(n, seed, balanced, window, progress))


def _meant(path: str) -> str:
    """The source that somebody who gave a bare path had in mind: a folder of text files is text, any other images."""
    files = os.listdir(path) if os.path.isdir(path) else [path]
    return f"text:{path}" if any(name.lower().endswith((".txt", ".md")) for name in files) else f"images:{path}"
