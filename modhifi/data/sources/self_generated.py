"""``self``: text that a language model writes itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

from modhifi.cache import default_directory
from modhifi.data.sources.base import SOURCES, TEXT_KINDS, Request, SampleSource

if TYPE_CHECKING:
    from modhifi.data.samples import Samples
    from modhifi.models.loaded import LoadedModel


def load(_: str, loaded: LoadedModel, request: Request) -> Samples:
    """See :func:`modhifi.data.self_generated.write`; the windows are kept in the cache."""
    from modhifi.data.self_generated import write

    return write(loaded, request.n, request.seed, request.window, request.progress, default_directory())


SOURCES.register(
    SampleSource(
        "self",
        "self",
        "text that the language model writes itself",
        TEXT_KINDS,
        load,
        "Xu et al. 2025 for chats; Wang and Cho 2019 for masked language models",
    )
)
