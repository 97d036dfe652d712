"""R1 and R2 of two networks of the same shapes, and what was measured on the same samples.

Form B throughout: errors of the modified layers on clean activations, behind them the modified tails.
Source: docs/method.md, the error bound.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from modhifi.bounds.lipschitz import input_box, minkowski
from modhifi.bounds.local_lipschitz import cannot_flip
from modhifi.bounds.propagation.affine import Norms
from modhifi.bounds.propagation.float64 import Double
from modhifi.bounds.propagation.interval import UP
from modhifi.bounds.propagation.newton import ROUNDS
from modhifi.bounds.propagation.propagate import Walk, walk
from modhifi.data.image_inputs import normalisation
from modhifi.errors import ModhifiError
from modhifi.models.loaded import LoadedModel

# Above the rounding of two float64 passes; the rules themselves round up.
RELATIVE_SLACK, OUTPUT_SLACK = 1e-6, 1e-6
# A walk keeps every activation of its samples, once for each of Newton's rounds: large images go one by one.
WALK_BATCH, WALK_ENTRIES = 8, 2**17
# Where, names of the modified parameters, root mean square of the own error, global constant of the modified tail.
Layer = tuple[str, tuple[str, ...], float, float]


@dataclass(frozen=True)
class Certified:
    """The bounds R1 and R2 and the measured change of the output, on n samples.

    All tensors are float64. ``outputs`` ``(n, ...)`` are the original's. ``measured``, ``local`` (R2) and ``theorem``
    (R1), each ``(n,)``, are Euclidean changes of the output; ``remainder`` ``(n,)`` is the part of ``local`` that
    bounds the error of Newton's prediction. ``expected`` bounds the root mean square of ``theorem`` over the samples,
    ``every_input`` is R1 over the whole input box, ``cannot_flip`` the share of samples whose top-1 provably stays.
    """

    outputs: Tensor
    measured: Tensor
    local: Tensor
    remainder: Tensor
    theorem: Tensor
    expected: float
    every_input: float | None
    cannot_flip: float
    layers: tuple[Layer, ...]
    missing: Mapping[str, str]
    scale: float

    def violations(self) -> tuple[str, ...]:
        """Every violation of measured <= R2 <= R1, in words; empty for sound bounds."""
        slack = OUTPUT_SLACK * self.scale
        violations = []
        for name, low, high in (("measured > R2", self.measured, self.local), ("R2 > R1", self.local, self.theorem)):
            over = low - high * (1 + RELATIVE_SLACK) - slack
            # A rung that is not available is infinite and violates nothing; what was measured is no rung.
            absent = high.isinf() | (low.isinf() & (low is self.local))
            over = torch.where(absent, torch.full_like(over, -math.inf), over)
            if bool((over > 0).any()):
                i = int(over.argmax())
                violations.append(f"{name} on sample {i}: {float(low[i]):.6g} > {float(high[i]):.6g}")
        spread = float(self.theorem.square().mean().sqrt())
        if spread > self.expected * (1 + RELATIVE_SLACK) + slack:
            violations.append(
                f"R1 over the samples, {spread:.6g}, exceeds its bound in expectation, {self.expected:.6g}"
            )
        return tuple(violations)


def certify(
    loaded: LoadedModel,
    original: nn.Module,
    edited: nn.Module,
    batch: Tensor,
    norms: Norms | None = None,
    rounds: int = ROUNDS,
) -> Certified:
    """Computes R1 and R2 on a batch ``(n, ...)`` for two float64 models of the same shapes, on the CPU.

    Where the input has a box, R1 for every input is that of the box's centre: every other input's error exceeds the one
    there by at most the norm of the edit times the distance of a reader's input from it. ``loaded`` feeds the models,
    ``norms`` keeps operator norms between calls, ``rounds`` are those of Newton's method. Raises ModhifiError where the
    network runs other layers from batch to batch. Source: docs/method.md, the error bound.
    """
    box = _box(loaded, batch)
    norms = norms or Norms(whole_box=box is not None)
    parts = in_parts(batch)
    walks = [walk(original, edited, loaded.logits, part, norms, rounds) for part in parts]
    first, outputs = walks[0], torch.cat([w.output for w in walks])
    moved = torch.cat([logits_of(loaded, edited, part) for part in parts]) - outputs
    sources = range(len(first.sources))
    if any(len(w.sources) != len(first.sources) for w in walks):
        raise ModhifiError("the network runs other layers from batch to batch; walk one sample with --walked 1")
    errors = [torch.cat([w.sources[k].errors for w in walks]) for k in sources]
    constants = [max(w.constants[k] for w in walks) for k in sources]
    rms = [math.sqrt(sum(w.sources[k].squared for w in walks) / len(batch)) for k in sources]
    layers = tuple((s.where, s.parameters, r, c) for s, r, c in zip(first.sources, rms, constants, strict=True))
    theorem, expected = torch.full((len(batch),), math.inf, dtype=torch.float64), math.inf
    if not any(w.lost for w in walks):
        terms = [_times(c, e) for c, e in zip(constants, errors, strict=True)]
        theorem = torch.stack([torch.zeros(len(batch), dtype=torch.float64), *terms]).sum(0) * UP
        if all(map(math.isfinite, constants)):
            expected = minkowski(constants, [e.square() for e in errors]) * UP
    missing = {k: v for w in reversed(walks) for k, v in w.missing.items()}
    every = None
    if not first.sources and not first.lost:
        every = 0.0
    elif box is None:
        missing["every input"] = "no input box is known (images with a fixed normalisation have one)"
    else:
        every = _everywhere(walk(original, edited, loaded.logits, box[0][None], norms, 0), box[1])
    local = torch.cat([w.local for w in walks])
    certain = cannot_flip(outputs, local) if outputs.ndim == 2 and outputs.shape[1] > 1 else torch.zeros(1)
    return Certified(
        outputs=outputs,
        measured=moved.flatten(1).norm(dim=1),
        local=local,
        remainder=torch.cat([w.remainder for w in walks]),
        theorem=theorem,
        expected=expected,
        every_input=every,
        cannot_flip=float(certain.double().mean()),
        layers=layers + _unwalked(original, edited, layers),
        missing=missing,
        scale=float(outputs.flatten(1).norm(dim=1).max()),
    )


def in_parts(batch: Tensor) -> tuple[Tensor, ...]:
    """The batch ``(n, ...)`` in parts so small that memory holds every activation of one."""
    parts: tuple[Tensor, ...] = batch.split(max(1, min(WALK_BATCH, WALK_ENTRIES // max(1, batch[0].numel()))))
    return parts


def _everywhere(centre: Walk, radius: float) -> float | None:
    """R1 for every input within a Euclidean radius of the box's centre; None where it is not finite."""
    if centre.lost:
        return None
    terms = [
        constant * (float(source.errors[0]) + source.reach * radius)
        for constant, source in zip(centre.constants, centre.sources, strict=True)
        if constant > 0
    ]
    total = math.fsum(terms) * UP if all(map(math.isfinite, terms)) else math.inf
    return total if math.isfinite(total) else None


