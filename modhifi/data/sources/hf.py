"""``hf:DATASET[:SPLIT]``: images or text of a dataset of the Hugging Face hub, split ``train`` if not said."""

from __future__ import annotations

from typing import TYPE_CHECKING

from modhifi.data.sources.base import IMAGE_KINDS, SOURCES, TEXT_KINDS, Request, SampleSource

if TYPE_CHECKING:
    from modhifi.data.samples import Samples
    from modhifi.models.loaded import LoadedModel


def load(dataset: str, loaded: LoadedModel, request: Request) -> Samples:
    """See :func:`modhifi.data.text.from_dataset` and :func:`modhifi.data.images.from_datasets`."""
    from modhifi.data import images, text

    if loaded.kind in TEXT_KINDS:
        return text.from_dataset(dataset, loaded, request.n, request.seed, request.window)
    return images.from_datasets(dataset, loaded, request.n, request.seed)


SOURCES.register(
    SampleSource(
        "hf",
        "hf:DATASET[:SPLIT]",
        "a dataset of the Hugging Face hub, or a path that datasets reads",
        (*IMAGE_KINDS, *TEXT_KINDS),
        load,
    )
)
