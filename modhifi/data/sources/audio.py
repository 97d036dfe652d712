"""``audio:DIR``: sounds of a directory."""

from __future__ import annotations

from typing import TYPE_CHECKING

from modhifi.data.sources.base import PART_KINDS, SOURCES, Request, SampleSource
from modhifi.disk import home_path

if TYPE_CHECKING:
    from modhifi.data.samples import Samples
    from modhifi.models.loaded import LoadedModel


def load(directory: str, loaded: LoadedModel, request: Request) -> Samples:
    """See :func:`modhifi.data.audio.from_directory`; raises ModhifiError for a model that reads no sounds."""
    from modhifi.data.audio import from_directory

    return from_directory(home_path(directory), loaded, request.n, request.seed)


SOURCES.register(
    SampleSource(
        "audio", "audio:DIR", "sounds in a folder, .wav or what soundfile reads, for speech models", PART_KINDS, load
    )
)
