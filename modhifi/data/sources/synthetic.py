"""``synthetic[:KIND]``: drawn images, or the text that a language model writes itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

from modhifi.data.sources.base import IMAGE_KINDS, SOURCES, TEXT_KINDS, Request, SampleSource

if TYPE_CHECKING:
    from modhifi.data.samples import Samples
    from modhifi.models.loaded import LoadedModel


def load(kind: str, loaded: LoadedModel, request: Request) -> Samples:
    """See :func:`modhifi.data.synthetic.drawn`, whose kind is ``mixed`` if not said; language models write."""
    from modhifi.data.synthetic import drawn

    if loaded.kind in TEXT_KINDS and not kind:
        return SOURCES["self"].load("", loaded, request)
    return drawn(kind or "mixed", loaded, request.n, request.seed, request.balanced, request.progress)


SOURCES.register(
    SampleSource(
        "synthetic",
        "synthetic[:KIND]",
        "drawn images, or text that the language model writes itself",
        (*IMAGE_KINDS, *TEXT_KINDS, "audio", "series"),
        load,
        "Baradad et al. 2021; Kataoka et al. 2020",
    )
)
