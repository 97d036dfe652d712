"""Procedural images with the statistics of natural ones: seeded, drawn one by one, no gradients, no files.

Moments need inputs that excite a network the way photographs do. Four facts about photographs are imitated: power
falls with frequency f as 1/f² (Field 1987), occlusion makes sharp edges between regions of every size (dead leaves:
Ruderman 1997; Lee, Mumford and Huang 2001), colours vary mostly along luminance (the principal colours of ImageNet,
Krizhevsky et al. 2012), and things repeat themselves (textures, fractals). Baradad et al. 2021, "Learning to see by
looking at noise", and Kataoka et al. 2020, "Pre-training without natural images", show that such images carry much of
what a network needs. Image ``i`` depends on ``(kind, seed, i, height, width)`` alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

Array = NDArray[np.float32]
Drawer = Callable[[np.random.Generator, int, int], Array]

# Mean colour of ImageNet in [0, 1], and the standard deviation along its three principal colours (rows: luminance,
# blue against yellow, green against magenta).
MEAN_COLOUR = np.array([0.485, 0.456, 0.406], np.float32)
PRINCIPAL_STD = np.sqrt(np.array([0.2175, 0.0188, 0.0045], np.float32))
PRINCIPAL_COLOURS = np.array(
    [[0.5675, 0.5808, 0.5836], [0.7192, 0.0045, -0.6948], [0.4009, -0.8140, 0.4203]], np.float32
)
PIXEL_STD = np.array([0.229, 0.224, 0.225], np.float32)

# Raised whenever the same (kind, seed, i, size) would draw other pixels: it is part of every item's hash.
GENERATION = 1


def draw(kind: str, seed: int, index: int, height: int, width: int) -> NDArray[np.uint8]:
    """Draw image `index` of the endless sequence that `kind` and `seed` name.

    Returns uint8 RGB of shape ``(height, width, 3)``. Raises KeyError unless `kind` is `mixed` or in `KINDS`.
    """
    rng = np.random.default_rng([seed, index])
    name = str(rng.choice(list(MIXTURE), p=list(MIXTURE.values()))) if kind == "mixed" else kind
    pixels = (np.clip(KINDS[name](rng, height, width), 0, 1) * 255 + 0.5).astype(np.uint8)
    if name in UNBLURRED:
        return pixels
    # A lens and the area of a sensor's cell soften every edge that the pen drew.
    aperture = ImageFilter.BoxBlur(rng.uniform(0.2, 0.8) + rng.uniform(0, 0.002) * min(height, width))
    return np.asarray(Image.fromarray(pixels).filter(aperture))


def identity(kind: str, seed: int, index: int, height: int, width: int) -> str:
    """Hash of all that decides an image's pixels, without drawing it: 16 hex digits of a SHA-256."""
    text = f"modhifi synthetic {GENERATION}: {kind} {seed} {index} {height}x{width}"
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def power_noise(rng: np.random.Generator, height: int, width: int, slope: float, channels: int = 1) -> Array:
    """Gaussian noise whose power falls as ``f**-slope``: float32 ``(channels, height, width)``, mean 0, std 1 each."""
    fy, fx = np.fft.fftfreq(height).astype(np.float32), np.fft.rfftfreq(width).astype(np.float32)
    squared = fy[:, None] ** 2 + fx[None, :] ** 2
    squared[0, 0] = 1.0
    amplitude = np.exp(np.log(squared) * np.float32(-slope / 4))
    amplitude[0, 0] = 0.0
    # The inverse transform keeps only the real half of the frequencies that are their own mirror image.
    amplitude[:, fx == 0] *= np.float32(np.sqrt(2))
    amplitude[:, fx == 0.5] *= np.float32(np.sqrt(2))
    white = rng.standard_normal((channels, height, 2 * len(fx)), dtype=np.float32).view(np.complex64)
    field = np.fft.irfft2(white * amplitude, s=(height, width))
    deviation = field.std(axis=(1, 2), keepdims=True)
    return np.asarray(field / np.maximum(deviation, 1e-12), np.float32)


def palette(rng: np.random.Generator, n: int) -> Array:
    """`n` natural colours that go together: float32 ``(n, 3)`` around 0..1, a shared cast plus individual spread."""
    share = rng.uniform(0.2, 0.6)
    vividness = rng.uniform(0.4, 1.4)
    deviation = PRINCIPAL_STD * np.array([1, vividness, vividness], np.float32)
    cast = rng.standard_normal(3, dtype=np.float32) * np.sqrt(share)
    own = rng.standard_normal((n, 3), dtype=np.float32) * np.sqrt(1 - share)
    return np.asarray(MEAN_COLOUR + ((cast + own) * deviation) @ PRINCIPAL_COLOURS, np.float32)


