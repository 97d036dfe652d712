"""Look at samples: a sheet of pictures for reports, and PNG files."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from modhifi.data.image_inputs import normalisation
from modhifi.data.samples import Samples
from modhifi.disk import WRITTEN
from modhifi.errors import ModhifiError
from modhifi.models.loaded import LoadedModel


def picture(samples: Samples, loaded: LoadedModel, index: int) -> Image.Image:
    """Item `index` as the RGB image that the model sees, its normalisation undone."""
    mean, std = normalisation(loaded)
    pixels = (samples.load(index) * std + mean).clamp(0, 1).mul(255).round()
    array: NDArray[np.uint8] = pixels.permute(1, 2, 0).numpy().astype(np.uint8)
    return Image.fromarray(array.squeeze(-1) if array.shape[-1] == 1 else array).convert("RGB")


def contact_sheet(samples: Samples, loaded: LoadedModel, n: int = 64, tile: int = 112) -> Image.Image:
    """The first `n` samples in a nearly square grid, on white, each at most `tile` pixels high and wide.

    Small images are enlarged by a whole factor, pixel by pixel. Raises ModhifiError if the model takes no images.
    """
    count = min(n, len(samples))
    columns = math.ceil(math.sqrt(count))
    pictures = [_fitted(picture(samples, loaded, i), tile) for i in range(count)]
    width, height = (max(side) + 2 for side in zip(*(image.size for image in pictures), strict=True))
    sheet = Image.new("RGB", (columns * width, math.ceil(count / columns) * height), "white")
    for i, image in enumerate(pictures):
        sheet.paste(image, (i % columns * width + 1, i // columns * height + 1))
    return sheet


def _fitted(image: Image.Image, tile: int) -> Image.Image:
    longest = max(image.size)
    if longest > tile:
        image.thumbnail((tile, tile))
        return image
    factor = tile // longest
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def save_sheet(samples: Samples, loaded: LoadedModel, path: Path) -> None:
    """Write :func:`contact_sheet` to a file. Raises ModhifiError if that fails or the model takes no images."""
    try:
        told = PngInfo()
        told.add_text("Software", WRITTEN)  # by which the file is known again, and replaced
        contact_sheet(samples, loaded).save(path, pnginfo=told)
    except (OSError, ValueError) as error:
        raise ModhifiError(f"cannot write {path}: {error}; give a file that ends in .png") from error


def materialise(samples: Samples, loaded: LoadedModel, out_dir: Path) -> list[Path]:
    """Write every sample as a file: an image as PNG at the model's input size, tokens as the text they stand for.

    Labelled samples go into a folder named after the label. The directory can be read back as ``images:DIR`` or
    ``text:DIR``. Raises ModhifiError if it is not empty or cannot be written.
    """
    try:
        if out_dir.exists() and any(out_dir.iterdir()):
            raise ModhifiError(f"{out_dir} is not empty; give a new directory")
        written = []
        for i in range(len(samples)):
            folder = out_dir if samples.labels is None else out_dir / str(int(samples.labels[i]))
            folder.mkdir(parents=True, exist_ok=True)
            item = folder / f"{i:06d}"
            if loaded.tokenizer is not None:
                written.append(item.with_suffix(".txt"))
                tokens = samples.load(i)
                written[-1].write_text(loaded.tokenizer.decode(tokens[tokens >= 0], skip_special_tokens=True), "utf-8")
            else:
                written.append(item.with_suffix(".png"))
                picture(samples, loaded, i).save(written[-1])
    except OSError as error:
        raise ModhifiError(
            f"cannot write to {out_dir}: {error.strerror or error}; check space and permissions"
        ) from error
    return written
