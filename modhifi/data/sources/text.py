"""``text:PATH``: windows of a text file, or of the text files of a folder."""

from __future__ import annotations

from typing import TYPE_CHECKING

from modhifi.data.sources.base import SOURCES, TEXT_KINDS, Request, SampleSource
from modhifi.disk import home_path

if TYPE_CHECKING:
    from modhifi.data.samples import Samples
    from modhifi.models.loaded import LoadedModel


def load(path: str, loaded: LoadedModel, request: Request) -> Samples:
    """See :func:`modhifi.data.text.from_files`."""
    from modhifi.data.text import from_files

    return from_files(home_path(path), loaded, request.n, request.seed, request.window)


SOURCES.register(SampleSource("text", "text:PATH", "a text file, or a folder of .txt and .md files", TEXT_KINDS, load))
