"""A small model and images that come with the package, so that everything can be tried offline."""

from __future__ import annotations

from pathlib import Path

from modhifi.errors import ModhifiError

ROOT = Path(__file__).parent.parent / "demo"
MODELS = {"demo:resnet": ROOT / "model"}
IMAGES = {"demo:calibration": ROOT / "images" / "calibration", "demo:test": ROOT / "images" / "test"}


def bundled(name: str, known: dict[str, Path]) -> Path:
    """The directory behind ``demo:NAME``.

    ``known`` maps such names to directories. Raises ModhifiError for a name that is not in it.
    """
    if name not in known:
        raise ModhifiError(f"there is no {name} in the package; it brings {' and '.join(known)}")
    return known[name]
