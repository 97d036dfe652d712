"""Procedural images: reproducible, of the right form, and natural in their statistics."""

from __future__ import annotations

import numpy as np
import pytest

from modhifi.data import procedural

EVERY_KIND = ("mixed", *procedural.KINDS)


def power_slope(images: list[np.ndarray]) -> float:
    """Slope of log power over log frequency of the luminance, averaged over images, between f = 2 and side / 4."""
    side = images[0].shape[0]
    window = np.hanning(side)[:, None] * np.hanning(side)[None]
    total = np.zeros((side, side))
    for image in images:
        grey = image.astype(float).mean(axis=2)
        total += np.abs(np.fft.fft2((grey - grey.mean()) * window)) ** 2
    f = np.fft.fftfreq(side, 1 / side)
    radius = np.rint(np.hypot(f[:, None], f[None])).astype(int)
    rings = np.arange(2, side // 4)
    power = np.array([total[radius == r].mean() for r in rings])
    return float(np.polyfit(np.log(rings), np.log(power), 1)[0])


@pytest.mark.parametrize("kind", EVERY_KIND)
@pytest.mark.parametrize("size", [(32, 32), (48, 33), (1, 1), (224, 224)])
def test_images_have_the_size_asked_for(kind: str, size: tuple[int, int]) -> None:
    image = procedural.draw(kind, 0, 0, *size)
    assert image.shape == (*size, 3)
    assert image.dtype == np.uint8


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_image_depends_on_seed_and_index_alone(kind: str) -> None:
    first = procedural.draw(kind, 3, 7, 40, 40)
    procedural.draw(kind, 3, 8, 40, 40)
    np.random.default_rng(0).random(5)
    assert np.array_equal(first, procedural.draw(kind, 3, 7, 40, 40))
    assert not np.array_equal(first, procedural.draw(kind, 3, 8, 40, 40))
    assert not np.array_equal(first, procedural.draw(kind, 4, 7, 40, 40))


def test_identity_tells_images_apart_and_is_stable() -> None:
    same = procedural.identity("pink", 0, 1, 32, 32)
    assert same == procedural.identity("pink", 0, 1, 32, 32) and len(same) == 16 and int(same, 16) >= 0
    others = [("pink", 0, 2, 32, 32), ("pink", 1, 1, 32, 32), ("mixed", 0, 1, 32, 32), ("pink", 0, 1, 32, 64)]
    assert len({same, *(procedural.identity(*other) for other in others)}) == 5


@pytest.mark.parametrize("slope", [1.0, 2.0])
@pytest.mark.parametrize("size", [(64, 64), (64, 63)])
def test_power_noise_has_the_slope_asked_for(slope: float, size: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    height, width = size
    total = sum(np.abs(np.fft.fft2(procedural.power_noise(rng, *size, slope)[0])) ** 2 for _ in range(400)) / 400
    f = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None])
    expected = np.where(f > 0, np.maximum(f, 1e-9) ** -slope, 0)
    expected *= total.sum() / expected.sum()
    # Every frequency, those on the axes too, not only the slope: a wrong half of the spectrum would show here. The
    # lowest ones are left out, since each field is scaled by its own deviation, which they rule.
    ratio = total[f > 0.1] / expected[f > 0.1]
    assert np.abs(np.log(np.median(ratio))) < 0.05
    assert ratio.min() > 0.7 and ratio.max() < 1.4


def test_power_noise_is_normalised() -> None:
    field = procedural.power_noise(np.random.default_rng(1), 30, 50, 2.0, channels=4)
    assert field.shape == (4, 30, 50) and field.dtype == np.float32
    assert np.allclose(field.mean(axis=(1, 2)), 0, atol=1e-5)
    assert np.allclose(field.std(axis=(1, 2)), 1, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "low", "high"), [("pink", -2.3, -1.7), ("dead-leaves", -2.8, -1.5), ("mixed", -2.9, -1.5)]
)
def test_natural_kinds_have_a_natural_spectrum(kind: str, low: float, high: float) -> None:
    slope = power_slope([procedural.draw(kind, 0, i, 96, 96) for i in range(60)])
    assert low < slope < high


@pytest.mark.parametrize("kind", ["gaussian", "uniform"])
def test_baselines_are_white(kind: str) -> None:
    assert abs(power_slope([procedural.draw(kind, 0, i, 64, 64) for i in range(20)])) < 0.1


def test_natural_colours_vary_mostly_along_luminance() -> None:
    pixels = np.concatenate([procedural.draw("mixed", 0, i, 32, 32).reshape(-1, 3) for i in range(100)]) / 255.0
    variance, direction = np.linalg.eigh(np.cov(pixels.T))
    assert variance[2] / variance.sum() > 0.7
    assert np.abs(direction[:, 2]).min() > 0.4
    assert 0.2 < pixels.std() < 0.35
    assert np.abs(pixels.mean(axis=0) - procedural.MEAN_COLOUR).max() < 0.08


def test_gaussian_has_the_pixel_statistics_of_imagenet() -> None:
    pixels = np.concatenate([procedural.draw("gaussian", 0, i, 64, 64).reshape(-1, 3) for i in range(10)]) / 255.0
    assert np.allclose(pixels.mean(axis=0), procedural.MEAN_COLOUR, atol=0.02)
    assert np.allclose(pixels.std(axis=0), procedural.PIXEL_STD, atol=0.02)


def test_dead_leaves_have_edges_that_noise_lacks() -> None:
    def kurtosis(kind: str) -> float:
        images = np.stack([procedural.draw(kind, 0, i, 64, 64).astype(float).mean(axis=2) for i in range(30)])
        steps = np.diff(images, axis=2).ravel()
        return float((steps**4).mean() / (steps**2).mean() ** 2)

    assert kurtosis("gaussian") < 4
    assert kurtosis("dead-leaves") > 6


def test_mixture_draws_every_kind() -> None:
    assert sum(procedural.MIXTURE.values()) == pytest.approx(1)
    assert set(procedural.MIXTURE) <= set(procedural.KINDS)


def test_unknown_kind_is_a_key_error() -> None:
    with pytest.raises(KeyError):
        procedural.draw("sunsets", 0, 0, 8, 8)
