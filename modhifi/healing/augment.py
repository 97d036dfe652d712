"""Images flipped and shifted at random; the teacher looks at the same ones, so that no label can become wrong."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

# The largest shift, as a share of the height and width.
SHIFT = 1 / 8


def augmented(images: Tensor, generator: torch.Generator) -> Tensor:
    """Images ``(batch, channels, height, width)``, each mirrored or not and shifted, edges reflected."""
    count, _, height, width = images.shape
    most = [int(SHIFT * side) for side in (height, width)]
    mirrored = torch.rand(count, generator=generator) < 0.5
    offsets = [torch.randint(2 * margin + 1, (count,), generator=generator) for margin in most]
    images = torch.where(mirrored[:, None, None, None], images.flip(-1), images)
    padded = pad(images, (most[1], most[1], most[0], most[0]), mode="reflect")
    rows, columns = (start[:, None] + torch.arange(side) for start, side in zip(offsets, (height, width), strict=True))
    items = torch.arange(count)[:, None, None]
    # Indices around a slice put their own axes first.
    return padded[items, :, rows[:, :, None], columns[:, None, :]].movedim(-1, 1)