def _unwalked(original: nn.Module, edited: nn.Module, layers: tuple[Layer, ...]) -> tuple[Layer, ...]:
    """The modified parameters that no rule met, by module: their own error is unknown, their effect can be measured."""
    edited_tensors = {**dict(edited.named_parameters()), **dict(edited.named_buffers())}
    named = {name for _, names, _, _ in layers for name in names}
    groups: dict[str, list[str]] = {}
    for name, tensor in [*original.named_parameters(), *original.named_buffers()]:
        if name not in named and not torch.equal(tensor, edited_tensors[name]):
            groups.setdefault(name.rpartition(".")[0], []).append(name)
    return tuple((module, tuple(names), math.nan, math.inf) for module, names in groups.items())


def _box(loaded: LoadedModel, batch: Tensor) -> tuple[Tensor, float] | None:
    if loaded.transform is None or batch.ndim != 4:
        return None
    mean, std = normalisation(loaded)
    return input_box(mean, std, list(batch.shape[2:]))


@torch.no_grad()
def logits_of(loaded: LoadedModel, model: nn.Module, batch: Tensor) -> Tensor:
    """The outputs ``(n, ...)`` of a float64 model, computed in float64 throughout."""
    with Double():
        return loaded.logits(batch, model)


def _times(constant: float, errors: Tensor) -> Tensor:
    return errors * constant if math.isfinite(constant) else torch.where(errors > 0, math.inf, 0.0).double()
