"""Images that a network's own memory of its training data draws: gradients reach the pixels, never a weight.

A BatchNorm network stores the mean and variance of every channel on the true data; images are changed until their
batch has them (Yin et al. 2020, "Dreaming to distill", DeepInversion). A LayerNorm network stores nothing of its data;
there the patches of an image are made to differ from each other, as those of photographs do and those of noise do not
(Li et al. 2022, "Patch similarity aware data-free quantization", PSAQ-ViT). Classifiers get a class for every image.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from modhifi.cache import Cache
from modhifi.data.image_inputs import class_count, image_shape, normalisation
from modhifi.data.quality import look, statistics_gap
from modhifi.data.samples import Samples
from modhifi.data.synthetic import drawn
from modhifi.errors import ModhifiError
from modhifi.models.fingerprint import fingerprint
from modhifi.models.half_precision import has_bfloat16, in_bfloat16
from modhifi.models.hooks import only_input
from modhifi.models.loaded import LoadedModel

# 100 steps at 0.05 come as near to what BatchNorm stores, and a ResNet-50 cut on their images lost 3 points more.
STEPS, RATE, BATCH = 150, 0.02, 125
# Weights of the terms beside the statistics: total variation (per pixel, normalised units) and the class.
SMOOTH, CLASS = 0.02, 0.05
# Images as near as this to what BatchNorm stores (real ones were found at 0.003 to 0.02) are treated like real ones.
MATCHED = 0.02
VERSION = 2


def patch_likeness(tokens: Tensor) -> Tensor:
    """Negative entropy of the cosines between an image's tokens ``(B, N, D)``, in nats: low for varied ones.

    The density is a sum of Gaussian kernels of width 0.05 at 64 places, PSAQ-ViT's in spirit.
    """
    unit = F.normalize(tokens.float(), dim=-1)
    cosine = (unit @ unit.transpose(1, 2)).flatten(1)
    places = torch.linspace(-1, 1, 64, device=cosine.device)
    some = cosine[:, :: max(1, cosine.shape[1] // 512)]
    density = torch.exp(-0.5 * ((some[:, :, None] - places) / 0.05).square()).mean(1)
    share = density / density.sum(1, keepdim=True)
    return (share * (share + 1e-9).log()).sum(1).mean()


class _Watch:
    """Collects the terms of one forward pass from hooks on the norms."""

    def __init__(self, model: nn.Module) -> None:
        self.terms: list[Tensor] = []
        norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
        self.handles = [
            m.register_forward_pre_hook(lambda m, a, k: self._channels(m, only_input(a, k)), with_kwargs=True)
            for m in norms
        ]
        if not norms:
            layers = [m for m in model.modules() if isinstance(m, nn.LayerNorm)]
            self.handles = [m.register_forward_hook(lambda m, a, out: self._tokens(out)) for m in layers]

    def _channels(self, norm: _BatchNorm, x: Tensor) -> None:
        var, mean = torch.var_mean(x, [d for d in range(x.ndim) if d != 1], correction=0)
        self.terms.append(statistics_gap(mean, var, norm))

    def _tokens(self, out: Tensor) -> None:
        if out.ndim == 3 and out.shape[1] > 3:
            self.terms.append(0.1 * patch_likeness(out))

    def take(self) -> Tensor:
        total = torch.stack(self.terms).mean()
        self.terms.clear()
        return total

    def __enter__(self) -> _Watch:
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()


def improve(
    loaded: LoadedModel,
    images: Tensor,
    classes: Tensor | None,
    low: Tensor,
    high: Tensor,
    steps: int = STEPS,
    told: Callable[[int], None] = lambda step: None,
) -> Tensor:
    """Change a batch of images ``(B, C, H, W)`` until the network's memory fits them; same shape, within the bounds.

    ``classes`` int64 ``(B,)`` or None; ``told`` hears the number of every step. Adam on the images' spectra; the
    model's parameters get no gradient, and its products are made in bfloat16 where the device has it. Raises
    ModhifiError for a network without BatchNorm and without LayerNorms over tokens ``(B, N, D)``: there is nothing to
    draw from.
    """
    # Steps are taken on the spectrum, scaled as 1/f: on pixels they would end in noise that no photograph has.
    height, width = images.shape[2:]
    fy, fx = torch.fft.fftfreq(height, device=images.device), torch.fft.rfftfreq(width, device=images.device)
    scale = 1 / (fy[:, None].square() + fx.square()).sqrt().clamp_min(1 / max(height, width))
    scale = scale / scale.square().mean().sqrt()
    spectrum = torch.zeros(*images.shape[:2], *scale.shape, 2, device=images.device, requires_grad=True)
    optimiser = torch.optim.Adam([spectrum], lr=RATE)

    def drawn() -> Tensor:
        change = torch.fft.irfft2(torch.view_as_complex(spectrum) * scale, s=(height, width), norm="ortho")
        return (images + change).clamp(low, high)

    with torch.enable_grad(), _Watch(loaded.model) as watch:
        for step in range(steps):
            told(step)
            for group in optimiser.param_groups:
                group["lr"] = RATE * 0.5 * (1 + math.cos(math.pi * step / steps))
            # a seeded flip and shift, so that no detail is tuned to one position
            shift = [int(v) for v in torch.randint(-2, 3, (2,), generator=torch.Generator().manual_seed(step))]
            pixels = drawn()
            moved = pixels.roll(shift, (2, 3))
            with in_bfloat16(loaded.model):
                logits = loaded.logits(moved.flip(3) if step % 2 else moved)
            if not watch.terms:
                raise ModhifiError(
                    f"{loaded.source} has no norms that remember data or tokens that can be told apart; "
                    "use --data synthetic or images:DIR"
                )
            smooth = (pixels.diff(dim=2).abs().mean() + pixels.diff(dim=3).abs().mean()) * SMOOTH
            loss = watch.take() + smooth
            if classes is not None:
                loss = loss + CLASS * F.cross_entropy(logits.float(), classes)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    return drawn().detach()


def inverted(
    loaded: LoadedModel,
    n: int,
    seed: int,
    *,
    steps: int = STEPS,
    cache: Path | None = None,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> Samples:
    """``n`` images drawn by a network's memory, from ``synthetic`` ones on, with the classes they were drawn for.

    Every batch is kept in ``cache`` under a hash of the model and settings, if given: a run that was ended goes on
    behind the last one. Samples are ``synthetic``, and ``matched`` where their distance to the norms (`quality.look`)
    is at most ``MATCHED``. Raises ModhifiError for models without images or norms.
    """
    _, height, width = image_shape(loaded)
    count = class_count(loaded)
    device = next(loaded.model.parameters()).device
    settings = (VERSION, seed, steps, RATE, SMOOTH, CLASS, height, width, has_bfloat16(device))
    key = f"{fingerprint(loaded, {})} {settings}"
    store = None if cache is None else Cache(cache)
    labels = None
    if count is not None:
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
        labels = order[torch.arange(n) % count]
    mean, std = normalisation(loaded)
    low, high = (-mean / std).to(device), ((1 - mean) / std).to(device)
    start = drawn("mixed", loaded, n, seed, balanced=False)
    parts, rounds = [], math.ceil(n / BATCH)
    for number in range(rounds):
        items = range(number * n // rounds, (number + 1) * n // rounds)

        def told(step: int, items: range = items) -> None:
            progress("drawing", items.start + len(items) * step // steps, n)

        name = "inverted-" + hashlib.sha256(f"{key} {items}".encode()).hexdigest()[:16]
        kept = None if store is None else store.read(name)
        if kept is None:
            batch = torch.stack([start.load(i) for i in items]).to(device)
            wanted = None if labels is None else labels[list(items)].to(device)
            kept = {"images": improve(loaded, batch, wanted, low, high, steps, told).cpu()}, {}
            if store is not None:
                store.write(name, *kept)
        parts.append(kept[0]["images"])
    progress("drawing", n, n)
    final = torch.cat(parts)
    samples = Samples(
        load=lambda i: final[i],
        hashes=tuple(hashlib.sha256(image.numpy().tobytes()).hexdigest()[:16] for image in final),
        labels=labels,
        names=tuple(f"inverted {i}" for i in range(n)),
        description=f"synthetic:invert, {n} images of {height}x{width}, {steps} steps, seed {seed}",
        synthetic=True,
    )
    return replace(samples, matched=look(loaded, samples, BATCH).get("mean_norm_gap", math.inf) <= MATCHED)
