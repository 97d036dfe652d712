"""``demo:PART``: images that come with the package."""

from __future__ import annotations

from typing import TYPE_CHECKING

from modhifi.data.sources.base import IMAGE_KINDS, SOURCES, Request, SampleSource
from modhifi.models.demo import IMAGES, bundled

if TYPE_CHECKING:
    from modhifi.data.samples import Samples
    from modhifi.models.loaded import LoadedModel


def load(part: str, loaded: LoadedModel, request: Request) -> Samples:
    """CIFAR-10 images: ``calibration``, unlabelled, or ``test``. Raises ModhifiError for another part."""
    from modhifi.data.images import from_directory

    name = f"demo:{part}"
    return from_directory(bundled(name, IMAGES), loaded, request.n, request.seed, name)


SOURCES.register(
    SampleSource(
        "demo",
        "demo:PART",
        "CIFAR-10 images that come with the package, calibration or test",
        IMAGE_KINDS,
        load,
        "Krizhevsky 2009",
    )
)
