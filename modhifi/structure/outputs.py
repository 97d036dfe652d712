"""The tensors that a forward pass returns, by their place in the output, and how far two of them are apart."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

# Rows hardly differ where their spread is no larger a share of their squared norm, as rounding may leave.
HARDLY = 1e-10


def named_tensors(output: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors in nested lists, tuples, mappings and dataclasses, in order, named ``boxes.0``; "" alone.

    An object of another class is looked into where it is the whole output. A cache of keys and values is state, not
    output.
    """
    if isinstance(output, Tensor):
        yield name, output
        return
    if isinstance(output, Mapping):
        entries = list(output.items())
    elif isinstance(output, (list, tuple)):
        entries = list(zip(getattr(output, "_fields", range(len(output))), output, strict=True))
    elif dataclasses.is_dataclass(output) and not isinstance(output, type):
        entries = [(field.name, getattr(output, field.name)) for field in dataclasses.fields(output)]
    elif not name and hasattr(output, "__dict__"):
        entries = list(vars(output).items())
    else:
        return
    for key, value in entries:
        yield from named_tensors(value, f"{name}.{key}" if name else str(key))


def classes_last(outputs: Tensor) -> Tensor:
    """Maps ``(b, classes, height, width)``, as losses of torch read them, with their classes behind."""
    return outputs.movedim(1, -1) if outputs.ndim > 3 else outputs


def distance_over_spread(original: Tensor, edited: Tensor, real: Tensor | None = None) -> Tensor:
    """The squared distance of values ``(batch, ..., width)`` over the spread of the original's, a float32 number.

    The spread is the squared distance of rows from their mean: the edited model's constant output of that mean is at 1,
    equal outputs are at 0. Where the rows hardly differ it is their squared norm. ``real`` is a bool mask of rows.
    """
    before, after = (classes_last(x).float() for x in (original, edited))
    if real is not None and real.shape == before.shape[:-1]:
        before, after = before[real], after[real]
    rows = before.flatten(0, -2)
    spread, energy = (rows - rows.mean(0)).square().sum(), rows.square().sum()
    scale = torch.where(spread > HARDLY * energy, spread, energy).clamp_min(torch.finfo(rows.dtype).tiny)
    return (after - before).square().sum() / scale


def difference(output: Tensor, expected: Tensor) -> float:
    """The Euclidean distance of two tensors of one shape over the norm of ``expected``, where that is finite.

    0 where both are zero, NaN where ``output`` is not finite and ``expected`` is.
    """
    wide = torch.complex128 if expected.is_complex() else torch.float64
    finite = expected.isfinite()
    ours, theirs = output[finite].to(wide), expected[finite].to(wide)
    distance, norm = float((ours - theirs).norm()), float(theirs.norm())
    return distance / norm if norm else distance
