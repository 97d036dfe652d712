"""Random flips and shifts, item by item."""

from __future__ import annotations

import torch

from modhifi.healing.augment import SHIFT, augmented


def test_every_image_is_a_window_of_its_padded_self_mirrored_or_not() -> None:
    images = torch.rand(12, 3, 16, 24)
    moved = augmented(images, torch.Generator().manual_seed(0))
    rows, columns = int(SHIFT * 16), int(SHIFT * 24)
    offsets = set()
    for image, result in zip(images, moved, strict=True):
        matches = [
            (flip, y, x)
            for flip in (False, True)
            for y in range(2 * rows + 1)
            for x in range(2 * columns + 1)
            if torch.equal(
                torch.nn.functional.pad(image.flip(-1) if flip else image, (columns, columns, rows, rows), "reflect")[
                    :, y : y + 16, x : x + 24
                ],
                result,
            )
        ]
        assert len(matches) == 1
        offsets.add(matches[0])
    assert len(offsets) > 6 and {flip for flip, _, _ in offsets} == {False, True}


def test_the_generator_alone_decides() -> None:
    images = torch.rand(4, 1, 8, 8)
    first, again, other = (augmented(images, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
