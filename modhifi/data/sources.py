"""Calibration and evaluation samples: indexable, lazily loaded, seeded, ready for the model they were made for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from modhifi.data import images, in_memory, inversion, self_generated, text
from modhifi.data.in_memory import Source
from modhifi.data.samples import Samples
from modhifi.data.synthetic import drawn
from modhifi.disk import default_directory
from modhifi.errors import ModhifiError
from modhifi.models.demo import IMAGES, bundled
from modhifi.models.loaded import LoadedModel


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
    `modhifi.data.procedural.KINDS`), ``self``, text that a causal language model writes itself, which is also what
    ``synthetic`` means there, ``demo:PART`` (images that come with the package: ``calibration``, unlabelled, or
    ``test``), or what a program holds (see `modhifi.data.in_memory`). At most `n` items are used, chosen and ordered by
    `seed`. ``synthetic:invert`` are images that the network's own norms draw (see `inversion`). Items of text
    are windows of `window` tokens (1,024, or as many as the model takes, if not said).
    `balanced` concerns synthetic images for classifiers: candidates are drawn until each class that the model itself
    predicts has its share of `n`, ten at most for each image kept (fewer for large images, see `CANDIDATE_PIXELS`); it
    costs one forward pass for each candidate. Other models get the first `n` images.

    Raises ModhifiError for a source that is unknown, missing or has nothing readable, and for a model without images.
    """
    if n < 1:
        raise ModhifiError(f"{n} samples asked for; ask for at least 1")
    if not isinstance(spec, str):
        return in_memory.samples_from(spec, loaded, n=n, seed=seed)
    source, _, rest = spec.partition(":")
    if source == "text" and rest:
        return text.from_files(Path(rest).expanduser(), loaded, n, seed, window)
    if source == "hf" and rest and loaded.kind in ("text", "encoder"):
        return text.from_dataset(rest, loaded, n, seed, window)
    if spec == "self" or (spec == "synthetic" and loaded.kind in ("text", "encoder")):
        return self_generated.write(loaded, n, seed, window, progress)
    if source == "images" and rest:
        return images.from_directory(Path(rest).expanduser(), loaded, n, seed)
    if source == "hf" and rest:
        return images.from_datasets(rest, loaded, n, seed)
    if spec == "synthetic:invert":
        return inversion.inverted(loaded, n, seed, cache=default_directory(), progress=progress)
    if source == "synthetic":
        return drawn(rest or "mixed", loaded, n, seed, balanced)
    if source == "demo":
        return images.from_directory(bundled(spec, IMAGES), loaded, n, seed, spec)
    raise ModhifiError(
        f"unknown data source '{spec}'; use images:DIR, text:FILE, hf:DATASET[:SPLIT], synthetic[:KIND] or self"
    )
