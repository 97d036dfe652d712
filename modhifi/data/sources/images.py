"""``images:DIR``: image files of a directory."""

from __future__ import annotations

from typing import TYPE_CHECKING

from modhifi.data.sources.base import IMAGE_KINDS, SOURCES, Request, SampleSource
from modhifi.disk import home_path

if TYPE_CHECKING:
    from modhifi.data.samples import Samples
    from modhifi.models.loaded import LoadedModel


def load(directory: str, loaded: LoadedModel, request: Request) -> Samples:
    """See :func:`modhifi.data.images.from_directory`."""
    from modhifi.data.images import from_directory

    return from_directory(home_path(directory), loaded, request.n, request.seed)


SOURCES.register(
    SampleSource("images", "images:DIR", "images in a directory, or in a folder for each class", IMAGE_KINDS, load)
)
