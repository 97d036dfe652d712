"""How a model's own preprocessing is kept: images of any mode in, model-ready pixels out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor


@dataclass(frozen=True)
class Preprocess:
    """PIL image of any mode to float32 ``(C, H, W)``; ``processor`` is transformers' own object, where there is one."""

    pipeline: Callable[[Image.Image], Tensor]
    mode: str
    processor: Any | None = None

    def __call__(self, image: Image.Image) -> Tensor:
        return self.pipeline(to_mode(image, self.mode))


def to_mode(image: Image.Image, mode: str) -> Image.Image:
    """Convert an image of any mode to ``RGB`` or ``L``, scaling 16-bit grey values, which Pillow would clip."""
    if image.mode == "I" or image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
    elif "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert(mode)