def pink(rng: np.random.Generator, height: int, width: int) -> Array:
    """1/f noise with natural colour: the mean power over images falls about as f^-2."""
    field = power_noise(rng, height, width, slope=rng.uniform(1.6, 2.4), channels=3)
    contrast, vividness = rng.uniform(0.3, 0.8), rng.uniform(0.3, 1.2)
    deviation = PRINCIPAL_STD * np.array([contrast, contrast * vividness, contrast * vividness], np.float32)
    tint = (rng.standard_normal(3, dtype=np.float32) * PRINCIPAL_STD * 0.5) @ PRINCIPAL_COLOURS
    return np.asarray(MEAN_COLOUR + tint + np.moveaxis(field, 0, -1) * deviation @ PRINCIPAL_COLOURS, np.float32)


def dead_leaves(rng: np.random.Generator, height: int, width: int) -> Array:
    """Textured ellipses, boxes and polygons that hide one another, of sizes r with density r^-3: scale invariant."""
    side = min(height, width)
    count = int(rng.integers(60, 220))
    smallest, largest = max(1.5, 0.03 * side), rng.uniform(0.3, 0.7) * side
    # Inverse of the distribution function of r^-3 between the two ends; big ones first, so that the canvas is covered
    # and small leaves are not all hidden.
    u = rng.random(count)
    radii = 1 / np.sqrt(u / smallest**2 + (1 - u) / largest**2)
    radii[: count // 5] = rng.uniform(0.3, 1.0, count // 5) * largest
    regions = _paint(rng, height, width, radii, shape=int(rng.integers(0, 4)))
    return _clothe(rng, regions, count + 1)


def shapes(rng: np.random.Generator, height: int, width: int) -> Array:
    """A few large textured things, with details on them, before a soft background: figure and ground."""
    side = min(height, width)
    count, details = int(rng.integers(1, 6)), int(rng.integers(0, 12))
    radii = np.concatenate([rng.uniform(0.12, 0.45, count), rng.uniform(0.015, 0.1, details)]) * side
    regions = _paint(rng, height, width, radii, shape=3, spread=0.5)
    things = _clothe(rng, regions, len(radii) + 1)
    return np.where((regions == 0)[..., None], _backdrop(rng, height, width), things)


def textures(rng: np.random.Generator, height: int, width: int) -> Array:
    """Warped stripes, marble, cells and cloud banks: a scalar field seen through a random sequence of colours."""
    warp, cloud = power_noise(rng, height, width, slope=rng.uniform(2.5, 4.0), channels=2)
    y, x = _axes(height, width)
    angle, waves = rng.uniform(0, 2 * np.pi), np.exp(rng.uniform(np.log(2), np.log(20)))
    along = np.cos(angle) * x + np.sin(angle) * y
    across = -np.sin(angle) * x + np.cos(angle) * y
    bend = rng.uniform(0.0, 0.35)
    phase = 2 * np.pi * waves * (along + bend * warp / np.sqrt(waves))
    style = rng.integers(0, 3)
    if style == 0:
        value = 0.5 + 0.5 * np.sin(phase)
    elif style == 1:
        value = 0.5 + 0.25 * (np.sin(phase) + np.sin(2 * np.pi * waves * (across + bend * cloud / np.sqrt(waves))))
    else:
        value = np.abs(warp) * rng.uniform(0.3, 0.8)
    image = _colour_curve(rng, value) + 0.08 * rng.uniform(0, 2) * cloud[..., None]
    return np.asarray(image, np.float32)


def fractal(rng: np.random.Generator, height: int, width: int) -> Array:
    """The attractor of random contractions (iterated function system, chaos game) before a soft background."""
    maps = int(rng.integers(2, 6))
    first, second = rng.uniform(0, 2 * np.pi, (2, maps))
    scales = rng.uniform(0.25, 0.85, (2, maps)) * rng.choice([-1.0, 1.0], (2, maps))
    # Rotation, scaling, rotation: every contraction of the plane has this form.
    a = np.cos(first) * scales[0] * np.cos(second) - np.sin(first) * scales[1] * np.sin(second)
    b = -np.cos(first) * scales[0] * np.sin(second) - np.sin(first) * scales[1] * np.cos(second)
    c = np.sin(first) * scales[0] * np.cos(second) + np.cos(first) * scales[1] * np.sin(second)
    d = -np.sin(first) * scales[0] * np.sin(second) + np.cos(first) * scales[1] * np.cos(second)
    table = np.stack([a, b, c, d, *rng.uniform(-1, 1, (2, maps))]).astype(np.float32)
    weight = np.abs(scales.prod(axis=0)) + 0.05
    walkers, steps, settle = 2500, 22, 6
    bounds = np.cumsum(weight / weight.sum())[:-1].astype(np.float32)
    choice = np.searchsorted(bounds, rng.random((steps, walkers), dtype=np.float32), side="right")
    x, y = rng.uniform(-1, 1, (2, walkers)).astype(np.float32)
    seen = np.empty((steps - settle, 2, walkers), np.float32)
    for step in range(steps):
        a, b, c, d, e, f = np.take(table, choice[step], axis=1)
        x, y = a * x + b * y + e, c * x + d * y + f
        if step >= settle:
            seen[step - settle] = x, y
    sample = seen[-2:].transpose(0, 2, 1).reshape(-1, 2)
    low, high = np.quantile(sample, [0.01, 0.99], axis=0)
    margin = rng.uniform(-0.1, 0.2)
    place = (seen - low[:, None]) / np.maximum(high - low, 1e-9)[:, None] * (1 - 2 * margin) + margin
    column, row = (np.floor(place[:, k] * n).astype(np.int64).ravel() for k, n in ((0, width), (1, height)))
    inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    hits = np.bincount(row[inside] * width + column[inside], minlength=height * width).reshape(height, width)
    density = _blur(np.log1p(hits).astype(np.float32), max(0.5, 0.006 * min(height, width)))
    density = np.asarray(density / max(float(np.quantile(density[::4, ::4], 0.98)), 0.1), np.float32).clip(0, 1)
    cover = np.sqrt(density)[..., None]
    image = _colour_curve(rng, density) * cover + _backdrop(rng, height, width) * (1 - cover)
    return np.asarray(image, np.float32)


def gaussian(rng: np.random.Generator, height: int, width: int) -> Array:
    """Baseline: independent Gaussian pixels with the mean and standard deviation of ImageNet's pixels."""
    return MEAN_COLOUR + PIXEL_STD * rng.standard_normal((height, width, 3), dtype=np.float32)


def uniform(rng: np.random.Generator, height: int, width: int) -> Array:
    """Baseline: independent pixels, uniform in [0, 1]."""
    return rng.random((height, width, 3), dtype=np.float32)


def _axes(height: int, width: int) -> tuple[Array, Array]:
    """Row and column coordinates in units of the shorter side: float32 ``(height, 1)`` and ``(1, width)``."""
    side = min(height, width)
    y, x = np.arange(height) / side, np.arange(width) / side
    return y.astype(np.float32)[:, None], x.astype(np.float32)[None]


def _paint(
    rng: np.random.Generator, height: int, width: int, radii: NDArray[np.float64], shape: int, spread: float = 1.0
) -> NDArray[np.int32]:
    """Map of region numbers ``(height, width)``: 0 where nothing was painted, else 1 + the last shape's position.

    `shape` is 0 for ellipses, 1 for boxes, 2 for polygons, 3 for all of them.
    """
    count, points = len(radii), 20
    centres = (0.5 + (rng.random((count, 2)) * 1.2 - 0.6) * spread) * [width, height]
    forms = rng.integers(0, 3, count) if shape == 3 else np.full(count, shape)
    corners = np.choose(forms, [points, 4, rng.integers(3, 9, count)])
    round_trip = np.broadcast_to(np.linspace(0, 2 * np.pi, points, endpoint=False), (count, points))
    square = np.broadcast_to(np.pi / 4 + np.pi / 2 * np.arange(points), (count, points))
    angles = np.choose(forms[:, None], [round_trip, square, np.sort(rng.uniform(0, 2 * np.pi, (count, points)))])
    # Any few of the sorted angles, neighbours or not, would leave slivers: spread the chosen ones over the circle.
    order = (np.arange(points) * points // np.maximum(corners, 1)[:, None]) % points
    angles = np.where((forms == 2)[:, None], np.take_along_axis(angles, order, axis=1), angles)
    reach = np.choose(forms[:, None], [1.0, 1.2, rng.uniform(0.5, 1.3, (count, points))]) * radii[:, None]
    along, across = reach * np.cos(angles), reach * np.sin(angles) * rng.uniform(0.35, 1.0, count)[:, None]
    turns = rng.uniform(0, 2 * np.pi, count)[:, None]
    x = centres[:, :1] + np.cos(turns) * along - np.sin(turns) * across
    y = centres[:, 1:] + np.sin(turns) * along + np.cos(turns) * across
    outlines = np.stack([x, y], axis=-1).reshape(count, -1).tolist()
    canvas = Image.new("I", (width, height), 0)
    pen = ImageDraw.Draw(canvas)
    for i in range(count):
        pen.polygon(outlines[i][: 2 * corners[i]], fill=i + 1)
    return np.asarray(canvas, dtype=np.int32)


def _clothe(rng: np.random.Generator, regions: NDArray[np.int32], count: int) -> Array:
    """Give each of `count` regions a colour, a shading and a texture of its own: float32 ``(height, width, 3)``."""
    height, width = regions.shape
    y, x = _axes(height, width)
    colours = palette(rng, count)
    angle = rng.uniform(0, 2 * np.pi, count)
    waves = 2 * np.pi * np.exp(rng.uniform(np.log(3), np.log(max(3.0, min(height, width) / 4)), count))
    stripe = rng.exponential(0.07, count) * (rng.random(count) < 0.4)
    grain, shade = rng.exponential(0.06, count), rng.normal(0, 0.25, (2, count))
    table = np.stack([waves * np.cos(angle), waves * np.sin(angle), stripe, grain, *shade]).astype(np.float32)
    across, down, stripe_at, grain_at, shade_x, shade_y = np.take(table, regions, axis=1)
    fine = power_noise(rng, height, width, slope=rng.uniform(0.6, 2.2))[0]
    light = stripe_at * np.sin(across * x + down * y) + grain_at * fine + shade_x * (x - 0.5) + shade_y * (y - 0.5)
    return np.asarray(np.take(colours, regions, axis=0) + light[..., None], np.float32)


def _backdrop(rng: np.random.Generator, height: int, width: int) -> Array:
    """A soft background: smooth noise between two colours under a slope of light."""
    field = power_noise(rng, height, width, slope=rng.uniform(2.2, 3.5))[0]
    y, x = _axes(height, width)
    first, second = palette(rng, 2)
    slope = rng.normal(0, 0.5, 2).astype(np.float32)
    blend = np.clip(0.5 + 0.25 * field + slope[0] * (x - 0.5) + slope[1] * (y - 0.5), 0, 1)[..., None]
    return np.asarray(first + (second - first) * blend, np.float32)


def _colour_curve(rng: np.random.Generator, value: Array) -> Array:
    """Look a field in [0, 1] up in a curve through random natural colours, smooth or with hard steps."""
    knots = palette(rng, int(rng.integers(2, 7)))
    fine = np.linspace(0, 1, 256)
    if rng.random() < 0.3:
        curve = knots[np.minimum((fine * len(knots)).astype(int), len(knots) - 1)]
    else:
        at = np.linspace(0, 1, len(knots))
        curve = np.stack([np.interp(fine, at, knots[:, c]) for c in range(3)], axis=1)
    shades: Array = curve.astype(np.float32)
    return shades[(np.clip(value, 0, 1) * 255).astype(np.uint8)]


def _blur(field: Array, radius: float) -> Array:
    """Gaussian blur of a field ``(height, width)`` with values in [0, 16), in steps of 1/16: enough for a density."""
    image = Image.fromarray((np.clip(field, 0, 15.9) * 16).astype(np.uint8))
    return np.asarray(image.filter(ImageFilter.GaussianBlur(radius))).astype(np.float32) / np.float32(16)


KINDS: dict[str, Drawer] = {
    "dead-leaves": dead_leaves,
    "shapes": shapes,
    "textures": textures,
    "fractal": fractal,
    "pink": pink,
    "gaussian": gaussian,
    "uniform": uniform,
}
UNBLURRED = ("pink", "gaussian", "uniform")
# The shares of the kinds in `mixed`, the default.
MIXTURE = {"dead-leaves": 0.45, "shapes": 0.2, "textures": 0.15, "pink": 0.1, "fractal": 0.1}
