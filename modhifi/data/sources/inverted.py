"""``synthetic:invert``: images that the network's own norms draw."""

from __future__ import annotations

from typing import TYPE_CHECKING

from modhifi.cache import default_directory
from modhifi.data.sources.base import IMAGE_KINDS, SOURCES, Request, SampleSource

if TYPE_CHECKING:
    from modhifi.data.samples import Samples
    from modhifi.models.loaded import LoadedModel


def load(_: str, loaded: LoadedModel, request: Request) -> Samples:
    """See :func:`modhifi.data.inversion.inverted`; the images are kept in the cache."""
    from modhifi.data.inversion import inverted

    return inverted(loaded, request.n, request.seed, cache=default_directory(), progress=request.progress)


SOURCES.register(
    SampleSource(
        "synthetic:invert",
        "synthetic:invert",
        "images that the network's norms draw, nearer to real ones and slower",
        IMAGE_KINDS,
        load,
        "Yin et al. 2020; Li et al. 2022",
    )
)
