"""``pairs:FILE``: source and target texts, or images or sounds with their text."""

from __future__ import annotations

from typing import TYPE_CHECKING

from modhifi.data.sources.base import PART_KINDS, SOURCES, Request, SampleSource
from modhifi.disk import home_path

if TYPE_CHECKING:
    from modhifi.data.samples import Samples
    from modhifi.models.loaded import LoadedModel


def load(path: str, loaded: LoadedModel, request: Request) -> Samples:
    """See :mod:`modhifi.data.pairs`; raises ModhifiError for a model that reads no pairs."""
    from modhifi.data.joined import join
    from modhifi.data.pairs import from_file

    return join(loaded, from_file(home_path(path), loaded, request.n, request.seed), request)


SOURCES.register(
    SampleSource(
        "pairs",
        "pairs:FILE",
        "SOURCE<tab>TARGET lines, .csv or .jsonl: texts, or paths of images or sounds and their text",
        PART_KINDS,
        load,
    )
)
